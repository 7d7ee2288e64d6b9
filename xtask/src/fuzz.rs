//! `cargo xtask fuzz`: libFuzzer over the targets of `tests/fuzz`, for so many seconds each, as many side by side as there are
//! processors: the seconds are those of a clock, and a target that shares its processor gets less. What it finds out on the
//! way stays in `target/fuzz`; only `--keep` puts it into the tree. No nightly compiler and no cargo-fuzz is needed.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::{cmd, ebpf, project::Project, test::Verdict};

/// How long each target runs where nothing else is said, as in CI.
const SECONDS: u32 = 30;
/// How much longer than it was told to a target may take: it looks at its clock between two inputs alone.
const LATE: Duration = Duration::from_secs(120);
/// How often it is asked whether it has ended.
const POLL: Duration = Duration::from_millis(100);
/// The last lines of a log that tell what went wrong.
const TAIL: usize = 40;

/// Options of `fuzz`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Which target; all of them if left out
    target: Option<String>,
    /// How long each runs
    #[arg(long, default_value_t = SECONDS)]
    seconds: u32,
    /// Add what has reached new code to the corpus in the tree
    #[arg(long)]
    keep: bool,
}

/// Runs the verb.
pub(crate) fn main(args: &Args) -> Result<()> {
    let project = Project::find();
    let targets = match &args.target {
        Some(target) => select(&project, std::slice::from_ref(target))?,
        None => targets(&project)?,
    };
    fuzz(&project, &targets, args.seconds)?;
    if args.keep {
        for target in &targets {
            keep(&project, target)?;
        }
    }
    Ok(())
}

/// The suite: every target, or those with one of these words in their name.
pub(crate) fn run(project: &Project, filter: &[String]) -> Result<Verdict> {
    let mut targets = targets(project)?;
    if !filter.is_empty() {
        targets.retain(|target| filter.iter().any(|word| target.contains(word)));
    }
    if targets.is_empty() {
        return Ok(Verdict::NoMatch);
    }
    fuzz(project, &targets, SECONDS)?;
    Ok(Verdict::Passed)
}

/// Names of all targets: each is a file.
fn targets(project: &Project) -> Result<Vec<String>> {
    let dir = sources(project).join("fuzz_targets");
    let mut names = Vec::new();
    for entry in fs::read_dir(&dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let path = entry?.path();
        if let Some(name) = path.file_stem().and_then(|name| name.to_str()) {
            names.push(name.to_owned());
        }
    }
    names.sort();
    if names.is_empty() {
        bail!("no fuzz target in {}", dir.display());
    }
    Ok(names)
}

fn select(project: &Project, wanted: &[String]) -> Result<Vec<String>> {
    let known = targets(project)?;
    for name in wanted {
        if !known.contains(name) {
            bail!("no fuzz target `{name}`; there are {}", known.join(", "));
        }
    }
    Ok(wanted.to_vec())
}

fn fuzz(project: &Project, targets: &[String], seconds: u32) -> Result<()> {
    build(project, targets)?;
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let mut waiting = targets.iter();
    let mut running: Vec<Run> = Vec::new();
    let mut failed = Vec::new();
    loop {
        let free = processors.saturating_sub(running.len());
        for target in waiting.by_ref().take(free) {
            running.push(Run::start(project, target, seconds)?);
        }
        if running.is_empty() {
            break;
        }
        std::thread::sleep(POLL);
        for mut run in std::mem::take(&mut running) {
            match run.ended() {
                Ok(None) => running.push(run),
                Ok(Some(())) => {}
                Err(error) => {
                    eprintln!("error: {}: {error:#}", run.target);
                    eprintln!("{}", tail(&run.log));
                    failed.push(run.target.clone());
                }
            }
        }
    }
    if !failed.is_empty() {
        bail!(
            "fuzz targets failed: {}; what they failed on is in {} (run a target's program with such a file to see it again)",
            failed.join(", "),
            project.target.join("fuzz").display()
        );
    }
    Ok(())
}

