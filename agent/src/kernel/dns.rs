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

use culvert_ebpf::abi::{pod_flags, programs};
use serde::Serialize;

use super::{
    cgroup::{self, Kubepods},
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
    /// Programs of others that run before ours, as `HOOK: NAME`.
    pub ahead: Vec<String>,
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
    /// No cgroup of pods has a process in it: pods' processes are at the root, as on hybrid hosts.
    Root,
    /// Several kubelets run pods here, and none of them runs this process: the root holds them all.
    RootOfSeveral,
}

/// The programs as they are now, for `netns show`.
#[derive(Clone, Debug, Serialize)]
pub struct Hooks {
    /// The cgroup; none when it is not found below the root.
    pub cgroup: Option<PathBuf>,
    /// Programs of others that run before ours, as `HOOK: NAME`.
    pub ahead: Vec<String>,
    /// What is not as it should be, each with its cure.
    pub problems: Vec<String>,
}

/// Attaches the programs if none are. The caller holds the lock.
pub(super) fn ensure(node: &Node) -> Result<()> {
    if missing(node).next().is_none() {
        return Ok(());
    }
    let attached = attach(node, true)?;
    tracing::info!(cgroup = %attached.cgroup.display(), found = ?attached.found, "DNS programs attached");
    for other in attached.ahead {
        tracing::warn!(
            "{other} runs before Culvert's DNS programs and may have replaced a resolver's address: answers can then seem \
             to come from a stranger; give pods a cgroup of their own on cgroup v2, or name it with --dns-cgroup"
        );
    }
    Ok(())
}

/// Puts this build's programs in place of those that are attached. The caller holds the lock.
pub(super) fn reload(node: &Node, current: bool) -> Result<Option<Attached>> {
    let pinned = |(name, _): &(&str, u32)| node.pins().link(name).exists();
    if !programs::DNS.iter().any(pinned) {
        return Ok(None);
    }
    attach(node, current).map(Some)
}

/// Loads the programs once, so that a kernel that refuses them is known before a pod needs them.
pub(super) fn check(node: &Node) -> Result<Vec<ProgramReport>> {
    programs::DNS
        .into_iter()
        .map(|(name, _)| node.check(name))
        .collect()
}

/// Does any pod have its lookups captured?
pub(super) fn wanted(node: &Node) -> Result<bool> {
    for cookie in node.maps().pods.keys()? {
        if let Some(pod) = node.maps().pods.get(&cookie)?
            && pod.flags & pod_flags::DNS != 0
        {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Which of them are not pinned, or not attached to a cgroup that lives.
pub(super) fn missing(node: &Node) -> impl Iterator<Item = &'static str> {
    let attached = |name: &str| {
        sys::obj_get(&node.pins().link(name))
            .and_then(|link| sys::cgroup_link_info(link.as_fd()))
            .is_ok_and(|info| info.target != 0)
    };
    let names = programs::DNS.into_iter().map(|(name, _)| name);
    names.filter(move |name| !attached(name))
}

fn attach(node: &Node, current: bool) -> Result<Attached> {
    let (path, found) = place(node.dns_place())?;
    let dir = cgroup::open(&path, true)?;
    // Answers before questions: at no step is a lookup sent to ztunnel whose answer would seem to come from a stranger.
    let programs = programs::DNS
        .into_iter()
        .map(|(name, hook)| node.attach(name, hook, &dir, current))
        .collect::<Result<_>>()?;
    let order = order(node, &dir, &path)?;
    match order.missing.first() {
        None => Ok(Attached {
            cgroup: path,
            found,
            ahead: order.ahead,
            programs,
        }),
        Some(name) => Err(Error::wrong(
            "attach program",
            name,
            format!(
                "it is attached to {}, which does not run it",
                path.display()
            ),
            ANOTHER,
        )
        .for_now()),
    }
}

const ANOTHER: &str =
    "another program is attached there or above exclusively: `bpftool cgroup tree` names it";

fn place(told: &Place) -> Result<(PathBuf, Found)> {
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

/// What a cgroup runs, with respect to our programs.
struct Order {
    /// Ours that it does not run: a link may be there and the cgroup run something else all the same.
    missing: Vec<&'static str>,
    /// Of others, before ours.
    ahead: Vec<String>,
}

fn order(node: &Node, dir: &File, path: &Path) -> Result<Order> {
    let mut order = Order {
        missing: Vec::new(),
        ahead: Vec::new(),
    };
    for (name, hook) in programs::DNS {
        let fail = |e| Error::system("list programs of", path.display(), e);
        let ids = sys::prog_query_effective(dir.as_fd(), hook).map_err(fail)?;
        let link = sys::obj_get(&node.pins().link(name)).map_err(fail)?;
        let ours = sys::cgroup_link_info(link.as_fd()).map_err(fail)?.prog_id;
        let Some(at) = ids.iter().position(|id| *id == ours) else {
            order.missing.push(name);
            continue;
        };
        let point = name.trim_start_matches("culvert_dns_");
        order.ahead.extend(ids.iter().take(at).map(|id| {
            let other = sys::prog_by_id(*id).and_then(|prog| sys::prog_info(prog.as_fd()));
            let other = other.map_or_else(|_| format!("program {id}"), |info| info.name);
            format!("{point}: {other}")
        }));
    }
    Ok(order)
}

/// The programs as they are; none when no pod ever had DNS capture on.
pub fn look(node: &Node) -> Result<Option<Hooks>> {
    let links: Vec<_> = programs::DNS
        .iter()
        .map(|(name, _)| {
            let link = sys::obj_get(&node.pins().link(name));
            (
                *name,
                link.and_then(|link| sys::cgroup_link_info(link.as_fd())),
            )
        })
        .collect();
    if links.iter().all(|(_, info)| info.is_err()) {
        return Ok(None);
    }
    let mut hooks = Hooks {
        cgroup: None,
        ahead: Vec::new(),
        problems: Vec::new(),
    };
    for (name, info) in &links {
        match info {
            Ok(info) if info.target != 0 => {}
            Ok(_) => hooks.problems.push(format!(
                "{name} is not attached, its cgroup is gone: attach again"
            )),
            Err(_) => hooks
                .problems
                .push(format!("{name} is not pinned: attach again")),
        }
    }
    let root = match &node.dns_place().root {
        Some(root) => root.clone(),
        None => cgroup::find_root()?,
    };
    let target = links
        .iter()
        .find_map(|(_, info)| info.as_ref().ok().map(|i| i.target));
    if hooks.problems.is_empty()
        && let Some(path) = target.and_then(|id| cgroup::by_id(&root, id))
    {
        let order = order(node, &cgroup::open(&path, true)?, &path)?;
        hooks.ahead = order.ahead;
        hooks.problems.extend(
            order.missing.into_iter().map(|name| {
                format!("{name} is attached, but its cgroup does not run it: {ANOTHER}")
            }),
        );
        hooks.cgroup = Some(path);
    }
    Ok(Some(hooks))
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
