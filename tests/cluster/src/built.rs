//! What this tree has built and tests install: the image and the binaries, found where `cargo xtask test` says they are or
//! where a build by hand leaves them. The latter are refused when they are older than what they were built from: a test of
//! yesterday's programs proves nothing. It builds nothing.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context as _, Result, bail, ensure};

use crate::place;

/// What the image is made of, as cargo calls it.
const PROGRAMS: [&str; 2] = ["culvert", "culvert-cni"];

/// The image of Culvert, as `cargo xtask image` has written it.
///
/// # Errors
/// When there is none, or what it was built from has changed since; the error says how to make it.
pub fn culvert_image() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("CULVERT_IMAGE") {
        let path = PathBuf::from(path);
        ensure!(
            path.is_file(),
            "CULVERT_IMAGE={} is no file: point it at what `cargo xtask image` has written",
            path.display()
        );
        return Ok(path);
    }
    let target = place::target_dir();
    let path = target.join("image/culvert.tar");
    ensure!(
        path.is_file(),
        "no image at {}: cargo xtask image",
        path.display()
    );
    let triple = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let programs = target.join(triple).join("release");
    for program in PROGRAMS {
        let sources = programs.join(program).with_extension("d");
        ensure!(
            sources.is_file(),
            "{} may be of any age, for {} is not there: cargo xtask image",
            path.display(),
            sources.display()
        );
        refuse_older(&path, &sources, "cargo xtask image")?;
    }
    refuse_older_than(
        &path,
        &place::root().join("Cargo.lock"),
        "cargo xtask image",
    )?;
    Ok(path)
}

/// A binary of this workspace: from the environment, or beside the running one.
pub(crate) fn binary(variable: &str, name: &str) -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(variable) {
        let path = PathBuf::from(path);
        ensure!(
            path.is_file(),
            "{variable}={} is no file: point it at the {name} binary",
            path.display()
        );
        return Ok(path);
    }
    let me = std::env::current_exe().context("finding the running binary")?;
    // Test binaries lie in target/<profile>/deps, the others in target/<profile>.
    let path = me
        .ancestors()
        .skip(1)
        .take(2)
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
        .with_context(|| {
            format!(
                "no {name} binary beside {}: cargo xtask build, or set {variable}",
                me.display()
            )
        })?;
    let sources = path.with_extension("d");
    if sources.is_file() {
        refuse_older(&path, &sources, "cargo xtask build")?;
    }
    Ok(path)
}

/// Fails when a file is older than one of those that cargo says it was built from.
fn refuse_older(built: &Path, sources: &Path, cure: &str) -> Result<()> {
    let text =
        fs::read_to_string(sources).with_context(|| format!("reading {}", sources.display()))?;
    for source in sources_in(&text) {
        refuse_older_than(built, &source, cure)?;
    }
    Ok(())
}

fn refuse_older_than(built: &Path, source: &Path, cure: &str) -> Result<()> {
    // One that is gone is a change too.
    if changed(source).is_none_or(|at| Some(at) > changed(built)) {
        bail!(
            "{} is older than {}, which it was built from: {cure}",
            built.display(),
            source.display()
        );
    }
    Ok(())
}

fn changed(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|data| data.modified()).ok()
}

/// The files behind the colon of each line, as make reads them: a blank in a name has a backslash before it.
fn sources_in(text: &str) -> Vec<PathBuf> {
    let files = text.lines().filter_map(|line| line.split_once(": "));
    files
        .flat_map(|(_, files)| {
            let files = files.replace("\\ ", "\0");
            files
                .split_whitespace()
                .map(|file| PathBuf::from(file.replace('\0', " ")))
                .collect::<Vec<_>>()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_read_as_make_does() {
        let text = "/t/culvert: /w/a.rs /w/a\\ b.rs\n";
        assert_eq!(
            sources_in(text),
            [PathBuf::from("/w/a.rs"), PathBuf::from("/w/a b.rs")]
        );
    }

    #[test]
    fn what_is_older_than_a_source_is_refused_with_the_cure() {
        let dir = std::env::temp_dir().join(format!("culvert-built-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let file = |name: &str, age: u64| {
            let path = dir.join(name);
            let at = SystemTime::now() - std::time::Duration::from_secs(age);
            fs::write(&path, "").unwrap();
            let file = fs::File::options().write(true).open(&path).unwrap();
            file.set_modified(at).unwrap();
            path
        };
        let (old, built, new) = (file("old.rs", 60), file("built", 30), file("new.rs", 0));
        let listed = |sources: &[&Path]| {
            let names: Vec<_> = sources.iter().map(|path| path.to_str().unwrap()).collect();
            let list = dir.join("built.d");
            fs::write(&list, format!("built: {}\n", names.join(" "))).unwrap();
            refuse_older(&built, &list, "make it").map_err(|error| error.to_string())
        };
        assert_eq!(listed(&[&old]), Ok(()));
        for source in [&new, &dir.join("gone.rs")] {
            let error = listed(&[&old, source]).unwrap_err();
            assert!(error.contains(source.to_str().unwrap()), "{error}");
            assert!(error.ends_with(": make it"), "{error}");
        }
        fs::remove_dir_all(&dir).unwrap();
    }
}
