//! ztunnel's listeners: naming its process, and fetching listeners that the kernel side did not see open.
//!
//! `culvert_connect` registers a listener when it opens. One that was open before is fetched from ztunnel's
//! process with pidfd_getfd(2) and entered from here.

use std::{
    net::IpAddr,
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
};

use culvert_ebpf::abi::{
    INITIAL_ORDER, LISTENER_SLOTS, LOOPBACK_IFINDEX, ListenerKey, Role, RoleKey, mark,
    newest_first, port, role,
};

use super::{
    error::{Error, Result},
    netns::{Guard, Netns},
    node::Node,
    process::{self, Process},
    procfs,
    sockdiag::{self, InetSocket},
    sys,
};

/// Is it a process that can be named as ztunnel?
pub fn check_process(pid: u32) -> Result<()> {
    process::identify(pid, "").map(drop)
}

/// Says that a process (its thread group) may pass for ztunnel; forgets those that are gone.
pub fn name_process(node: &Node, pid: u32) -> Result<()> {
    let identity = process::identify(pid, "")?;
    let _lock = node.lock()?;
    process::name(node, &node.maps().ztunnels, &identity).map(drop)
}

/// Which role a listening socket plays.
#[must_use]
pub fn role_of(socket: &InetSocket) -> Option<u32> {
    match socket.port {
        port::OUTBOUND => Some(role::OUTBOUND),
        port::INBOUND => Some(role::INBOUND),
        port::HBONE => Some(role::HBONE),
        port::DNS if matches!(socket.local, IpAddr::V4(_)) => Some(role::DNS4),
        port::DNS => Some(role::DNS6),
        _ => None,
    }
}

/// The roles' names, by number.
pub const ROLE_NAMES: [&str; role::COUNT as usize] =
    ["outbound", "inbound", "hbone", "dns4", "dns6"];

/// Cookies of the sockets registered for a pod, with their role and slot.
pub fn registered(node: &Node, netns: &Netns) -> Result<Vec<(u32, u32, u64)>> {
    let mut found = Vec::new();
    for role in 0..role::COUNT {
        found.extend(registered_as(node, netns, role)?);
    }
    Ok(found)
}

fn registered_as(node: &Node, netns: &Netns, role: u32) -> Result<Vec<(u32, u32, u64)>> {
    let mut found = Vec::new();
    for slot in 0..LISTENER_SLOTS {
        let key = ListenerKey {
            cookie: netns.cookie().0,
            role,
            slot,
        };
        let socket = node.maps().listeners.get(&key)?;
        found.extend(socket.map(|cookie| (role, slot, cookie)));
    }
    Ok(found)
}

