//! `cargo xtask bench`: sets up what the benchmarks need and becomes them.

use std::os::unix::process::CommandExt as _;

use anyhow::{Context as _, Result};

use crate::{
    bins, build, cluster, host, image,
    project::{Profile, Project},
};

const PLUGIN: &str = "culvert-cni";

/// Options of `bench`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Which benchmark, and its options (`datapath`, `dns`, `agent`, `cluster`; `bench agent --help` explains one, `bench -- --help` lists them)
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

/// Runs the verb.
pub(crate) fn main(args: &Args) -> Result<()> {
    host::require_root("bench")?;
    let project = Project::find();
    host::ensure_packages(host::PROGRAMS, "the benchmark")?;
    bins::ensure(
        &project,
        Profile::Release,
        &["culvert", "ztunnel-standin", "culvert-bench"],
    )?;
    host::ensure_bpffs()?;
    let mut bench = bins::command(&project, Profile::Release, "culvert-bench");
    let help = |word: &String| word == "--help" || word == "-h";
    let named = |what: &str| args.arguments.first().is_some_and(|name| name == what);
    if named("agent") {
        // As the image ships it: of a process that lives for a millisecond, loading libraries is a third.
        bins::ensure(&project, Profile::Static, &[PLUGIN])?;
        let plugin = project.binaries(Profile::Static).join(PLUGIN);
        bench.env("CULVERT_CNI_BIN", plugin);
    }
    if named("cluster") && !args.arguments.iter().any(help) {
        host::ensure_packages(host::CLUSTER, "the cluster")?;
        // With `culvert-pod`, which runs in its pods.
        build::binaries(&project, Profile::Release, &["culvert-cluster"])?;
        cluster::ensure_kubernetes(&project)?;
        bench.env("CULVERT_IMAGE", image::ensure(&project)?);
    }
    let error = bench.args(&args.arguments).exec();
    Err(error).context("cannot start culvert-bench")
}
