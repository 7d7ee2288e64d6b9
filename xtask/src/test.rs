//! `cargo xtask test`: the suites, what each needs, and one verdict over all of them. A suite that cannot run is a
//! failure, never a skip.

mod family;
mod record;
mod summary;

use std::{
    path::PathBuf,
    process::Command,
    time::{Instant, SystemTime},
};

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum as _;

pub(crate) use self::summary::Verdict;
use self::{record::Record, summary::Outcome};
use crate::{
    bins, cluster, cmd, ebpf, fuzz, host, image,
    project::{Profile, Project},
    vm,
};

/// The end-to-end tests mostly wait, for timeouts and for peers: more of them than processors run at once.
const E2E_THREADS: &str = "6";

/// Packages whose tests make network namespaces: they belong to the suite that has root.
const PRIVILEGED: [&str; 5] = [
    "culvert-bench",
    "culvert-e2e",
    "culvert-kube-tests",
    "culvert-lab",
    "ztunnel-standin",
];

/// Packages whose tests stand on a whole Kubernetes.
const ON_A_CLUSTER: [&str; 1] = ["culvert-cluster"];

/// Clusters of their own that tests may have side by side: each is a dozen servers.
const CLUSTER_THREADS: &str = "2";

/// A set of tests with the same needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Suite {
    /// Decisions, plans, parsers, tools: needs nothing
    Unit,
    /// Each fuzz target for half a minute; `cargo xtask fuzz` has more to choose: needs a C++ compiler
    Fuzz,
    /// Real programs in network namespaces of this machine: needs root
    #[value(alias = "netns")]
    E2e,
    /// A real Kubernetes on this machine: needs root
    Cluster,
    /// The same programs on older kernels, in emulated machines
    Vm,
}

impl Suite {
    const fn name(self) -> &'static str {
        match self {
            Self::Unit => "unit",
            Self::Fuzz => "fuzz",
            Self::E2e => "e2e",
            Self::Cluster => "cluster",
            Self::Vm => "vm",
        }
    }
}

/// Options of `test`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Which suite: `unit`, `fuzz`, `e2e` (or `netns`), `cluster`, `vm`; all of them if left out. Any other word is a name,
    /// looked for in the first four
    #[arg(value_name = "SUITE|NAME")]
    what: Option<String>,
    /// Run only tests whose name contains one of these; `--exact`, `--nocapture` and, for `vm`, its own options
    /// (`test vm -- --help`) go here too
    #[arg(requires = "what", trailing_var_arg = true, allow_hyphen_values = true)]
    filter: Vec<String>,
}

/// Suites and filter, as they were asked for.
fn chosen(args: &Args) -> (Vec<Suite>, Vec<String>) {
    let mut filter = args.filter.clone();
    let Some(what) = &args.what else {
        return (Suite::value_variants().to_vec(), filter);
    };
    if let Ok(suite) = Suite::from_str(what, true) {
        return (vec![suite], filter);
    }
    // The guests' tests have names of their own, and booting is long.
    let mut suites = Suite::value_variants().to_vec();
    suites.retain(|suite| *suite != Suite::Vm);
    filter.insert(0, what.clone());
    (suites, filter)
}

/// Runs the verb.
pub(crate) fn main(args: &Args) -> Result<()> {
    let (suites, filter) = chosen(args);
    if suites.contains(&Suite::E2e) || suites.contains(&Suite::Cluster) {
        // Known beforehand, so said beforehand.
        host::require_root("test")?;
    }
    let project = Project::find();
    let mut outcomes = Vec::new();
    for suite in suites {
        outcomes.push(outcome(&project, suite, &filter)?);
    }
    println!("\n{}", summary::text(&outcomes));
    let failed: Vec<_> = outcomes
        .iter()
        .filter(|outcome| outcome.verdict == Verdict::Failed)
        .map(|outcome| outcome.name)
        .collect();
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    // A filter that matches nothing would pass without having tested anything.
    if outcomes.iter().all(|one| one.verdict == Verdict::NoMatch) {
        bail!(
            "no test matches `{}`; the suites are unit, fuzz, e2e (netns), cluster, vm",
            filter.join(" ")
        );
    }
    Ok(())
}

/// Runs one suite.
fn outcome(project: &Project, suite: Suite, filter: &[String]) -> Result<Outcome> {
    eprintln!("== {suite:?}");
    let (started, since) = (Instant::now(), SystemTime::now());
    let log = project.target.join(format!("test/{}.log", suite.name()));
    let mut record = Record::begin(&log)?;
    let result = match suite {
        Suite::Unit => unit(project, filter, &mut record),
        Suite::Fuzz => fuzz::run(project, filter),
        Suite::E2e => e2e(project, filter, &mut record),
        Suite::Cluster => on_a_cluster(project, filter, &mut record),
        Suite::Vm => vm::run(filter).map(|()| Verdict::Passed),
    };
    let verdict = result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        Verdict::Failed
    });
    let logs = match suite {
        Suite::Fuzz => project.target.join("fuzz"),
        Suite::Vm => project.target.join("vm"),
        Suite::Unit | Suite::E2e | Suite::Cluster => record.path,
    };
    let kept = match suite {
        Suite::E2e | Suite::Cluster => summary::made_since(&kept(project), since),
        Suite::Unit | Suite::Fuzz | Suite::Vm => Vec::new(),
    };
    Ok(Outcome {
        name: suite.name(),
        verdict,
        took: started.elapsed(),
        tally: record.tally,
        logs,
        kept,
    })
}

