//! `cargo xtask lint`: every check that needs no running system. All of them run; the verdict comes at the end.

mod aarch64;
mod files;
mod licences;

use std::process::Command;

use anyhow::{Result, bail};

use crate::{cmd, ebpf, project::Project, toolchain::Toolchain};

/// One check: what it is called, and how it is run.
type Check<'a> = (&'static str, Box<dyn Fn() -> Result<()> + 'a>);

/// Runs the verb.
pub(crate) fn main() -> Result<()> {
    let project = Project::find();
    // The agent does not compile without it.
    ebpf::ensure(&project)?;
    let toolchain = Toolchain::ensure(&project)?;
    let project = &project;
    let checks: [Check<'_>; 9] = [
        ("files", Box::new(|| files::check(project))),
        ("licences", Box::new(|| licences::check(project))),
        // `--all` takes in the eBPF package, which is a path dependency of the agent.
        (
            "format",
            Box::new(|| cmd::run(cmd::cargo(project).args(["fmt", "--all", "--check"]))),
        ),
        ("clippy", Box::new(|| cmd::run(&mut clippy(project)))),
        (
            "clippy, ebpf on the host",
            Box::new(|| cmd::run(&mut ebpf_clippy(project))),
        ),
        (
            "clippy, ebpf programs",
            Box::new(|| cmd::run(&mut toolchain.clippy(project)?)),
        ),
        ("aarch64", Box::new(|| aarch64::check(project))),
        ("documentation", Box::new(|| cmd::run(&mut doc(project)))),
        (
            "documentation, ebpf",
            Box::new(|| cmd::run(&mut ebpf_doc(project))),
        ),
    ];
    let mut failed = Vec::new();
    for (name, check) in checks {
        eprintln!("== {name}");
        if let Err(error) = check() {
            eprintln!("error: {error:#}");
            failed.push(name);
        }
    }
    if !failed.is_empty() {
        bail!("failed: {}", failed.join("; "));
    }
    println!("lint: all clean");
    Ok(())
}

fn clippy(project: &Project) -> Command {
    let mut command = cmd::cargo(project);
    command.args([
        "clippy",
        "--locked",
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ]);
    command
}

fn ebpf_clippy(project: &Project) -> Command {
    let mut command = ebpf::host_cargo(project, "clippy");
    command.args(["--lib", "--tests", "--", "-D", "warnings"]);
    command
}

fn doc(project: &Project) -> Command {
    let mut command = cmd::cargo(project);
    command.args([
        "doc",
        "--locked",
        "--workspace",
        "--no-deps",
        "--document-private-items",
    ]);
    command.env("RUSTDOCFLAGS", "-D warnings");
    command
}

fn ebpf_doc(project: &Project) -> Command {
    let mut command = ebpf::host_cargo(project, "doc");
    command.args(["--lib", "--no-deps", "--document-private-items"]);
    command.env("RUSTDOCFLAGS", "-D warnings");
    command
}
