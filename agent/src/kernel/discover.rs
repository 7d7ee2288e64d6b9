//! Finding the network namespaces of pods that already run, by their processes.
//!
//! One pass over `/proc` serves any number of pods. What a cgroup path says is a hint, not a proof: a pod's processes
//! may live in several namespaces (a container with one of its own, CRI-O's monitor in the node's), and numbers are
//! reused. A namespace counts only once it owns one of the pod's addresses, and the node's own never does.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::IpAddr,
    os::unix::fs::MetadataExt,
    path::Path,
    sync::Arc,
};

use netlink_packet_route::{RouteNetlinkMessage, address::AddressMessage};

use super::{
    error::{Error, Result},
    netconf,
    netlink::Rtnetlink,
    netns::Netns,
    procfs,
};

/// What a pass over `/proc` found.
#[derive(Debug, Default)]
pub struct Scan {
    /// By pod UID, as asked for: the namespaces its processes are in, each once. Pods without any are left out.
    pub candidates: BTreeMap<String, Vec<Arc<Netns>>>,
    /// A process of a wanted pod whose namespace could not be opened, the last of them.
    pub denied: Option<Error>,
}

/// What [`discover`] found.
#[derive(Debug, Default)]
pub struct Discovered {
    /// By pod UID: the namespace that owns one of the pod's addresses.
    pub found: BTreeMap<String, Arc<Netns>>,
    /// Pods with processes, none of whose namespaces owns an address of theirs; with how many were looked at.
    pub unconfirmed: BTreeMap<String, usize>,
    /// As [`Scan::denied`].
    pub denied: Option<Error>,
}

/// Looks for the namespaces of all `wanted` pods, by UID (of static pods: their hash), in one pass over `proc`.
pub fn scan(proc: &Path, wanted: &BTreeSet<&str>) -> Result<Scan> {
    let mut scan = Scan::default();
    if wanted.is_empty() {
        return Ok(scan);
    }
    let node = Netns::current()?;
    // Processes of a pod share a namespace: each is opened once.
    let mut opened: BTreeMap<(u64, u64), Arc<Netns>> = BTreeMap::new();
    let mut file = Vec::with_capacity(4096);
    for pid in procfs::processes(proc)? {
        if !procfs::read(proc, pid, "cgroup", &mut file)? {
            continue;
        }
        let Some(uid) = procfs::pod_uid(&file).filter(|uid| wanted.contains(uid.as_str())) else {
            continue;
        };
        match namespace(proc, pid, &mut opened) {
            Ok(None) => {}
            Ok(Some(netns)) if same(&netns, &node) => {}
            Ok(Some(netns)) => {
                let candidates = scan.candidates.entry(uid).or_default();
                if !candidates.iter().any(|known| same(known, &netns)) {
                    candidates.push(netns);
                }
            }
            Err(error) => {
                tracing::debug!(pid, uid, %error, "a pod's process whose namespace cannot be opened");
                scan.denied = Some(error.cured_by(
                    "give the agent CAP_SYS_PTRACE, and the host's PID namespace (hostPID)",
                ));
            }
        }
    }
    Ok(scan)
}

/// Looks for all `wanted` pods, by UID with their addresses, and keeps what is confirmed.
pub fn discover(proc: &Path, wanted: &BTreeMap<&str, &BTreeSet<IpAddr>>) -> Result<Discovered> {
    let scan = scan(proc, &wanted.keys().copied().collect())?;
    let mut discovered = Discovered {
        denied: scan.denied,
        ..Discovered::default()
    };
    let none = BTreeSet::new();
    for (uid, candidates) in scan.candidates {
        let addresses = wanted.get(uid.as_str()).copied().unwrap_or(&none);
        match choose(&candidates, addresses)? {
            Some(netns) => drop(discovered.found.insert(uid, netns)),
            None => drop(discovered.unconfirmed.insert(uid, candidates.len())),
        }
    }
    Ok(discovered)
}

/// The candidate that owns one of `addresses`. Where several do, a pod's sandbox was made anew while we looked: the
/// newest counts.
pub fn choose(
    candidates: &[Arc<Netns>],
    addresses: &BTreeSet<IpAddr>,
) -> Result<Option<Arc<Netns>>> {
    let mut chosen: Option<&Arc<Netns>> = None;
    for netns in candidates {
        if chosen.is_none_or(|c| c.cookie() < netns.cookie()) && confirm(netns, addresses)? {
            chosen = Some(netns);
        }
    }
    Ok(chosen.cloned())
}

/// Does the namespace own at least one of these addresses?
pub fn confirm(netns: &Netns, addresses: &BTreeSet<IpAddr>) -> Result<bool> {
    if addresses.is_empty() {
        return Ok(false);
    }
    let _inside = netns.enter()?;
    let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
    let owned = Rtnetlink::open()?.dump(request)?;
    Ok(owned.iter().any(|message| match message {
        RouteNetlinkMessage::NewAddress(address) => {
            netconf::from_address(address).is_some_and(|(_, ip)| addresses.contains(&ip))
        }
        _ => false,
    }))
}

fn same(a: &Netns, b: &Netns) -> bool {
    a.cookie() == b.cookie()
}

/// The namespace of a process; none when it is gone, or a zombie, which has none any more.
fn namespace(
    proc: &Path,
    pid: u32,
    opened: &mut BTreeMap<(u64, u64), Arc<Netns>>,
) -> Result<Option<Arc<Netns>>> {
    let path = proc.join(pid.to_string()).join("ns/net");
    let id = match fs::metadata(&path) {
        Ok(meta) => (meta.dev(), meta.ino()),
        Err(error) if procfs::vanished(&error) => return Ok(None),
        Err(error) => return Err(Error::system("examine", path.display(), error)),
    };
    if let Some(netns) = opened.get(&id) {
        return Ok(Some(Arc::clone(netns)));
    }
    match Netns::open(&path) {
        Ok(netns) => {
            let netns = Arc::new(netns);
            // What was opened, which need not be what was looked at a moment ago.
            opened.insert((netns.dev(), netns.inode()), Arc::clone(&netns));
            Ok(Some(netns))
        }
        Err(error) if matches!(error.errno(), Some(libc::ENOENT | libc::ESRCH)) => Ok(None),
        Err(error) => Err(error),
    }
}
