//! Bringing an enrolled pod up to date with its namespace, and telling what was the pod's doing from what somebody did
//! to us.
//!
//! Takes the world as it is and makes ours fit; never enrols what is not enrolled.

use std::net::IpAddr;

use culvert_ebpf::abi::{Pod, pod_flags};

use super::entries::{set_addresses, set_interfaces};
use crate::{
    kernel::{
        error::Result,
        netconf,
        netlink::{Heard, Rtnetlink},
        netns::Netns,
        node::Node,
        sysctl,
        verify::{Kind, Repair},
    },
    plan::netns::{self as plan, Family, Observed, Rule, Step},
};

/// What bringing a pod up to date took.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Synced {
    /// Changes that follow from the pod's own: addresses and interfaces that came and went.
    pub followed: Vec<String>,
    /// What was ours and somebody had taken away or changed.
    pub repaired: Vec<Repair>,
}

/// Brings an enrolled pod's addresses, routes, rules, interfaces and sysctls up to date with its namespace.
/// None when it is not enrolled any more.
pub(in crate::kernel) fn sync(node: &Node, netns: &Netns, heard: Heard) -> Result<Option<Synced>> {
    let cookie = netns.cookie();
    let _lock = node.lock()?;
    let Some(mut pod) = node.maps().pods.get(&cookie.0)? else {
        return Ok(None);
    };
    let guard = netns.enter()?;
    let mut netlink = Rtnetlink::open()?;
    let mut observed = netconf::observe(&guard, &mut netlink)?;
    if pod.flags & pod_flags::IPV4_ONLY != 0 {
        observed = observed.ipv4_alone();
    }
    let virtual_interfaces = virtual_names(&pod, &observed);
    let mut synced = Synced::default();
    // New addresses count as own before anything else: until then connections to them are refused.
    let changed = set_addresses(node, cookie, &observed.own(), true)?;
    let say = |what: &'static str| move |ip: IpAddr| format!("address {ip} {what}");
    synced
        .followed
        .extend(changed.added.into_iter().map(say("came")));
    synced
        .followed
        .extend(changed.removed.into_iter().map(say("went")));
    let steps = plan::enrol(&observed, &virtual_interfaces);
    netconf::apply(&guard, &mut netlink, &steps)?;
    for step in &steps {
        if follows(step, &observed, heard) {
            synced.followed.push(step.to_string());
        } else {
            synced.repaired.push(Repair {
                kind: Kind::of(step),
                what: step.to_string(),
            });
        }
    }
    let sysctls = sysctl::set_all(&guard)?;
    drop(guard);
    synced.repaired.extend(sysctls.into_iter().map(set_again));
    let before = pod;
    set_interfaces(&mut pod, &observed, &virtual_interfaces);
    if pod != before {
        node.maps().pods.set(&cookie.0, &pod)?;
        if synced.followed.is_empty() {
            synced.followed.push("interfaces changed".to_owned());
        }
    }
    Ok(Some(synced))
}

/// Sets the pod's sysctls again where somebody changed them; returns which.
pub(in crate::kernel) fn sync_sysctls(node: &Node, netns: &Netns) -> Result<Vec<Repair>> {
    let _lock = node.lock()?;
    // A pod that is being let go gets its own values back: not against that.
    if node.maps().pods.get(&netns.cookie().0)?.is_none() {
        return Ok(Vec::new());
    }
    let guard = netns.enter()?;
    Ok(sysctl::set_all(&guard)?
        .into_iter()
        .map(set_again)
        .collect())
}

fn set_again(path: &str) -> Repair {
    Repair {
        kind: Kind::Sysctl,
        what: format!("{path} set to 1 again"),
    }
}

/// Does this step follow from what the pod did itself?
///
/// The kernel takes routes away with a device or an address, so with those they are the pod's doing. Rules it never
/// touches, unless IPv6 was just switched on.
fn follows(step: &Step, observed: &Observed, heard: Heard) -> bool {
    let ours = |family: Family| {
        let mine = |r: &&Rule| r.protocol == plan::PROTOCOL && r.family == family;
        observed.rules.iter().find(mine).is_some()
    };
    heard.interfaces
        && match step {
            Step::AddRoute(_) | Step::DelRoute(_) => true,
            Step::AddRule(rule) | Step::DelRule(rule) => {
                rule.family == Family::V6 && !ours(Family::V6) && ours(Family::V4)
            }
        }
}

/// The virtual interfaces an enrolled pod was given. Our rules remember their names, also of those that are not there
/// yet; should the rules be gone, the map still has the numbers of those that are.
pub(in crate::kernel) fn virtual_names(pod: &Pod, observed: &Observed) -> Vec<String> {
    let by_rule = observed
        .rules
        .iter()
        .filter(|r| r.protocol == plan::PROTOCOL)
        .filter_map(|r| r.iif.clone());
    let by_number = observed
        .links
        .iter()
        .filter(|l| l.index != 0 && pod.virtual_ifindexes.contains(&l.index))
        .map(|l| l.name.clone());
    let mut names: Vec<String> = by_rule.chain(by_number).collect();
    names.sort_unstable();
    names.dedup();
    names
}
