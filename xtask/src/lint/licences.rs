//! Whether the licence of every dependency, of the workspace and of the eBPF programs, is one we can ship with. It reads
//! `cargo metadata` and the lock files; it does not read licence texts.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::{cmd, ebpf, project::Project};

/// Permissive licences (SPDX names) that ask for no more than a notice.
const ALLOWED: [&str; 13] = [
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    // Data only: Mozilla's certificates.
    "CDLA-Permissive-2.0",
    "ISC",
    "MIT",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Checks both lock files.
pub(super) fn check(project: &Project) -> Result<()> {
    let host = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let mut findings = BTreeSet::new();
    let mut workspace = cmd::cargo(project);
    workspace.arg("metadata");
    let programs = ebpf::host_cargo(project, "metadata");
    for (mut command, platform) in [(workspace, host.as_str()), (programs, "bpfel-unknown-none")] {
        // Only what this platform uses: cargo would have to fetch the rest to know its licence.
        command.args([
            "--locked",
            "--format-version",
            "1",
            "--filter-platform",
            platform,
        ]);
        let metadata: Value = serde_json::from_str(&cmd::output(&mut command)?)
            .context("cargo metadata is not JSON")?;
        findings.extend(judge(&metadata)?);
    }
    if !findings.is_empty() {
        let findings: Vec<_> = findings.into_iter().collect();
        bail!(
            "licences outside the list in xtask/src/lint/licences.rs (replace the dependency, or argue for the licence \
             there):\n  {}",
            findings.join("\n  ")
        );
    }
    Ok(())
}

/// The packages of one graph that we must not ship, with their licences.
fn judge(metadata: &Value) -> Result<Vec<String>> {
    let packages = metadata["packages"]
        .as_array()
        .context("cargo metadata lists no packages")?;
    let mut findings = Vec::new();
    for package in packages {
        let field = |name: &str| package[name].as_str().unwrap_or("(none)");
        let licence = field("license");
        if !is_allowed(licence) {
            findings.push(format!("{} {}: {licence}", field("name"), field("version")));
        }
    }
    Ok(findings)
}

/// Evaluates an SPDX expression: `OR` needs one side, `AND` both. What does not parse is not allowed.
fn is_allowed(expression: &str) -> bool {
    // "MIT/Apache-2.0" is how crates wrote OR before there was SPDX.
    let spaced = expression
        .replace('/', " OR ")
        .replace('(', " ( ")
        .replace(')', " ) ");
    let mut words: Vec<_> = spaced.split_whitespace().rev().collect();
    either(&mut words) == Some(true) && words.is_empty()
}

fn either(words: &mut Vec<&str>) -> Option<bool> {
    let mut allowed = both(words)?;
    while words.pop_if(|word| *word == "OR").is_some() {
        allowed |= both(words)?;
    }
    Some(allowed)
}

fn both(words: &mut Vec<&str>) -> Option<bool> {
    let mut allowed = one(words)?;
    while words.pop_if(|word| *word == "AND").is_some() {
        allowed &= one(words)?;
    }
    Some(allowed)
}

fn one(words: &mut Vec<&str>) -> Option<bool> {
    let word = words.pop()?;
    if word == "(" {
        let allowed = either(words)?;
        return (words.pop()? == ")").then_some(allowed);
    }
    let mut name = word.to_owned();
    if words.pop_if(|word| *word == "WITH").is_some() {
        name = format!("{name} WITH {}", words.pop()?);
    }
    Some(ALLOWED.contains(&name.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permissive_licences_pass() {
        for licence in [
            "MIT",
            "MIT OR Apache-2.0",
            "MIT/Apache-2.0",
            "GPL-2.0-only OR BSD-2-Clause",
            "(MIT OR Apache-2.0) AND Unicode-3.0",
            "Apache-2.0 AND ISC",
            "Apache-2.0 WITH LLVM-exception OR Apache-2.0 OR MIT",
            "MIT OR GPL-3.0 AND ISC",
        ] {
            assert!(is_allowed(licence), "{licence}");
        }
    }

    #[test]
    fn others_and_nonsense_do_not() {
        for licence in [
            "",
            "(none)",
            "GPL-3.0-only",
            "MIT AND GPL-3.0-only",
            "(MIT OR ISC) AND MPL-2.0",
            "Apache-2.0 WITH Classpath-exception-2.0",
            "MIT OR",
            "(MIT",
            "MIT ISC",
        ] {
            assert!(!is_allowed(licence), "{licence}");
        }
    }

    #[test]
    fn names_the_package() {
        let metadata = serde_json::json!({"packages": [
            {"name": "good", "version": "1.0.0", "license": "MIT"},
            {"name": "bad", "version": "2.0.0", "license": "AGPL-3.0"},
            {"name": "worse", "version": "3.0.0", "license": null},
        ]});
        assert_eq!(
            judge(&metadata).unwrap(),
            ["bad 2.0.0: AGPL-3.0", "worse 3.0.0: (none)"]
        );
        assert!(judge(&serde_json::json!({})).is_err());
    }
}
