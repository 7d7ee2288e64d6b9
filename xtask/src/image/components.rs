//! What the image's programs consist of: each crate, with its licence, checksum and dependencies, of both lock files. It
//! asks cargo and decides nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::PathBuf,
    process::Command,
};

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::PROGRAMS;
use crate::{
    cmd, ebpf,
    project::{Project, static_triple},
};

/// A crate's name and version.
pub(super) type Id = (String, String);

/// One crate.
#[derive(Debug, Default)]
pub(super) struct Component {
    /// SPDX expression.
    pub(super) licence: String,
    /// SHA-256 of the released crate; none for those of this tree.
    pub(super) checksum: Option<String>,
    /// What it uses.
    pub(super) uses: BTreeSet<Id>,
    /// Where its sources are.
    pub(super) dir: PathBuf,
}

/// All of them.
pub(super) struct Components(pub(super) BTreeMap<Id, Component>);

impl Components {
    pub(super) fn find(project: &Project) -> Result<Self> {
        let mut workspace = cmd::cargo(project);
        workspace.args(["tree", "--locked", "--target", &static_triple()]);
        for program in PROGRAMS {
            workspace.args(["--package", program]);
        }
        let mut programs = ebpf::host_cargo(project, "tree");
        programs.args(["--target", "bpfel-unknown-none", "--features", "programs"]);
        let mut metadata = cmd::cargo(project);
        metadata.args(["metadata", "--locked"]);
        let graphs = [
            (workspace, metadata, project.root.clone()),
            (
                programs,
                ebpf::host_cargo(project, "metadata"),
                project.ebpf(),
            ),
        ];
        let mut all: BTreeMap<Id, Component> = BTreeMap::new();
        for (mut tree, metadata, root) in graphs {
            tree.args(["--edges", "normal", "--prefix", "depth", "--format", " {p}"]);
            let edges = edges(&cmd::output(&mut tree)?);
            let packages = packages(metadata)?;
            let lock = root.join("Cargo.lock");
            let lock = fs::read_to_string(&lock)
                .with_context(|| format!("cannot read {}", lock.display()))?;
            let checksums = checksums(&lock);
            for (id, uses) in edges {
                let (licence, dir) = packages
                    .get(&id)
                    .with_context(|| format!("cargo metadata lists no {} {}", id.0, id.1))?
                    .clone();
                let checksum = checksums.get(&id).cloned();
                let component = all.entry(id).or_default();
                component.licence = licence;
                component.dir = dir;
                component.checksum = checksum;
                component.uses.extend(uses);
            }
        }
        Ok(Self(all))
    }
}

/// Who uses whom, from `cargo tree --prefix depth`: `2 name v1.0.0 (..)`.
fn edges(tree: &str) -> BTreeMap<Id, BTreeSet<Id>> {
    let mut all: BTreeMap<Id, BTreeSet<Id>> = BTreeMap::new();
    let mut path: Vec<Id> = Vec::new();
    for line in tree.lines() {
        let mut words = line.split_whitespace();
        let (Some(depth), Some(name), Some(version)) = (words.next(), words.next(), words.next())
        else {
            continue;
        };
        let Ok(depth) = depth.parse::<usize>() else {
            continue;
        };
        let id = (name.to_owned(), version.trim_start_matches('v').to_owned());
        path.truncate(depth);
        if let Some(user) = path.last() {
            all.entry(user.clone()).or_default().insert(id.clone());
        }
        all.entry(id.clone()).or_default();
        path.push(id);
    }
    all
}

/// Licence and directory of every package that cargo knows.
fn packages(mut metadata: Command) -> Result<BTreeMap<Id, (String, PathBuf)>> {
    metadata.args(["--format-version", "1"]);
    let metadata: Value =
        serde_json::from_str(&cmd::output(&mut metadata)?).context("cargo metadata is not JSON")?;
    let packages = metadata["packages"]
        .as_array()
        .context("cargo metadata lists no packages")?;
    let mut found = BTreeMap::new();
    for package in packages {
        let field = |name: &str| package[name].as_str().unwrap_or_default().to_owned();
        // "MIT/Apache-2.0" is how crates wrote OR before there was SPDX.
        let licence = field("license").replace('/', " OR ");
        let mut dir = PathBuf::from(field("manifest_path"));
        dir.pop();
        found.insert((field("name"), field("version")), (licence, dir));
    }
    Ok(found)
}

/// What a lock file says released crates hash to.
fn checksums(lock: &str) -> BTreeMap<Id, String> {
    let mut found = BTreeMap::new();
    let value = |line: &str, key: &str| -> Option<String> {
        let text = line.strip_prefix(key)?.strip_prefix(" = \"")?;
        Some(text.strip_suffix('"')?.to_owned())
    };
    for package in lock.split("[[package]]") {
        let of = |key: &str| package.lines().find_map(|line| value(line, key));
        if let (Some(name), Some(version), Some(checksum)) =
            (of("name"), of("version"), of("checksum"))
        {
            found.insert((name, version), checksum);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(name: &str) -> Id {
        (name.to_owned(), "1.0.0".to_owned())
    }

    #[test]
    fn the_tree_of_cargo_is_read_with_who_uses_whom() {
        let tree = "0 a v1.0.0 (/x/a)\n1 b v1.0.0\n2 c v1.0.0 (proc-macro)\n1 c v1.0.0 (proc-macro) (*)\n\n0 d v1.0.0 (/x/d)\n";
        let edges = edges(tree);
        assert_eq!(edges.len(), 4);
        assert_eq!(edges[&id("a")], BTreeSet::from([id("b"), id("c")]));
        assert_eq!(edges[&id("b")], BTreeSet::from([id("c")]));
        assert!(edges[&id("d")].is_empty());
    }

    #[test]
    fn checksums_come_from_the_lock_file() {
        let lock = "version = 4\n\n[[package]]\nname = \"a\"\nversion = \"1.0.0\"\n\n[[package]]\nname = \"b\"\nversion = \"1.0.0\"\nsource = \"x\"\nchecksum = \"12ab\"\n";
        assert_eq!(
            checksums(lock),
            BTreeMap::from([(id("b"), "12ab".to_owned())])
        );
    }
}
