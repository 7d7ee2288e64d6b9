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

/// No shared library, and nothing that tells, or depends on, where it was built.
pub(crate) fn static_flags(project: &Project) -> Vec<String> {
    let mut flags = vec![
        "-Ctarget-feature=+crt-static".to_owned(),
        // A build id is a hash over debug information too, which the image leaves out.
        "-Clink-arg=-Wl,--build-id=none".to_owned(),
    ];
    flags.extend(project.remap_flags());
    flags
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
            command.env(
                "CARGO_ENCODED_RUSTFLAGS",
                static_flags(project).join("\u{1f}"),
            );
            command.env_remove("RUSTFLAGS");
        }
    }
    run(&mut command)
}
