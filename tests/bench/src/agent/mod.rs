//! The agent's own cost: what a new pod waits for, how fast a whole namespace comes and goes, what the agent occupies,
//! and what a day's pods leave behind. It puts the parts in order; each part measures one thing.

mod add;
mod batch;
mod churn;
mod flip;
mod footprint;
mod plugin;
mod results;
mod site;

#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use crate::{interrupt, machine, process};
use results::{Idle, Results};

/// Something of pods that are gone is still there.
const GROWN: u8 = 3;
/// A target was missed, and `--strict` asked.
const MISSED: u8 = 4;
/// After the last change: sysctls are read every 4 s, passes come every 5 s, idle threads end and freed
/// memory goes back after 10 s.
const CALM: Duration = Duration::from_secs(12);

const HELP: &str = "\
What is measured
  A lab of network namespaces with the real agent (`culvert agent --pods DIR`), the real plugin and the stand-in ztunnel,
  on this kernel, away from the machine's own network. 1,000 namespaces and 250 running pods are there all the time.
    flip   the pods' namespace gets the label istio.io/dataplane-mode=ambient and loses it: from the manifest's write
           (20 ms of which the agent waits for the directory to be quiet) until the agent reports all pods, which it is
           asked every 20 ms; then the kernel's map and ztunnel must agree
    idle   the agent's processor time while nothing changes, 250 pods enrolled
    add    ADD of new pods one after the other, from before the plugin's process is made until it has ended. ztunnel's
           part is from being told to its ack, as the agent says in its answer; all the rest is called ours. Before each
           a process of the plugin that asks nobody and a request to rtnetlink that changes nothing: what they take the
           machine takes
    churn  pods come and go, each new: its own object, network namespace, addresses, ADD and DEL. Compressed are the
           pauses, and 50 pods share a namespace object. RSS, descriptors, threads, pins and map entries before and after
  In every flip and every 50 pods added a connection between two pods must be counted by ztunnel, and must not be when
  they are not enrolled: else there is no result.

Reading it
  Targets are printed beside what was reached. Times are the machine's as well: other work on it shows first in p99.
  Results go to target/bench/agent.json too; progress goes to stderr, so `-o json | jq` works.
  The plugin is static, as the image ships it. For the agent too: `cargo xtask build --static`, then --binaries names
  its directory.

Exit code
  0  measured, whatever the numbers; 1 could not be measured (the error says what to do); 2 wrong usage;
  3  pods that are gone have left something; 4 a target was missed (only with --strict); 130 Ctrl-C, all removed

Examples
  cargo xtask bench agent --quick
  cargo xtask bench agent --only flip --flips 20
  cargo xtask bench agent --only churn --pods-churned 2000 -o json | jq .churn.grown";

/// Options of `bench agent`.
#[derive(Debug, Clone, clap::Args)]
#[command(after_long_help = HELP, after_help = "--help explains what is measured, and the exit code")]
pub(crate) struct Options {
    /// A short run, for a look whether everything works: 40 pods, 100 namespaces, few repetitions
    #[arg(long)]
    quick: bool,
    /// Only these parts
    #[arg(long, value_enum)]
    only: Vec<Part>,
    /// Pods that stay [default: 250, quick: 40]
    #[arg(long)]
    pods: Option<usize>,
    /// Namespaces beside theirs [default: 1000, quick: 100]
    #[arg(long)]
    namespaces: Option<usize>,
    /// How often their label comes and goes [default: 7, quick: 2]
    #[arg(long)]
    flips: Option<usize>,
    /// Pods of each kind to add [default: 400, quick: 50]
    #[arg(long)]
    adds: Option<usize>,
    /// Seconds in which nothing changes [default: 30, quick: 5]
    #[arg(long)]
    idle: Option<u64>,
    /// Pods that come and go [default: 20000, quick: 200]
    #[arg(long)]
    pods_churned: Option<usize>,
    /// Form of what goes to stdout
    #[arg(short, long, value_enum, default_value = "text")]
    output: Output,
    /// Where agent.json goes [default: `bench` in the build's target directory]
    #[arg(long)]
    to: Option<PathBuf>,
    /// Measure `culvert` and `culvert-cni` of this directory instead of a fresh release build
    #[arg(long, value_name = "DIR")]
    binaries: Option<PathBuf>,
    /// Fail when a target is missed
    #[arg(long)]
    strict: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// A namespace's label comes and goes; memory before and after
    Flip,
    /// Processor time while nothing changes
    Idle,
    /// The plugin's calls
    Add,
    /// A day's pods
    Churn,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Output {
    Text,
    Json,
}

impl Options {
    fn or<T>(&self, given: Option<T>, full: T, quick: T) -> T {
        given.unwrap_or(if self.quick { quick } else { full })
    }

