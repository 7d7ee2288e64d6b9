//! Where the programs for DNS over UDP are attached, and whether they run there.
//!
//! They go to the deepest cgroup that holds all pods, so that they run before programs at the root: a translator of
//! service addresses there (Cilium's socket load balancing) would otherwise have replaced the resolver's address before
//! we see it. They come with the first pod that has DNS capture on and stay until `unload`: sockets that were redirected
//! need them to name their resolver. What they decide is none of this file's business.

mod place;

use std::{
    collections::BTreeSet,
    fs::File,
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use culvert_ebpf::abi::{pod_flags, programs};
use serde::Serialize;

use super::{
    cgroup,
    error::{Error, Result},
    node::{Node, ProgramAction, ProgramReport},
    sys,
};
pub use place::Found;
pub(super) use place::Place;

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

/// What a process knows of the programs that the kernel does not tell.
#[derive(Debug, Default)]
pub(super) struct State {
    /// Where they go, as far as this process was told.
    pub(super) place: Place,
    seen: Mutex<Seen>,
}

/// How they were when they were looked at last.
#[derive(Debug, Default)]
struct Seen {
    /// They were in their place, and run.
    sound: bool,
    ahead: Vec<String>,
    problems: Vec<String>,
    /// Why the last attempt to attach them failed.
    failure: Option<String>,
}

impl State {
    pub(super) fn at(place: Place) -> Self {
        Self {
            place,
            seen: Mutex::default(),
        }
    }

    /// Says what is new about those that run before ours.
    fn note(&self, ahead: &[String], problems: &[String]) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        for other in ahead.iter().filter(|other| !seen.ahead.contains(other)) {
            tracing::warn!("{}", warning(other));
        }
        if ahead.is_empty() && problems.is_empty() && !seen.ahead.is_empty() {
            tracing::info!("nobody runs before the DNS programs any more");
        }
        *seen = Seen {
            sound: problems.is_empty(),
            ahead: ahead.to_vec(),
            problems: problems.to_vec(),
            failure: seen.failure.take().filter(|_| !problems.is_empty()),
        };
    }

    /// They could not be loaded or attached.
    pub(super) fn failed(&self, error: &Error) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.sound = false;
        seen.failure = Some(error.to_string());
    }

    fn sound(&self) -> bool {
        self.seen
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .sound
    }
}

fn warning(other: &str) -> String {
    format!(
        "{other} runs before Culvert's DNS programs and may have replaced a resolver's address: answers can then seem to \
         come from a stranger; give pods a cgroup of their own on cgroup v2, or name it with --dns-cgroup"
    )
}

/// What deserves attention, as it was when somebody looked last; mostly nothing.
#[must_use]
pub fn attention(node: &Node) -> Vec<String> {
    let seen = node.dns().seen.lock();
    let seen = seen.unwrap_or_else(PoisonError::into_inner);
    let ahead = seen.ahead.iter().map(|other| warning(other));
    let wrong = seen.failure.iter().chain(&seen.problems);
    wrong.cloned().chain(ahead).collect()
}

/// Sees that the programs are attached, for a pod that wants them. The caller holds the lock.
pub(super) fn ensure(node: &Node) -> Result<()> {
    if node.dns().sound() && missing(node).next().is_none() {
        return Ok(());
    }
    restore(node).map(drop).map_err(|mut error| {
        // The cgroup of pods may be on its way, and who keeps ours from running on his way out.
        error.retryable = true;
        error
    })
}

/// Attaches those that are not where they belong, and says which. The caller holds the lock.
pub(super) fn restore(node: &Node) -> Result<Vec<&'static str>> {
    let attached = attach(node, true)?;
    let moved = attached
        .programs
        .iter()
        .filter(|program| program.action != ProgramAction::Kept);
    let moved: Vec<_> = moved.map(|program| program.name).collect();
    if !moved.is_empty() {
        tracing::info!(cgroup = %attached.cgroup.display(), found = ?attached.found, "DNS programs attached");
    }
    Ok(moved)
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
fn missing(node: &Node) -> impl Iterator<Item = &'static str> {
    let names = programs::DNS.into_iter().map(|(name, _)| name);
    names.filter(|name| target(node, name).unwrap_or(0) == 0)
}