/// Only the packages of the workspace are compiled again, with coverage.
fn build(project: &Project, targets: &[String]) -> Result<()> {
    ebpf::ensure(project)?;
    let mut command = cmd::cargo(project);
    command
        .env("RUSTC_WORKSPACE_WRAPPER", sources(project).join("rustc.sh"))
        .args(["build", "--locked", "--package", "culvert-fuzz"])
        .args(["--features", "libfuzzer"]);
    for target in targets {
        command.args(["--bin", target]);
    }
    cmd::run(&mut command).context("building the fuzz targets (libFuzzer needs a C++ compiler)")
}

struct Run {
    target: String,
    log: PathBuf,
    child: Child,
    deadline: Instant,
}

impl Run {
    fn start(project: &Project, target: &str, seconds: u32) -> Result<Self> {
        let found = project.target.join("fuzz").join(target);
        let corpus = found.join("corpus");
        fs::create_dir_all(&corpus).with_context(|| format!("cannot make {}", corpus.display()))?;
        let log = found.join("log");
        let file = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        let mut command = program(project, target);
        command
            .arg(format!("-max_total_time={seconds}"))
            .arg(format!("-artifact_prefix={}/", found.display()))
            .args(["-timeout=10", "-rss_limit_mb=1024", "-print_final_stats=1"])
            // The first takes in what is new; the tree's is only read.
            .arg(&corpus)
            .arg(kept(project, target))
            .stdout(file.try_clone()?)
            .stderr(file);
        eprintln!("{target}: {seconds} s, log in {}", log.display());
        let child = command
            .spawn()
            .with_context(|| format!("cannot run `{}`", cmd::show(&command)))?;
        Ok(Self {
            target: target.to_owned(),
            log,
            child,
            deadline: Instant::now() + Duration::from_secs(seconds.into()) + LATE,
        })
    }

    /// Whether it has ended; an error unless it has tried inputs and none has failed.
    fn ended(&mut self) -> Result<Option<()>> {
        let Some(status) = self.child.try_wait()? else {
            if Instant::now() > self.deadline {
                bail!("it did not end in time, and was ended");
            }
            return Ok(None);
        };
        self.judge(status).map(Some)
    }

    fn judge(&self, status: ExitStatus) -> Result<()> {
        if !status.success() {
            bail!("{status}");
        }
        let log = fs::read_to_string(&self.log)?;
        let runs = executed(&log).context("it does not say how many inputs it tried")?;
        if runs == 0 {
            bail!("it tried no input");
        }
        eprintln!("{}: {runs} inputs, none failed", self.target);
        Ok(())
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // Ended already, unless it is late or another one could not be started.
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// Adds what covers more than the tree's corpus does.
fn keep(project: &Project, target: &str) -> Result<()> {
    let found = project.target.join("fuzz").join(target).join("corpus");
    let mut command = program(project, target);
    command
        .arg("-merge=1")
        .arg(kept(project, target))
        .arg(found);
    cmd::run(&mut command)
}

fn program(project: &Project, target: &str) -> Command {
    cmd::command(project.binaries(crate::project::Profile::Dev).join(target))
}

fn sources(project: &Project) -> PathBuf {
    project.root.join("tests/fuzz")
}

fn kept(project: &Project, target: &str) -> PathBuf {
    sources(project).join("corpus").join(target)
}

/// libFuzzer's own count.
fn executed(log: &str) -> Option<u64> {
    let line = log
        .lines()
        .find_map(|line| line.strip_prefix("stat::number_of_executed_units:"))?;
    line.trim().parse().ok()
}

fn tail(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(TAIL)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_count_is_read_from_the_final_statistics() {
        let log = "#2 INITED\nstat::number_of_executed_units: 1234\nstat::peak_rss_mb: 40\n";
        assert_eq!(executed(log), Some(1234));
        assert_eq!(executed("#2 INITED\n"), None);
    }

    #[test]
    fn a_target_that_is_not_there_is_named() {
        let project = Project::find();
        let error = select(&project, &["nonesuch".into()]).unwrap_err();
        assert!(error.to_string().contains("zds_frame"), "{error}");
    }
}