    fn wants(&self, part: Part) -> bool {
        self.only.is_empty() || self.only.contains(&part)
    }
}

/// Runs it and prints.
pub(crate) fn main(options: &Options) -> Result<ExitCode> {
    if let Some(dir) = &options.binaries {
        return elsewhere(dir);
    }
    interrupt::listen()?;
    let results = match measure(options) {
        Err(_) if interrupt::asked() => return Ok(ExitCode::from(interrupt::EXIT)),
        results => results?,
    };
    match options.output {
        Output::Text => print!("{}", results.text()),
        Output::Json => println!("{:#}", results.json()),
    }
    let json = format!("{:#}\n", results.json());
    for path in crate::write(options.to.as_deref(), &[("agent.json", json)])? {
        eprintln!("wrote {}", path.display());
    }
    Ok(match (results.grown().is_empty(), results.missed()) {
        (false, _) => ExitCode::from(GROWN),
        (true, missed) if options.strict && missed > 0 => ExitCode::from(MISSED),
        _ => ExitCode::SUCCESS,
    })
}

fn measure(options: &Options) -> Result<Results> {
    let mut results = Results {
        how: how(options)?,
        ..Results::default()
    };
    let pods = options.or(options.pods, 250, 40).max(2);
    eprintln!("a node with {pods} pods ...");
    let site = site::Site::new(options.or(options.namespaces, 1000, 100).max(1))?;
    let shop = flip::Shop::new(&site, pods)?;
    if options.wants(Part::Flip) {
        let flips = options.or(options.flips, 7, 2).max(1);
        eprintln!("their namespace's label comes and goes ...");
        results.flips = Some(flip::measure(&site, &shop, flips)?);
    } else {
        shop.enrol(&site)?;
    }
    if options.wants(Part::Idle) {
        let seconds = options.or(options.idle, 30, 5).max(1);
        eprintln!("{seconds} s in which nothing changes ...");
        results.idle = Some(idle(&site, Duration::from_secs(seconds))?);
    }
    let plugin = plugin::Plugin::new(&site)?;
    if options.wants(Part::Add) {
        let adds = options.or(options.adds, 400, 50).max(2);
        eprintln!("{adds} pods of each kind are added ...");
        results.adds = Some(add::measure(&site, &plugin, adds, pods)?);
    }
    if options.wants(Part::Churn) {
        let count = options.or(options.pods_churned, 20_000, 200).max(1);
        eprintln!("{count} pods come and go ...");
        results.churn = Some(churn::measure(&site, &plugin, count, pods)?);
    }
    Ok(results)
}

fn idle(site: &site::Site, time: Duration) -> Result<Idle> {
    pause(CALM)?;
    let (started, before) = (Instant::now(), process::cpu(site.agent.pid())?);
    pause(time)?;
    let used = process::cpu(site.agent.pid())? - before;
    let seconds = started.elapsed().as_secs_f64();
    Ok(Idle {
        seconds,
        percent: used.as_secs_f64() / seconds * 100.0,
    })
}

fn pause(time: Duration) -> Result<()> {
    let started = Instant::now();
    while started.elapsed() < time {
        interrupt::check()?;
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn how(options: &Options) -> Result<String> {
    let binary = culvert_lab::culvert_binary()?;
    let size = std::fs::metadata(&binary).map_or(0, |data| data.len());
    Ok(format!(
        "{}; {} ({:.1} MiB)",
        machine::state(options.quick),
        binary.display(),
        size as f64 / f64::from(1 << 20),
    ))
}

/// Begins again with other binaries: whoever starts one finds them by the environment.
#[expect(
    clippy::disallowed_methods,
    reason = "the benchmark becomes itself, with another environment"
)]
fn elsewhere(dir: &std::path::Path) -> Result<ExitCode> {
    use std::os::unix::process::CommandExt as _;
    let dir = std::path::absolute(dir)?;
    for name in ["culvert", "culvert-cni"] {
        let path = dir.join(name);
        anyhow::ensure!(
            path.is_file(),
            "no {}: --binaries names a directory with both binaries, cargo xtask build makes them",
            path.display()
        );
    }
    let mut args: Vec<_> = std::env::args_os().skip(1).collect();
    // Out go the option and its value, in either form.
    if let Some(at) = args.iter().position(|a| a == "--binaries") {
        args.drain(at..(at + 2).min(args.len()));
    }
    args.retain(|a| !a.to_string_lossy().starts_with("--binaries="));
    let error = std::process::Command::new(std::env::current_exe()?)
        .args(args)
        .env("CULVERT_BIN", dir.join("culvert"))
        .env("CULVERT_CNI_BIN", dir.join("culvert-cni"))
        .exec();
    Err(error).context("starting again with other binaries")
}
