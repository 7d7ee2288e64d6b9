//! The programs that go into a guest: `culvert`, the stand-in ztunnel and the test binaries, built here without any
//! shared library, and Debian's static busybox. It does not know what is done with them.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::{
    cmd::{cargo, output},
    ebpf,
    host::{self, Package},
    project::{Project, static_triple},
};

/// QEMU and the userland of the guest.
const PACKAGES: [Package; 2] = [
    Package {
        name: "qemu-system-x86",
        proof: "qemu-system-x86_64",
    },
    Package {
        name: "busybox-static",
        proof: "busybox",
    },
];

/// Package, target and kind of what is built.
const BUILT: [(&str, &str, &str); 4] = [
    ("culvert", "culvert", "bin"),
    ("ztunnel-standin", "ztunnel-standin", "bin"),
    ("culvert-e2e", "vm", "test"),
    ("culvert-e2e", "dns", "test"),
];

/// Static executables.
#[derive(Debug)]
pub(super) struct Binaries {
    pub(super) busybox: PathBuf,
    pub(super) culvert: PathBuf,
    pub(super) standin: PathBuf,
    pub(super) tests: PathBuf,
    /// The tests of lookups, of which those that need no other program are run.
    pub(super) lookups: PathBuf,
}

/// Installs and builds what is missing.
pub(super) fn ensure(project: &Project) -> Result<Binaries> {
    if cfg!(not(target_arch = "x86_64")) {
        bail!("the guests are x86-64 and run the binaries built here: run this on x86-64");
    }
    host::ensure_packages(&PACKAGES, "booting older kernels")?;
    ebpf::ensure(project)?;
    let busybox = host::find_program("busybox").context("busybox is not on PATH")?;
    let mut built = build(project)?.into_iter();
    let mut next = || {
        built
            .next()
            .context("cargo built fewer programs than asked for")
    };
    let binaries = Binaries {
        busybox,
        culvert: next()?,
        standin: next()?,
        tests: next()?,
        lookups: next()?,
    };
    for file in [
        &binaries.busybox,
        &binaries.culvert,
        &binaries.standin,
        &binaries.tests,
        &binaries.lookups,
    ] {
        let content = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
        if !is_static(&content) {
            bail!(
                "{} needs shared libraries, which the guest does not have: for busybox, `apt-get install \
                 busybox-static`; for a program of ours, see that nothing overrides `-C target-feature=+crt-static`",
                file.display()
            );
        }
    }
    Ok(binaries)
}

/// One cargo run for all, so that their common dependencies are built once, with one set of features. The development
/// profile: what is tested here is kernels, and an optimised second build of everything would double the time.
fn build(project: &Project) -> Result<Vec<PathBuf>> {
    eprintln!("building static binaries for the guests");
    let mut command = cargo(project);
    command.args([
        "build",
        "--locked",
        "--message-format",
        "json-render-diagnostics",
    ]);
    command.args(["--target", &static_triple()]);
    for (package, target, kind) in BUILT {
        command.args(["--package", package, &format!("--{kind}"), target]);
    }
    command.env("RUSTFLAGS", "-C target-feature=+crt-static");
    command.env_remove("CARGO_ENCODED_RUSTFLAGS");
    let messages = output(command.stdin(Stdio::null()))?;
    BUILT
        .iter()
        .map(|(package, target, kind)| {
            executable(&messages, package, target, kind).with_context(|| {
                format!("cargo did not say where it put the {kind} {target} of {package}")
            })
        })
        .collect()
}

/// Finds the executable of a target in cargo's messages. Several packages may have a target of that name.
fn executable(messages: &str, package: &str, target: &str, kind: &str) -> Option<PathBuf> {
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| message["reason"] == "compiler-artifact")
        .filter(|message| {
            message["target"]["name"] == target && message["target"]["kind"][0] == kind
        })
        .filter(|message| {
            let id = message["package_id"].as_str();
            id.and_then(name_in_id) == Some(package)
        })
        .find_map(|message| Some(Path::new(message["executable"].as_str()?).to_owned()))
}

/// The package's name in a package ID specification: `..#NAME@VERSION`, or `..DIRECTORY#VERSION` where the directory has
/// the package's name.
fn name_in_id(id: &str) -> Option<&str> {
    let (url, fragment) = id.split_once('#')?;
    match fragment.split_once('@') {
        Some((name, _)) => Some(name),
        None => url.rsplit('/').next(),
    }
}

/// True for a 64-bit ELF file that asks for no dynamic loader.
fn is_static(elf: &[u8]) -> bool {
    const INTERPRETER: u64 = 3;
    let number = |at: usize, length: usize| {
        let bytes = elf.get(at..at + length)?;
        Some(
            bytes
                .iter()
                .rev()
                .fold(0, |sum, &byte| sum << 8 | u64::from(byte)),
        )
    };
    let asks_for_none = || {
        let table = usize::try_from(number(0x20, 8)?).ok()?;
        let entry_size = usize::try_from(number(0x36, 2)?).ok()?;
        let entries = usize::try_from(number(0x38, 2)?).ok()?;
        for entry in 0..entries {
            if number(table.checked_add(entry * entry_size)?, 4)? == INTERPRETER {
                return Some(false);
            }
        }
        Some(entries > 0)
    };
    elf.starts_with(b"\x7fELF\x02\x01") && asks_for_none().unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_executable_is_found_by_package_name_and_kind() {
        let artifact = |id: &str, name: &str, kind: &str, executable: Option<&str>| {
            let target = serde_json::json!({ "name": name, "kind": [kind] });
            serde_json::json!({ "reason": "compiler-artifact", "package_id": id, "target": target, "executable": executable })
                .to_string()
        };
        let messages = [
            artifact("path+file:///w/agent#culvert@0.1.0", "culvert", "lib", None),
            artifact(
                "path+file:///w/agent#culvert@0.1.0",
                "culvert",
                "bin",
                Some("/t/culvert"),
            ),
            "not json".to_owned(),
            artifact(
                "path+file:///w/standin#0.1.0",
                "dns",
                "test",
                Some("/t/dns-1"),
            ),
            artifact(
                "path+file:///w/e2e#culvert-e2e@0.1.0",
                "dns",
                "test",
                Some("/t/dns-2"),
            ),
        ]
        .join("\n");
        let found = |package, target, kind| executable(&messages, package, target, kind);
        let at = |path: &str| Some(Path::new(path).to_owned());
        assert_eq!(found("culvert", "culvert", "bin"), at("/t/culvert"));
        assert_eq!(found("standin", "dns", "test"), at("/t/dns-1"));
        assert_eq!(found("culvert-e2e", "dns", "test"), at("/t/dns-2"));
        assert_eq!(found("culvert-e2e", "dns", "bin"), None);
        assert_eq!(found("e2e", "dns", "test"), None);
    }

    #[test]
    fn a_dynamic_program_is_told_from_other_files() {
        // This test's own binary is linked against shared libraries.
        let own = fs::read(std::env::current_exe().unwrap()).unwrap();
        assert!(!is_static(&own));
        assert!(!is_static(b"#!/bin/sh\n"));
        assert!(!is_static(b"\x7fELF\x02\x01"));
    }

    #[test]
    fn a_program_without_loader_is_static() {
        let mut elf = vec![0; 0x40 + 56];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[0x20] = 0x40;
        elf[0x36] = 56;
        elf[0x38] = 1;
        elf[0x40] = 1;
        assert!(is_static(&elf));
        elf[0x40] = 3;
        assert!(!is_static(&elf));
    }
}
