//! `cargo xtask test`: the suites, what each needs, and one verdict over all of them. A suite that cannot run is a
//! failure, never a skip.

use std::process::Command;

use anyhow::{Context as _, Result, bail};

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
    E2e,
    /// A real Kubernetes on this machine: needs root
    Cluster,
    /// The same programs on older kernels, in emulated machines
    Vm,
}

/// Options of `test`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Which suite; all of them if left out
    suite: Option<Suite>,
    /// Run only tests whose name contains one of these; `--exact`, `--nocapture` and, for `vm`, its own options
    /// (`test vm -- --help`) go here too
    #[arg(
        requires = "suite",
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    filter: Vec<String>,
}

/// Runs the verb.
pub(crate) fn main(args: &Args) -> Result<()> {
    let suites = match args.suite {
        Some(suite) => vec![suite],
        None => vec![
            Suite::Unit,
            Suite::Fuzz,
            Suite::E2e,
            Suite::Cluster,
            Suite::Vm,
        ],
    };
    if suites.contains(&Suite::E2e) || suites.contains(&Suite::Cluster) {
        // Known beforehand, so said beforehand.
        host::require_root("test")?;
    }
    let project = Project::find();
    let mut failed = Vec::new();
    for suite in suites {
        eprintln!("== {suite:?}");
        let result = match suite {
            Suite::Unit => unit(&project, &args.filter),
            Suite::Fuzz => fuzz::run(&project, &args.filter),
            Suite::E2e => e2e(&project, &args.filter),
            Suite::Cluster => on_a_cluster(&project, &args.filter),
            Suite::Vm => vm::run(&args.filter),
        };
        if let Err(error) = result {
            eprintln!("error: {error:#}");
            failed.push(format!("{suite:?}"));
        }
    }
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    Ok(())
}

fn unit(project: &Project, filter: &[String]) -> Result<()> {
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
    require_match(&mut [workspace(), programs()], filter)?;
    let workspace = cmd::run(workspace().arg("--").args(filter));
    let programs = cmd::run(programs().arg("--").args(filter));
    workspace.and(programs)
}

fn e2e(project: &Project, filter: &[String]) -> Result<()> {
    host::ensure_packages(host::PROGRAMS, "the end-to-end tests")?;
    let binaries = ["culvert", "culvert-cni", "ztunnel-standin"];
    bins::ensure(project, Profile::Dev, &binaries)?;
    host::ensure_bpffs()?;
    cluster::ensure_control_plane(project)?;
    let tests = || {
        let mut command = cmd::cargo(project);
        command.args(["test", "--locked", "--no-fail-fast"]);
        for package in PRIVILEGED {
            command.args(["--package", package]);
        }
        bins::locate(&mut command, project, Profile::Dev);
        command
    };
    require_match(&mut [tests()], filter)?;
    cmd::run(
        tests()
            .args(["--", "--test-threads", E2E_THREADS])
            .args(filter),
    )
    .context("end-to-end tests failed; each prints how to look into its namespaces")
}

fn on_a_cluster(project: &Project, filter: &[String]) -> Result<()> {
    host::ensure_packages(host::PROGRAMS, "the tests")?;
    host::ensure_packages(host::CLUSTER, "the cluster")?;
    host::ensure_packages(host::CILIUM, "Cilium")?;
    bins::ensure(project, Profile::Dev, &["culvert", "ztunnel-standin"])?;
    let image = image::ensure(project)?;
    cluster::ensure(project)?;
    let tests = || {
        let mut command = cmd::cargo(project);
        command.args(["test", "--locked", "--no-fail-fast"]);
        for package in ON_A_CLUSTER {
            command.args(["--package", package]);
        }
        command.env("CULVERT_IMAGE", &image);
        bins::locate(&mut command, project, Profile::Dev);
        command
    };
    require_match(&mut [tests()], filter)?;
    cmd::run(
        tests()
            .args(["--", "--test-threads", CLUSTER_THREADS])
            .args(filter),
    )
    .with_context(|| {
        format!(
            "tests on a cluster failed; logs and `kubectl describe` are in {}/cluster/failed",
            project.target.display()
        )
    })
}

/// A filter that matches nothing would pass without having tested anything.
fn require_match(commands: &mut [Command], filter: &[String]) -> Result<()> {
    if filter.is_empty() {
        return Ok(());
    }
    let mut found = 0;
    for command in commands {
        found += listed(&cmd::output(command.args(["--", "--list"]).args(filter))?);
    }
    if found == 0 {
        bail!("no test matches `{}`", filter.join(" "));
    }
    Ok(())
}

/// How many tests a `--list` names.
fn listed(list: &str) -> usize {
    list.lines().filter(|line| line.ends_with(": test")).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_are_counted_in_the_list_of_libtest() {
        assert_eq!(
            listed("a::b: test\nc: test\nd: benchmark\n\n2 tests, 1 benchmark\n"),
            2
        );
        assert_eq!(listed("\n0 tests, 0 benchmarks\n"), 0);
    }
}