/// Where tests on a cluster leave what is to be known about their failure.
fn kept(project: &Project) -> PathBuf {
    project.target.join("cluster/failed")
}

fn unit(project: &Project, filter: &[String], record: &mut Record) -> Result<Verdict> {
    ebpf::ensure(project)?;
    let workspace = || {
        let mut command = cmd::cargo(project);
        command.args(["test", "--locked", "--no-fail-fast", "--workspace"]);
        for package in PRIVILEGED.iter().chain(&ON_A_CLUSTER) {
            command.args(["--exclude", package]);
        }
        command
    };
    // The decisions of the eBPF programs are plain functions: they are tested here, by this host's compiler.
    let programs = || {
        let mut command = ebpf::host_cargo(project, "test");
        command.arg("--lib");
        command
    };
    if !any_match(&mut [workspace(), programs()], filter)? {
        return Ok(Verdict::NoMatch);
    }
    let workspace = record.run(workspace().arg("--").args(filter));
    let programs = record.run(programs().arg("--").args(filter));
    workspace.and(programs)?;
    Ok(Verdict::Passed)
}

fn e2e(project: &Project, filter: &[String], record: &mut Record) -> Result<Verdict> {
    let tests = || {
        let mut command = cmd::cargo(project);
        command.args(["test", "--locked", "--no-fail-fast"]);
        for package in PRIVILEGED {
            command.args(["--package", package]);
        }
        bins::locate(&mut command, project, Profile::Dev);
        command
    };
    ebpf::ensure(project)?;
    if !any_match(&mut [tests()], filter)? {
        return Ok(Verdict::NoMatch);
    }
    host::ensure_packages(host::PROGRAMS, "the end-to-end tests")?;
    let binaries = ["culvert", "culvert-cni", "ztunnel-standin"];
    bins::ensure(project, Profile::Dev, &binaries)?;
    host::ensure_bpffs()?;
    cluster::ensure_control_plane(project)?;
    record
        .run(
            tests()
                .args(["--", "--test-threads", E2E_THREADS])
                .args(filter),
        )
        .context("end-to-end tests failed; each prints how to look into its namespaces")?;
    Ok(Verdict::Passed)
}

fn on_a_cluster(project: &Project, filter: &[String], record: &mut Record) -> Result<Verdict> {
    let tests = || {
        let mut command = cmd::cargo(project);
        command.args(["test", "--locked", "--no-fail-fast"]);
        for package in ON_A_CLUSTER {
            command.args(["--package", package]);
        }
        bins::locate(&mut command, project, Profile::Dev);
        command
    };
    ebpf::ensure(project)?;
    if !any_match(&mut [tests()], filter)? {
        return Ok(Verdict::NoMatch);
    }
    host::ensure_packages(host::PROGRAMS, "the tests")?;
    host::ensure_packages(host::CLUSTER, "the cluster")?;
    host::ensure_packages(host::CILIUM, "Cilium")?;
    let binaries = ["culvert", "culvert-cni", "ztunnel-standin"];
    bins::ensure(project, Profile::Dev, &binaries)?;
    let image = image::ensure(project)?;
    cluster::ensure(project)?;
    record
        .run(
            tests()
                .env("CULVERT_IMAGE", &image)
                .args(["--", "--test-threads", CLUSTER_THREADS])
                .args(filter),
        )
        .with_context(|| {
            format!(
                "tests on a cluster failed; logs and `kubectl describe` are in {}",
                kept(project).display()
            )
        })?;
    Ok(Verdict::Passed)
}

/// Whether a filter, if there is one, fits any test.
fn any_match(commands: &mut [Command], filter: &[String]) -> Result<bool> {
    if filter.is_empty() {
        return Ok(true);
    }
    let mut found = 0;
    for command in commands {
        found += listed(&cmd::output(command.args(["--", "--list"]).args(filter))?);
    }
    Ok(found > 0)
}

/// How many tests a `--list` names.
fn listed(list: &str) -> usize {
    list.lines().filter(|line| line.ends_with(": test")).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choice(words: &[&str]) -> (Vec<Suite>, Vec<String>) {
        let (what, filter) = match words.split_first() {
            Some((what, filter)) => (Some((*what).to_owned()), filter),
            None => (None, &[][..]),
        };
        let filter = filter.iter().map(|word| (*word).to_owned()).collect();
        chosen(&Args { what, filter })
    }

    #[test]
    fn a_suite_has_its_name_and_every_other_word_is_a_filter() {
        assert_eq!(choice(&[]).0.len(), 5);
        assert_eq!(choice(&["netns"]), (vec![Suite::E2e], Vec::new()));
        assert_eq!(
            choice(&["cluster", "probes"]),
            (vec![Suite::Cluster], vec!["probes".to_owned()])
        );
        let (suites, filter) = choice(&["probes", "--nocapture"]);
        assert_eq!(
            suites,
            [Suite::Unit, Suite::Fuzz, Suite::E2e, Suite::Cluster]
        );
        assert_eq!(filter, ["probes", "--nocapture"]);
        for suite in Suite::value_variants() {
            assert_eq!(choice(&[suite.name()]).0, [*suite]);
        }
    }

    #[test]
    fn tests_are_counted_in_the_list_of_libtest() {
        assert_eq!(
            listed("a::b: test\nc: test\nd: benchmark\n\n2 tests, 1 benchmark\n"),
            2
        );
        assert_eq!(listed("\n0 tests, 0 benchmarks\n"), 0);
    }
}
