//! `cargo xtask demo`: sets up what the demonstration needs and becomes it.

use std::os::unix::process::CommandExt as _;

use anyhow::{Context as _, Result};

use crate::{
    bins, host,
    project::{Profile, Project},
};

/// Options of `demo`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Handed to the demonstration as they are (`-- --help` lists them)
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

/// Runs the verb.
pub(crate) fn main(args: &Args) -> Result<()> {
    host::require_root("demo")?;
    let project = Project::find();
    host::ensure_packages(host::PROGRAMS, "the demonstration")?;
    bins::ensure(
        &project,
        Profile::Release,
        &["culvert", "ztunnel-standin", "culvert-demo"],
    )?;
    host::ensure_bpffs()?;
    // Becoming it, so that Ctrl-C reaches the program that cleans up, and nobody else.
    let error = bins::command(&project, Profile::Release, "culvert-demo")
        .args(&args.arguments)
        .exec();
    Err(error).context("cannot start culvert-demo")
}
