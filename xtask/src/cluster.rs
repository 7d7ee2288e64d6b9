//! `cargo xtask cluster`: sees to packages and to the binary that does the work, and becomes it.

use std::os::unix::process::CommandExt as _;

use anyhow::{Context as _, Result};

use crate::{
    build, cmd, host,
    project::{Profile, Project},
};

/// Options of `cluster`.
#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Args {
    /// `cargo xtask cluster help` lists them
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "VERB"
    )]
    arguments: Vec<String>,
}

/// Runs the verb.
pub(crate) fn main(args: &Args) -> Result<()> {
    let project = Project::find();
    let needs_machine = args
        .arguments
        .first()
        .is_some_and(|verb| !matches!(verb.as_str(), "build" | "help" | "--help" | "-h"));
    if needs_machine {
        host::require_root("cluster")?;
        host::ensure_packages(host::CLUSTER, "the cluster")?;
        if args.arguments.iter().any(|word| word.contains("cilium")) {
            host::ensure_packages(host::CILIUM, "Cilium")?;
        }
    }
    // Becoming it, so that Ctrl-C reaches the program that cleans up, and nobody else.
    let error = command(&project)?.args(&args.arguments).exec();
    Err(error).context("cannot start culvert-cluster")
}

/// Builds what the API server alone needs: tests talk to it without a cluster.
pub(crate) fn ensure_control_plane(project: &Project) -> Result<()> {
    cmd::run(command(project)?.args(["build", "--control-plane"]))
}

/// Builds what a cluster with the bridge network consists of.
pub(crate) fn ensure_kubernetes(project: &Project) -> Result<()> {
    cmd::run(command(project)?.arg("build"))
}

/// Builds all that clusters consist of, Cilium and the newest container runtime too.
pub(crate) fn ensure(project: &Project) -> Result<()> {
    cmd::run(command(project)?.args(["build", "--cilium", "--newest"]))
}

fn command(project: &Project) -> Result<std::process::Command> {
    build::binaries(project, Profile::Dev, &["culvert-cluster"])?;
    let mut command = cmd::command(project.binaries(Profile::Dev).join("culvert-cluster"));
    command.env("CULVERT_TARGET_DIR", &project.target);
    Ok(command)
}
