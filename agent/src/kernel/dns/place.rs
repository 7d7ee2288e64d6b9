//! Which cgroup the programs for DNS over UDP belong to: the deepest one that holds all pods.
//!
//! Looks at directories; attaches nothing.

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::kernel::{
    cgroup::{self, Kubepods},
    error::Result,
};

/// What a process was told about the place.
#[derive(Clone, Debug, Default)]
pub(in crate::kernel) struct Place {
    /// Root of the hierarchy that the node's other programs are attached to.
    pub(in crate::kernel) root: Option<PathBuf>,
    /// The cgroup itself.
    pub(in crate::kernel) named: Option<PathBuf>,
}

/// How the cgroup was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Found {
    /// It was named.
    Named,
    /// It is the one of all pods.
    Kubepods,
    /// No cgroup of pods has a process in it: pods' processes are at the root, as on hybrid hosts.
    Root,
    /// Several kubelets run pods here, and none of them runs this process: the root holds them all.
    RootOfSeveral,
}

pub(super) fn find(told: &Place) -> Result<(PathBuf, Found)> {
    if let Some(named) = &told.named {
        return Ok((named.clone(), Found::Named));
    }
    let root = match &told.root {
        Some(root) => root.clone(),
        None => cgroup::find_root()?,
    };
    let own = cgroup::own(&root);
    Ok(choose(&root, cgroup::kubepods(&root), own.as_deref()))
}

/// Empty cgroups do not count: on hybrid hosts there may be one that no pod is ever put into. Of several kubelets' ours
/// counts, if we are a pod.
fn choose(root: &Path, found: Vec<Kubepods>, own: Option<&Path>) -> (PathBuf, Found) {
    let mut used: Vec<PathBuf> = found
        .into_iter()
        .filter(|k| k.populated)
        .map(|k| k.path)
        .collect();
    if let Some(own) = own
        && let Some(at) = used.iter().position(|path| own.starts_with(path))
    {
        return (used.swap_remove(at), Found::Kubepods);
    }
    match (used.pop(), used.is_empty()) {
        (Some(only), true) => (only, Found::Kubepods),
        (Some(_), false) => (root.to_owned(), Found::RootOfSeveral),
        (None, _) => (root.to_owned(), Found::Root),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(found: &[(&str, bool)], own: Option<&str>) -> (String, Found) {
        let found = found.iter().map(|(path, populated)| Kubepods {
            path: path.into(),
            populated: *populated,
        });
        let (path, how) = choose(Path::new("/c"), found.collect(), own.map(Path::new));
        (path.display().to_string(), how)
    }

    #[test]
    fn pods_cgroup_by_what_is_in_it() {
        let root = "/c".to_owned();
        assert_eq!(chosen(&[], None), (root.clone(), Found::Root));
        assert_eq!(
            chosen(&[("/c/kubepods", false)], None),
            (root.clone(), Found::Root)
        );
        let one = ("/c/kubepods.slice", true);
        let two = ("/c/node1/kubepods", true);
        assert_eq!(
            chosen(&[one, ("/c/x/kubepods", false)], None),
            (one.0.to_owned(), Found::Kubepods)
        );
        assert_eq!(chosen(&[one, two], None), (root, Found::RootOfSeveral));
        assert_eq!(
            chosen(&[one, two], Some("/c/node1/kubepods/pod1/agent")),
            (two.0.to_owned(), Found::Kubepods)
        );
    }
}
