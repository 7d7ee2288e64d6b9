//! `cargo xtask image --verify`: the commit built a second time, from a clone in another directory and from nothing, and
//! compared with the first. It says what differs and keeps it; it never makes the two alike.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, bail};

use super::{Origin, PROGRAMS};
use crate::{
    cmd, inputs,
    project::{Project, static_triple},
};

/// Fails when the same commit gives another object or another image elsewhere.
pub(super) fn verify(project: &Project, tag: &str, source: Option<&str>) -> Result<()> {
    let origin = Origin::find(project)?;
    let revision = origin
        .revision
        .context("two builds of one commit are compared, and this is no checkout of one")?;
    if revision.ends_with("-dirty") {
        bail!("two builds of one commit are compared, and there are changes: commit or stash them");
    }
    super::write(project, tag, source)?;
    // Deeper than the tree itself: paths of another length move more than paths of another name.
    let place = project.target.join("image/again");
    let clone = place.join("in/another/directory");
    discard(&place)?;
    let mut git = cmd::command("git");
    git.args(["clone", "--quiet", "--no-checkout", "--shared"])
        .args([&project.root, &clone]);
    cmd::run(&mut git)?;
    let mut git = cmd::command("git");
    git.current_dir(&clone)
        .args(["checkout", "--quiet", "--detach", &revision]);
    cmd::run(&mut git)?;
    let target = clone.join("target");
    share_tools(project, &target)?;

    let again = Project {
        root: clone,
        target: target.clone(),
    };
    let mut build = cmd::cargo(&again);
    build
        .args(["xtask", "image", "--tag", tag])
        .args(source.map(|url| format!("--source={url}")))
        .env("CARGO_TARGET_DIR", &target);
    cmd::run(&mut build)?;

    let differ = differences(&project.target, &target)?;
    if !differ.is_empty() {
        bail!(
            "not reproducible: {} differ between {} and {}",
            differ.join(", "),
            project.target.display(),
            target.display()
        );
    }
    discard(&place)?;
    eprintln!(
        "built twice from {revision}, in two directories: the same eBPF object, the same image"
    );
    Ok(())
}

/// Compilers and linkers are given; what they make is in question.
fn share_tools(project: &Project, target: &Path) -> Result<()> {
    let tools = project.tools();
    if tools.is_dir() {
        fs::create_dir_all(target)
            .and_then(|()| std::os::unix::fs::symlink(&tools, target.join("tools")))
            .with_context(|| format!("cannot share {}", tools.display()))?;
    }
    Ok(())
}

/// Which of the files that count are not the same below two target directories: parts first, the whole last.
fn differences(one: &Path, other: &Path) -> Result<Vec<String>> {
    let programs = PROGRAMS.map(|name| format!("{}/release/{name}", static_triple()));
    let mut names = vec![inputs::OBJECT.to_owned()];
    names.extend(programs);
    names.extend(["culvert.cdx.json", "digest", "culvert.tar"].map(|name| format!("image/{name}")));
    let mut differ = Vec::new();
    for name in names {
        let read = |dir: &Path| {
            let path = dir.join(&name);
            fs::read(&path).with_context(|| format!("cannot read {}", path.display()))
        };
        if read(one)? != read(other)? {
            differ.push(name);
        }
    }
    // Only what goes into the image counts of a program, not its debug information.
    let whole = differ.iter().any(|name| name.starts_with("image/"));
    differ.retain(|name| whole || name == inputs::OBJECT);
    Ok(differ)
}

fn discard(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_is_named_and_debug_information_is_none_of_it() {
        let dir = std::env::temp_dir().join(format!("culvert-again-{}", std::process::id()));
        let program = format!("{}/release/culvert", static_triple());
        let files = [
            inputs::OBJECT,
            &program,
            &format!("{program}-cni"),
            "image/culvert.cdx.json",
            "image/digest",
            "image/culvert.tar",
        ];
        let sides = ["one", "other"].map(|side| dir.join(side));
        for path in sides
            .iter()
            .flat_map(|side| files.map(|name| side.join(name)))
        {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "same").unwrap();
        }
        let found = || differences(&sides[0], &sides[1]).unwrap();
        let change = |name: &str, to: &str| fs::write(sides[1].join(name), to).unwrap();
        assert!(found().is_empty());
        change(&program, "other debug information");
        assert!(found().is_empty());
        change("image/digest", "other");
        assert_eq!(found(), [program.as_str(), "image/digest"]);
        change("image/digest", "same");
        change(inputs::OBJECT, "other");
        assert_eq!(found(), [inputs::OBJECT]);
        fs::remove_file(sides[1].join("image/digest")).unwrap();
        assert!(differences(&sides[0], &sides[1]).is_err());
        fs::remove_dir_all(&dir).unwrap();
    }
}