/// The cgroup to which one of them is attached, 0 = it is gone; none where there is no pin.
fn target(node: &Node, name: &str) -> Option<u64> {
    let link = sys::obj_get(&node.pins().link(name)).ok()?;
    sys::cgroup_link_info(link.as_fd()).ok().map(|i| i.target)
}

fn attach(node: &Node, current: bool) -> Result<Attached> {
    let attached = try_attach(node, current);
    match &attached {
        Ok(attached) => node.dns().note(&attached.ahead, &[]),
        Err(error) => node.dns().failed(error),
    }
    attached
}

fn try_attach(node: &Node, current: bool) -> Result<Attached> {
    let (path, found) = place::find(&node.dns().place)?;
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

/// What is wrong with the programs of which pods have need, each with its cure. What runs before them is no fault of theirs,
/// but said once.
pub(super) fn problems(node: &Node) -> Vec<String> {
    let hooks = look(node).unwrap_or_else(|error| Some(Hooks::with(error.to_string())));
    let hooks = hooks.unwrap_or_else(|| {
        Hooks::with("the DNS programs are not attached: lookups go past ztunnel".to_owned())
    });
    node.dns().note(&hooks.ahead, &hooks.problems);
    hooks.problems
}

impl Hooks {
    fn with(problem: String) -> Self {
        Self {
            cgroup: None,
            ahead: Vec::new(),
            problems: vec![problem],
        }
    }
}

/// The programs as they are; none when no pod ever had DNS capture on.
pub fn look(node: &Node) -> Result<Option<Hooks>> {
    let links = programs::DNS.map(|(name, _)| (name, target(node, name)));
    if links.iter().all(|(_, target)| target.is_none()) {
        return Ok(None);
    }
    let mut hooks = Hooks {
        cgroup: None,
        ahead: Vec::new(),
        problems: Vec::new(),
    };
    for (wrong, what) in [
        (None, "not pinned: lookups go past ztunnel"),
        (Some(0), "not attached, the cgroup is gone"),
    ] {
        let names = links.iter().filter(|(_, target)| *target == wrong);
        let names: Vec<_> = names.map(|(name, _)| *name).collect();
        if !names.is_empty() {
            let problem = format!("{} {what}; attach again", names.join(", "));
            hooks.problems.push(problem);
        }
    }
    let targets: BTreeSet<u64> = links.iter().filter_map(|(_, target)| *target).collect();
    // Where they belong is known to a process that was told, and that attaches them. Another takes it as it is.
    let path = match (&node.dns().place.root, targets.last()) {
        (Some(_), _) => Some(place::find(&node.dns().place)?.0),
        (None, Some(id)) => cgroup::by_id(&cgroup::find_root()?, *id),
        (None, None) => None,
    };
    let Some(path) = path.filter(|_| hooks.problems.is_empty()) else {
        return Ok(Some(hooks));
    };
    let dir = cgroup::open(&path, true)?;
    if targets != BTreeSet::from([cgroup::id(&dir)?]) {
        hooks.problems.push(format!(
            "the DNS programs are attached elsewhere than to {}, where pods are: attach again",
            path.display()
        ));
        return Ok(Some(hooks));
    }
    let order = order(node, &dir, &path)?;
    hooks.ahead = order.ahead;
    let ineffective = order.missing.into_iter();
    hooks.problems.extend(
        ineffective
            .map(|name| format!("{name} is attached, but its cgroup does not run it: {ANOTHER}")),
    );
    hooks.cgroup = Some(path);
    Ok(Some(hooks))
}
