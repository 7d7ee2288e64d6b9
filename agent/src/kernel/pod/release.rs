//! Letting a pod go, and clearing up after those that went by themselves.

use std::os::fd::AsFd;

use culvert_ebpf::abi::{Record, UsualKey, mark, pod_flags};

use super::{
    Detached,
    entries::{exclude_everything, forget_maps},
};
use crate::{
    kernel::{
        earlier,
        error::{Error, Result},
        netconf,
        netlink::Rtnetlink,
        netns::{self, Guard, Netns, NetnsCookie},
        node::Node,
        pins, sockdiag, strays, sys, sysctl,
    },
    plan::netns as plan,
};

/// New connections go direct from here on, as with everything excluded; but what peers that have not heard yet send by
/// ztunnel is still delivered, for which the programs must know the pod. Returns how many old connections need it; to be
/// followed by [`detach`].
pub fn release(node: &Node, netns: &Netns) -> Result<usize> {
    let _lock = node.lock()?;
    let cookie = netns.cookie();
    earlier::forget(node.pins(), cookie)?;
    if let Some(mut pod) = node.maps().pods.get(&cookie.0)? {
        exclude_everything(node, cookie)?;
        pod.flags |= pod_flags::LEAVING | pod_flags::CIDRS | pod_flags::BYPASS_INBOUND;
        pod.flags &= !(pod_flags::DNS
            | pod_flags::DNS_LISTED
            | pod_flags::DNS_PENDING
            | pod_flags::DNS_FOLLOWED);
        node.maps().pods.set(&cookie.0, &pod)?;
    }
    let guard = netns.enter()?;
    strays(cookie, &guard);
    sockdiag::marked(&guard, mark::FAMILY, mark::FAMILY_MASK)
}

/// Lets the pod go: new connections go direct at once, old ones live on.
pub fn detach(node: &Node, netns: &Netns) -> Result<Detached> {
    let _lock = node.lock()?;
    let_go(node, netns)
}

pub(super) fn let_go(node: &Node, netns: &Netns) -> Result<Detached> {
    let cookie = netns.cookie();
    let record = node.maps().records.get(&cookie.0)?;
    forget_maps(node, cookie)?;
    let guard = netns.enter()?;
    strays(cookie, &guard);
    let needed = sockdiag::marked(&guard, mark::FAMILY, mark::FAMILY_MASK)?;
    if needed > 0 && record.is_some() {
        return Ok(Detached::Draining(needed));
    }
    let had_rules = undo_namespace(&guard, record.as_ref())?;
    drop(guard);
    forget_pod(node, cookie)?;
    Ok(if record.is_some() || had_rules {
        Detached::Gone
    } else {
        Detached::NotEnrolled
    })
}

/// No lookup of theirs is lost for good when this fails, so nothing else has to.
pub(super) fn strays(cookie: NetnsCookie, guard: &Guard<'_>) {
    match strays::reconnect(guard) {
        Ok(0) => {}
        Ok(count) => {
            tracing::info!(%cookie, count, "sockets connected to their own resolvers again")
        }
        Err(error) => {
            tracing::warn!(%cookie, %error, "looking for sockets that are still connected to ztunnel's DNS");
        }
    }
}

/// Clears away what the kernel holds of a pod that is gone. Its namespace, should it still be there, is left as it is:
/// nobody runs in it any more.
pub fn forget(node: &Node, cookie: NetnsCookie) -> Result<()> {
    let _lock = node.lock()?;
    forget_maps(node, cookie)?;
    forget_pod(node, cookie)
}

/// Takes rules, routes and sysctls back; true when there were any.
fn undo_namespace(guard: &Guard<'_>, record: Option<&Record>) -> Result<bool> {
    let mut netlink = Rtnetlink::open()?;
    let observed = netconf::observe(guard, &mut netlink)?;
    let steps = plan::unenrol(&observed);
    netconf::apply(guard, &mut netlink, &steps)?;
    if let Some(record) = record {
        sysctl::restore(guard, record)?;
    }
    Ok(!steps.is_empty())
}

/// The last traces: link, counters, and the record, which is what finds the pod again until now.
fn forget_pod(node: &Node, cookie: NetnsCookie) -> Result<()> {
    pins::remove(&node.pins().pod(cookie))?;
    node.maps().counters.remove(cookie.0)?;
    for family in [4, 6] {
        let cookie = cookie.0;
        node.maps()
            .usual_resolvers
            .remove(&UsualKey { cookie, family })?;
    }
    node.maps().records.remove(&cookie.0)?;
    Ok(())
}

/// Removes what is left of pods whose namespace is gone, and of attaches that were killed before they
/// changed anything; lets drained pods go for good. Returns how many were cleaned up.
pub fn collect(node: &Node) -> Result<usize> {
    let _lock = node.lock()?;
    earlier::finish(node)?;
    let mut done = 0;
    let mut draining = Vec::new();
    let pinned = node.pins().pods();
    for cookie in &pinned {
        let path = node.pins().pod(*cookie);
        let link = sys::obj_get(&path).map_err(|e| Error::system("open", path.display(), e))?;
        let target = sys::netns_link_info(link.as_fd()).map_or(0, |info| info.target);
        if target == 0 {
            forget_maps(node, *cookie)?;
            forget_pod(node, *cookie)?;
            done += 1;
        } else if node.maps().pods.get(&cookie.0)?.is_none() {
            draining.push(*cookie);
        }
    }
    for cookie in node
        .maps()
        .records
        .keys()?
        .into_iter()
        .map(NetnsCookie)
        .filter(|c| !pinned.contains(c))
    {
        forget_maps(node, cookie)?;
        forget_pod(node, cookie)?;
        done += 1;
    }
    if draining.is_empty() {
        return Ok(done);
    }
    let paths = netns::paths();
    for cookie in draining {
        let Some(record) = node.maps().records.get(&cookie.0)? else {
            continue;
        };
        let at = paths
            .iter()
            .find(|(id, _)| *id == (record.netns_dev, record.netns_inode));
        let Some(netns) = at
            .and_then(|(_, path)| Netns::open(path).ok())
            .filter(|n| n.cookie() == cookie)
        else {
            continue;
        };
        if let_go(node, &netns)? == Detached::Gone {
            done += 1;
        }
    }
    Ok(done)
}
