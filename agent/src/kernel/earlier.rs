//! What another version of Culvert left pinned: set aside, taken over pod by pod, removed.
//!
//! Maps of another layout cannot be used on. This version makes its own beside them, and for a moment the programs of both
//! run; a pod leaves the old ones when the new ones have it, so that none is without in between. Whoever is killed on the
//! way leaves something the next start completes, be it of this version or of the other one again.
//!
//! What every version may rely on, of every other: `CONFIG` begins with the ABI version; `PODS` and `RECORDS` are keyed by
//! netns cookie, and `pods/COOKIE` is the pod's link; programs for lookups are named `culvert_dns_*`. Maps that are
//! carried over keep their layout, or get another name.

use std::{
    collections::BTreeSet,
    fs,
    os::fd::{AsFd, BorrowedFd},
};

use culvert_ebpf::abi::{Record, maps as map_names};

use super::{
    error::{Error, Result},
    listeners,
    netns::{self, Netns, NetnsCookie},
    node::{self, Node, Pinned},
    pins::{self, Pins},
    pod::{self, Policy},
    process,
    sys::{self, MapSpec},
};

/// What puts a pod back as it was, and whom the programs take for ztunnel and for the kubelet: their sockets are made and
/// marked all the while.
const CARRIED: [&str; 4] = [
    map_names::RECORDS,
    map_names::ZTUNNELS,
    map_names::VOUCHERS,
    map_names::PID_NAMESPACES,
];

/// What [`take_over`] did.
#[derive(Debug, Default)]
pub struct TakenOver {
    /// So many pods are captured by this version's programs now.
    pub pods: usize,
    /// Those that still are by the others, and why. They are tried again with everything that attaches them, and at the
    /// next start.
    pub left: Vec<(NetnsCookie, String)>,
}

/// The ABI version of the maps pinned there; none where they do not say.
pub(super) fn version(pins: &Pins) -> Result<Option<u32>> {
    let path = pins.map(map_names::CONFIG);
    let fd = node::open(&path)?;
    let examined = |e| Error::system("examine", path.display(), e);
    let spec = sys::map_info(fd.as_fd()).map_err(examined)?;
    let mut value = vec![0; spec.value_size as usize];
    let found = sys::map_lookup(fd.as_fd(), &0_u32.to_ne_bytes(), &mut value).map_err(examined)?;
    Ok(value
        .first_chunk()
        .filter(|_| found)
        .map(|version| u32::from_ne_bytes(*version)))
}

/// Sets pins aside that this build cannot use on. The caller holds the lock, and makes new ones.
pub(super) fn make_room(pins: &Pins) -> Result<()> {
    if pins.exist()
        && let Pinned::Other(what) = node::look(pins)?
    {
        if !knows_how_pods_were(pins)? {
            return Err(node::other_abi(pins, &what));
        }
        tracing::info!(pins = %pins.root().display(), "the maps pinned there are {what}: their pods are taken over");
        set_aside(pins)?;
    }
    for before in pins.earlier() {
        end_lookups(&before)?;
    }
    Ok(())
}

/// Without the records, nobody could let its pods go again.
fn knows_how_pods_were(pins: &Pins) -> Result<bool> {
    let size = |name: &str| -> Result<Option<(u32, u32)>> {
        let Ok(fd) = sys::obj_get(&pins.map(name)) else {
            return Ok(None);
        };
        let spec = sys::map_info(fd.as_fd()).map_err(|e| Error::system("examine", name, e))?;
        Ok(Some((spec.key_size, spec.value_size)))
    };
    let record = u32::try_from(size_of::<Record>()).unwrap_or(0);
    let keyed = size(map_names::PODS)?.is_some_and(|(key, _)| key == 8);
    Ok(keyed && size(map_names::RECORDS)? == Some((8, record)))
}

