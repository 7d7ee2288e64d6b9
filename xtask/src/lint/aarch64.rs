//! Whether what is shipped compiles for the other architecture that nodes have. It builds nothing that runs.

use anyhow::{Context as _, Result};

use crate::{
    cmd,
    host::{self, Package},
    project::Project,
};

const TARGET: &str = "aarch64-unknown-linux-gnu";
/// What the image holds.
const SHIPPED: [&str; 2] = ["culvert", "culvert-cni"];
/// A dependency compiles C and assembly even when it is only checked.
const COMPILER: &[Package] = &[
    Package {
        name: "gcc-aarch64-linux-gnu",
        proof: "aarch64-linux-gnu-gcc",
    },
    Package {
        name: "libc6-dev-arm64-cross",
        proof: "/usr/aarch64-linux-gnu/include/stdint.h",
    },
];

/// Checks the shipped packages.
pub(super) fn check(project: &Project) -> Result<()> {
    // There, clippy has seen all of it.
    if std::env::consts::ARCH == "aarch64" {
        return Ok(());
    }
    host::ensure_packages(COMPILER, "the check for aarch64")?;
    ensure_target(project)?;
    let mut command = cmd::cargo(project);
    command.args(["check", "--locked", "--target", TARGET]);
    for package in SHIPPED {
        command.args(["--package", package]);
    }
    command.env("CC_aarch64_unknown_linux_gnu", "aarch64-linux-gnu-gcc");
    cmd::run(&mut command)
}

/// The standard library for it, of the compiler in use.
fn ensure_target(project: &Project) -> Result<()> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let mut ask = cmd::command(rustc);
    ask.current_dir(&project.root)
        .args(["--print", "target-libdir", "--target", TARGET]);
    let dir = cmd::output(&mut ask)?;
    if std::path::Path::new(dir.trim()).is_dir() {
        return Ok(());
    }
    let mut add = cmd::command("rustup");
    add.current_dir(&project.root)
        .args(["target", "add", TARGET]);
    cmd::announced(&mut add).with_context(|| {
        format!(
            "there is no standard library in {}: install Rust's for {TARGET}",
            dir.trim()
        )
    })
}
