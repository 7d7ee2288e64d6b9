//! House rules on files that no compiler checks: a paragraph on top, a bound on length, inherited lints, no binaries.
//! It looks at what git would commit and judges; it changes nothing.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, bail};

use crate::{cmd, project::Project};

/// Above this a file holds more than one concept.
const MAX_LINES: usize = 600;

/// Checks every file that git knows or would add.
pub(super) fn check(project: &Project) -> Result<()> {
    let mut command = cmd::command("git");
    command.current_dir(&project.root).args([
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]);
    let mut findings = Vec::new();
    for name in cmd::output(&mut command)?.split_terminator('\0') {
        let path = project.root.join(name);
        // A file that was removed but not yet committed is still listed.
        if !path.is_file() {
            continue;
        }
        let content = fs::read(&path).with_context(|| format!("cannot read {name}"))?;
        match String::from_utf8(content) {
            Ok(text) if !text.contains('\0') => findings.extend(judge(Path::new(name), &text)),
            // What a fuzzer has found is made from nothing else.
            _ if name.starts_with("tests/fuzz/corpus/") => {}
            _ => findings.push(format!(
                "{name}: a binary file; keep what it is made from instead"
            )),
        }
    }
    if !findings.is_empty() {
        bail!("house rules:\n  {}", findings.join("\n  "));
    }
    Ok(())
}

/// What is wrong with one text file.
fn judge(path: &Path, text: &str) -> Vec<String> {
    let name = path.display();
    let mut findings = Vec::new();
    if path.extension().is_some_and(|extension| extension == "rs") {
        if !text.starts_with("//! ") {
            findings.push(format!(
                "{name}: begin it with a `//!` paragraph: what it owns and what it must not do"
            ));
        }
        let lines = lines_of_code(text);
        if lines > MAX_LINES && !is_test(path) {
            findings.push(format!(
                "{name}: {lines} lines (at most {MAX_LINES}): one file, one concept"
            ));
        }
    }
    let is_package =
        path.file_name().is_some_and(|name| name == "Cargo.toml") && text.contains("[package]");
    // The eBPF package is no member of the workspace and keeps a table of its own.
    if is_package && !text.contains("[lints]\nworkspace = true") && !text.contains("[lints.") {
        findings.push(format!(
            "{name}: no lints; add `[lints]` with `workspace = true`"
        ));
    }
    findings
}

/// Lines up to the file's own unit tests.
fn lines_of_code(text: &str) -> usize {
    text.lines()
        .take_while(|line| *line != "#[cfg(test)]")
        .count()
}

/// Test code may be long: a table of cases is one concept.
fn is_test(path: &Path) -> bool {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    path.starts_with("tests/e2e/tests") || stem == "tests" || stem.ends_with("_tests")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(path: &str, text: &str) -> usize {
        judge(Path::new(path), text).len()
    }

    #[test]
    fn a_source_file_begins_with_its_paragraph() {
        assert_eq!(findings("agent/src/a.rs", "//! Owns a.\n"), 0);
        assert_eq!(findings("agent/src/a.rs", "// Owns a.\n"), 1);
        assert_eq!(findings("agent/src/a.rs", "use b;\n//! Owns a.\n"), 1);
        assert_eq!(findings("README.md", "# Culvert\n"), 0);
    }

    #[test]
    fn long_files_are_found_but_their_tests_do_not_count() {
        let code = format!("//! Long.\n{}", "x\n".repeat(MAX_LINES - 1));
        assert_eq!(findings("agent/src/a.rs", &code), 0);
        assert_eq!(findings("agent/src/a.rs", &format!("{code}y\n")), 1);
        assert_eq!(
            findings(
                "agent/src/a.rs",
                &format!("{code}#[cfg(test)]\nmod tests {{}}\n")
            ),
            0
        );
        assert_eq!(
            findings("tests/e2e/tests/outbound.rs", &format!("{code}y\n")),
            0
        );
        assert_eq!(
            findings("agent/src/plan/tests.rs", &format!("{code}y\n")),
            0
        );
    }

    #[test]
    fn packages_inherit_the_lints() {
        assert_eq!(findings("agent/Cargo.toml", "[package]\nname = \"a\"\n"), 1);
        assert_eq!(
            findings("agent/Cargo.toml", "[package]\n[lints]\nworkspace = true\n"),
            0
        );
        assert_eq!(
            findings(
                "ebpf/Cargo.toml",
                "[package]\n[lints.rust]\nmissing_docs = \"warn\"\n"
            ),
            0
        );
        assert_eq!(findings("Cargo.toml", "[workspace]\n"), 0);
    }
}