/// The maps last: as long as they are there, the next one knows that there is something to set aside.
fn set_aside(pins: &Pins) -> Result<()> {
    let before = pins.next_earlier();
    fs::create_dir(before.root())
        .map_err(|e| Error::system("make directory", before.root().display(), e))?;
    for part in ["pods", "links", "maps"] {
        let from = pins.root().join(part);
        if from.exists() {
            pins::publish(&from, &before.root().join(part))?;
        }
    }
    pins.make_directories()
}

/// With both versions' programs a query would run through both, and the second take it for one that asks ztunnel by itself.
/// Until the new ones are there it goes to its resolver.
fn end_lookups(before: &Pins) -> Result<()> {
    let links = fs::read_dir(before.root().join("links"));
    for entry in links.into_iter().flatten().flatten() {
        if entry
            .file_name()
            .to_string_lossy()
            .starts_with("culvert_dns_")
        {
            let path = entry.path();
            if let Ok(link) = sys::obj_get(&path) {
                sys::link_detach(link.as_fd())
                    .map_err(|e| Error::system("detach program", path.display(), e))?;
            }
            pins::remove(&path)?;
        }
    }
    Ok(())
}

/// Copies what earlier versions' map of this name holds, if it is [`CARRIED`], into a new one.
pub(super) fn carry_over(
    pins: &Pins,
    name: &str,
    spec: &MapSpec,
    into: BorrowedFd<'_>,
) -> Result<()> {
    if !CARRIED.contains(&name) {
        return Ok(());
    }
    for before in pins.earlier() {
        let path = before.map(name);
        let Ok(from) = sys::obj_get(&path) else {
            continue;
        };
        let failed = |e| Error::system("carry over", path.display(), e);
        let there = sys::map_info(from.as_fd()).map_err(failed)?;
        if (there.map_type, there.key_size, there.value_size)
            != (spec.map_type, spec.key_size, spec.value_size)
        {
            tracing::warn!(map = %path.display(), "its layout is another: not carried over");
            continue;
        }
        let mut value = vec![0; spec.value_size as usize];
        for key in keys(from.as_fd(), spec.key_size).map_err(failed)? {
            if sys::map_lookup(from.as_fd(), &key, &mut value).map_err(failed)? {
                sys::map_update(into, &key, &value, 0).map_err(failed)?;
            }
        }
    }
    Ok(())
}

fn keys(map: BorrowedFd<'_>, size: u32) -> std::io::Result<Vec<Vec<u8>>> {
    let mut keys: Vec<Vec<u8>> = Vec::new();
    let mut next = vec![0; size as usize];
    // Nobody writes to them any more.
    while sys::map_next_key(map, keys.last().map(Vec::as_slice), &mut next)? {
        keys.push(next.clone());
    }
    Ok(keys)
}

/// The pods that programs of earlier versions capture.
fn enrolled(earlier: &[Pins]) -> Result<BTreeSet<NetnsCookie>> {
    let mut found = BTreeSet::new();
    for before in earlier {
        let path = before.map(map_names::PODS);
        let Ok(map) = sys::obj_get(&path) else {
            continue;
        };
        let keys = keys(map.as_fd(), 8).map_err(|e| Error::system("list", path.display(), e))?;
        found.extend(
            keys.iter()
                .filter_map(|key| Some(NetnsCookie(u64::from_ne_bytes(*key.first_chunk()?)))),
        );
    }
    Ok(found)
}

/// Inodes of the namespaces whose links earlier versions pinned, by cookie; those that are gone are left out.
fn pinned(earlier: &[Pins]) -> Result<BTreeSet<(NetnsCookie, u64)>> {
    let mut found = BTreeSet::new();
    for before in earlier {
        for cookie in before.pods() {
            let path = before.pod(cookie);
            let link = sys::obj_get(&path).map_err(|e| Error::system("open", path.display(), e))?;
            let target = sys::netns_link_info(link.as_fd()).map_or(0, |info| info.target);
            if target != 0 {
                found.insert((cookie, target));
            }
        }
    }
    Ok(found)
}

