//! Where the programs for DNS over UDP are attached, and whether they run there.
//!
//! They go to the deepest cgroup that holds all pods, so that they run before programs at the root: a translator of
//! service addresses there (Cilium's socket load balancing) would otherwise have replaced the resolver's address before
//! we see it. They come with the first pod that has DNS capture on and stay until `unload`: sockets that were redirected
//! need them to name their resolver. What they decide is none of this file's business.

use std::{
    fs::File,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use culvert_ebpf::abi::programs;
use serde::Serialize;

use super::{
    cgroup,
    error::{Error, Result},
    node::{Node, ProgramReport},
    sys,
};

/// What a process was told about the place.
#[derive(Clone, Debug, Default)]
pub(super) struct Place {
    /// Root of the hierarchy that the node's other programs are attached to.
    pub(super) root: Option<PathBuf>,
    /// The cgroup itself.
    pub(super) named: Option<PathBuf>,
}

/// The programs as they are attached.
#[derive(Clone, Debug, Serialize)]
pub struct Attached {
    /// The cgroup.
    pub cgroup: PathBuf,
    /// How it was found.
    pub found: Found,
    /// The programs.
    pub programs: Vec<ProgramReport>,
}

/// How the cgroup was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Found {
    /// It was named.
    Named,
    /// It is the one of all pods.
    Kubepods,
    /// No cgroup of all pods holds any process: pods' processes are at the root.
    Root,
}

/// Attaches the programs if none are. The caller holds the lock.
pub(super) fn ensure(node: &Node) -> Result<()> {
    if attached(node) {
        return Ok(());
    }
    attach(node, true).map(drop)
}

/// Puts this build's programs in place of those that are attached. The caller holds the lock.
pub(super) fn reload(node: &Node, current: bool) -> Result<Option<Attached>> {
    if !programs::DNS
        .iter()
        .any(|(name, _)| node.pins().link(name).exists())
    {
        return Ok(None);
    }
    attach(node, current).map(Some)
}

/// Are all of them pinned, at a cgroup that lives?
fn attached(node: &Node) -> bool {
    programs::DNS.iter().all(|(name, _)| {
        sys::obj_get(&node.pins().link(name))
            .and_then(|link| sys::cgroup_link_info(link.as_fd()))
            .is_ok_and(|info| info.target != 0)
    })
}

fn attach(node: &Node, current: bool) -> Result<Attached> {
    let (path, found, dir) = place(node.dns_place())?;
    // Answers before questions: at no step is a lookup sent to ztunnel whose answer would seem to come from a stranger.
    let programs = programs::DNS
        .into_iter()
        .map(|(name, hook)| node.attach(name, hook, &dir, current))
        .collect::<Result<_>>()?;
    verify(node, &dir, &path)?;
    Ok(Attached {
        cgroup: path,
        found,
        programs,
    })
}

fn place(told: &Place) -> Result<(PathBuf, Found, File)> {
    if let Some(named) = &told.named {
        let dir = cgroup::open(named, true)?;
        return Ok((named.clone(), Found::Named, dir));
    }
    let root = match &told.root {
        Some(root) => root.clone(),
        None => cgroup::find_root()?,
    };
    let dir = cgroup::open(&root, true)?;
    Ok((root, Found::Root, dir))
}

/// A link may be there and the cgroup run something else all the same: the cgroup is asked.
fn verify(node: &Node, dir: &File, path: &Path) -> Result<()> {
    for (name, hook) in programs::DNS {
        let fail = |e| Error::system("list programs of", path.display(), e);
        let ids = sys::prog_query_effective(dir.as_fd(), hook).map_err(fail)?;
        let link = sys::obj_get(&node.pins().link(name)).map_err(fail)?;
        let info = sys::cgroup_link_info(link.as_fd()).map_err(fail)?;
        if !ids.contains(&info.prog_id) {
            return Err(Error::wrong(
                "attach program",
                name,
                format!(
                    "it is attached to {}, which does not run it",
                    path.display()
                ),
                "another program is attached there or above exclusively: `bpftool cgroup tree` names it",
            ));
        }
    }
    Ok(())
}
