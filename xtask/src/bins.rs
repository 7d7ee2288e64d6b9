//! The binaries that other verbs run: brought up to date, with the environment they read. It knows no verb.

use std::{path::Path, process::Command};

use anyhow::Result;

use crate::{
    build, cmd, ebpf,
    project::{Profile, Project},
};

/// Builds the object and the binaries of some packages.
pub(crate) fn ensure(project: &Project, profile: Profile, packages: &[&str]) -> Result<()> {
    ebpf::ensure(project)?;
    build::binaries(project, profile, packages)
}

/// A command for one of our binaries.
pub(crate) fn command(project: &Project, profile: Profile, name: &str) -> Command {
    let mut command = cmd::command(project.binaries(profile).join(name));
    locate(&mut command, project, profile);
    command
}

/// Tells a program where our binaries are, by the variables that tests, demo and benchmarks read.
pub(crate) fn locate(command: &mut Command, project: &Project, profile: Profile) {
    let dir = project.binaries(profile);
    let place = |name: &str| -> Box<Path> { dir.join(name).into() };
    command
        .env("CULVERT_BIN", &*place("culvert"))
        .env("CULVERT_CNI_BIN", &*place("culvert-cni"))
        .env("ZTUNNEL_STANDIN_BIN", &*place("ztunnel-standin"))
        .env("CULVERT_TARGET_DIR", &project.target);
}