/// Captures the pods of earlier versions with this one's programs, each by the policy it is said to have, and removes what
/// they pinned once nothing depends on it.
pub fn take_over(node: &Node, mut policy: impl FnMut(NetnsCookie) -> Policy) -> Result<TakenOver> {
    let mut done = TakenOver::default();
    let earlier = node.pins().earlier();
    if earlier.is_empty() {
        return Ok(done);
    }
    let enrolled = enrolled(&earlier)?;
    let paths = netns::paths();
    let ztunnels = process::ztunnels(node)?;
    for (cookie, inode) in pinned(&earlier)? {
        let mut places = paths.iter().filter(|((_, at), _)| *at == inode);
        let netns = places.find_map(|(_, path)| {
            Netns::open(path)
                .ok()
                .filter(|netns| netns.cookie() == cookie)
        });
        let taken = match &netns {
            None => Err("no process and no name leads to its namespace".to_owned()),
            Some(netns) if enrolled.contains(&cookie) => {
                // First, so that the new programs never miss them.
                for pid in &ztunnels {
                    if let Err(error) = listeners::fetch(node, netns, *pid) {
                        tracing::warn!(%cookie, pid, %error, "ztunnel's listeners are found when it connects again");
                    }
                }
                pod::attach(node, netns, &policy(cookie)).map_err(|error| error.to_string())
            }
            // It is let go already, and has connections from before.
            Some(netns) => pod::keep_draining(node, netns)
                .map(|()| pod::Attached::Updated)
                .map_err(|error| error.to_string()),
        };
        match taken {
            Ok(_) => done.pods += 1,
            Err(why) => done.left.push((cookie, why)),
        }
    }
    let _lock = node.lock()?;
    finish(node)?;
    Ok(done)
}

/// Removes what earlier versions pinned, once nothing depends on it. The caller holds the lock.
pub(super) fn finish(node: &Node) -> Result<()> {
    let earlier = node.pins().earlier();
    if earlier.is_empty() {
        return Ok(());
    }
    let enrolled = enrolled(&earlier)?;
    for (cookie, _) in pinned(&earlier)? {
        let captured = || Ok::<_, Error>(node.maps().pods.get(&cookie.0)?.is_some());
        let taken =
            node.pins().pod(cookie).exists() && (!enrolled.contains(&cookie) || captured()?);
        if !taken {
            return Ok(());
        }
    }
    for before in &earlier {
        take_away(before)?;
    }
    tracing::info!("what another version had pinned is removed");
    Ok(())
}

/// The pods' links first, and not by the loss of their pins, which takes effect a while later: with the last pin of its maps
/// the jump to `culvert_steer` ends, and a program without it drops what the new ones let pass.
fn take_away(before: &Pins) -> Result<()> {
    for cookie in before.pods() {
        let path = before.pod(cookie);
        if let Ok(link) = sys::obj_get(&path) {
            sys::link_detach(link.as_fd())
                .map_err(|e| Error::system("detach program", path.display(), e))?;
        }
    }
    for part in ["pods", "links", "maps"] {
        pins::remove(&before.root().join(part))?;
    }
    pins::remove(before.root())
}

/// Programs of another version still capture this pod.
pub(super) fn holds(pins: &Pins, cookie: NetnsCookie) -> bool {
    pins.earlier()
        .iter()
        .any(|before| before.pod(cookie).exists())
}

/// Lets the pod go from the programs of earlier versions. The caller holds the lock.
pub(super) fn forget(pins: &Pins, cookie: NetnsCookie) -> Result<()> {
    for before in pins.earlier() {
        let path = before.map(map_names::PODS);
        if let Ok(pods) = sys::obj_get(&path) {
            sys::map_delete(pods.as_fd(), &cookie.0.to_ne_bytes())
                .map_err(|e| Error::system("delete from", path.display(), e))?;
        }
        pins::remove(&before.pod(cookie))?;
    }
    Ok(())
}