/// Does the kernel know those that a pod cannot be without? ztunnel's for lookups are not among them: it may have none.
pub fn complete(node: &Node, netns: &Netns) -> Result<bool> {
    for role in [role::OUTBOUND, role::INBOUND, role::HBONE] {
        if registered_as(node, netns, role)?.is_empty() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Enters listeners of process `pid` in the pod that are not registered, whatever their role; returns how many. All its
/// sockets there are noted as its own: those that were marked before the process was named would pass for the pod's,
/// lookups find no ztunnel then, and a listener that closes is not missed.
pub fn fetch(node: &Node, netns: &Netns, pid: u32) -> Result<usize> {
    let _lock = node.lock()?;
    let (open, datagram) = {
        let guard = netns.enter()?;
        (sockdiag::listeners(&guard)?, sockdiag::datagram(&guard))
    };
    let marked = |s: &&InetSocket| s.mark & mark::MASK == mark::ZTUNNEL;
    let process = Process::open(pid)?;
    match datagram {
        Ok(datagram) => {
            for socket in datagram.iter().filter(marked) {
                if let Some(fd) = process.socket(socket.inode)? {
                    note(node, netns, &fd)?;
                }
            }
        }
        Err(error) => {
            tracing::warn!(%error, "ztunnel's datagram sockets are not known: it is told by those it opens from now on");
        }
    }
    let known = registered(node, netns)?;
    let mut entered = 0;
    for socket in open.iter().filter(marked) {
        let Some(role) = role_of(socket) else {
            continue;
        };
        let Some(fd) = process.socket(socket.inode)? else {
            continue;
        };
        note(node, netns, &fd)?;
        if !known.iter().any(|(_, _, cookie)| *cookie == socket.cookie) {
            enter(node, netns, role, &fd)?;
            entered += 1;
        }
    }
    Ok(entered)
}

/// Writes down that a socket is ztunnel's: it is what tells this one from an impostor's.
fn note(node: &Node, netns: &Netns, socket: &OwnedFd) -> Result<()> {
    sys::map_update(
        sys::fd(&node.maps().ztunnel_sockets),
        &socket.as_raw_fd().to_ne_bytes(),
        &1_u32.to_ne_bytes(),
        0,
    )
    .map_err(|e| Error::system("register a socket of", netns.path().display(), e))
}

fn enter(node: &Node, netns: &Netns, role: u32, socket: &OwnedFd) -> Result<()> {
    let cookie = netns.cookie().0;
    let maps = node.maps();
    let raw = u64::from(socket.as_raw_fd().unsigned_abs());
    let key = RoleKey {
        cookie,
        role,
        pad: 0,
    };
    let present = maps.roles.get(&key)?;
    let order = present.map_or(INITIAL_ORDER, |r| r.order);
    let mut slot = (order >> (2 * (LISTENER_SLOTS - 1))) & 3;
    for candidate in 0..LISTENER_SLOTS {
        if maps
            .listeners
            .get(&ListenerKey {
                cookie,
                role,
                slot: candidate,
            })?
            .is_none()
        {
            slot = candidate;
            break;
        }
    }
    maps.listeners
        .set(&ListenerKey { cookie, role, slot }, &raw)?;
    let live = present.map_or(0, |r| r.live) + 1;
    maps.roles.set(
        &key,
        &Role {
            order: newest_first(order, slot),
            live,
            away_since: 0,
        },
    )
}

/// Frees the application's listeners of what would keep ztunnel's deliveries from them: a mark of their own
/// would send their answers out of the pod, and one bound to a device sees nothing that comes by `lo`.
/// `culvert_sockopt` keeps both from happening once the pod is enrolled; this is for listeners from before.
/// Returns how many were changed.
pub(super) fn free(guard: &Guard<'_>) -> Result<usize> {
    let link_local = |ip: IpAddr| matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local());
    let in_the_way = |s: &InetSocket| {
        let marked = s.mark != 0 && s.mark & mark::MASK != mark::ZTUNNEL;
        marked || s.device != 0 && s.device != LOOPBACK_IFINDEX && !link_local(s.local)
    };
    let mut wanted: Vec<InetSocket> = sockdiag::listeners(guard)?
        .into_iter()
        .filter(in_the_way)
        .collect();
    let mut changed = 0;
    if wanted.is_empty() {
        return Ok(0);
    }
    let mut denied = None;
    // Rare, so a look through all processes is no matter of time.
    for pid in procfs::processes(Path::new(procfs::PROC))? {
        if wanted.is_empty() {
            break;
        }
        // Processes end while we look; what cannot be copied is reported below.
        let Ok(process) = Process::open(pid) else {
            continue;
        };
        wanted.retain(|socket| match process.socket(socket.inode) {
            Ok(Some(fd)) => match unbind(&fd) {
                Ok(()) => {
                    changed += 1;
                    false
                }
                Err(error) => {
                    denied = Some(error);
                    true
                }
            },
            Ok(None) => true,
            Err(error) => {
                denied = Some(error);
                true
            }
        });
    }
    let why = denied.as_ref().map(tracing::field::display);
    for socket in wanted {
        tracing::warn!(
            local = %socket.local, port = socket.port, mark = socket.mark, device = socket.device, error = why,
            "this listener keeps its mark or device, and ztunnel cannot deliver to it: restart the application"
        );
    }
    Ok(changed)
}

fn unbind(socket: &OwnedFd) -> Result<()> {
    use nix::sys::socket::{setsockopt, sockopt};
    let fail = |e: nix::Error| Error::system("free", "a listener of its mark and device", e.into());
    setsockopt(socket, sockopt::Mark, &0).map_err(fail)?;
    setsockopt(socket, sockopt::BindToDevice, &std::ffi::OsString::new()).map_err(fail)
}
