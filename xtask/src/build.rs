//! `cargo xtask build`: the eBPF object first, then the binaries that embed or use it.

use anyhow::Result;

use crate::{
    cmd::{cargo, run},
    ebpf,
    project::{Profile, Project, static_triple},
};

/// Packages with a binary.
pub(crate) const BINARIES: [&str; 5] = [
    "culvert",
    "culvert-cni",
    "ztunnel-standin",
    "culvert-demo",
    "culvert-bench",
];

/// Options of `build`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Build with optimisation
    #[arg(long)]
    release: bool,
    /// Build fully static binaries (optimised, into target/ARCH-unknown-linux-gnu/release)
    #[arg(long = "static")]
    fully_static: bool,
    /// Build the eBPF object alone
    #[arg(long, conflicts_with_all = ["release", "fully_static"])]
    ebpf_only: bool,
}

/// Runs the verb.
pub(crate) fn main(args: &Args) -> Result<()> {
    let project = Project::find();
    ebpf::ensure(&project)?;
    if args.ebpf_only {
        return Ok(());
    }
    let profile = match (args.fully_static, args.release) {
        (true, _) => Profile::Static,
        (false, true) => Profile::Release,
        (false, false) => Profile::Dev,
    };
    binaries(&project, profile, &BINARIES)?;
    println!("binaries in {}", project.binaries(profile).display());
    Ok(())
}

/// Builds the binaries of some packages. The eBPF object has to be there.
pub(crate) fn binaries(project: &Project, profile: Profile, packages: &[&str]) -> Result<()> {
    let mut command = cargo(project);
    command.args(["build", "--locked"]);
    for package in packages {
        command.args(["--package", package]);
    }
    match profile {
        Profile::Dev => {}
        Profile::Release => {
            command.arg("--release");
        }
        Profile::Static => {
            command.args(["--release", "--target", &static_triple()]);
            command.env("RUSTFLAGS", "-C target-feature=+crt-static");
            command.env_remove("CARGO_ENCODED_RUSTFLAGS");
        }
    }
    run(&mut command)
}
