//! Is what is programmed still there? Two ways of asking: a few system calls a pod, for every pass over all of them,
//! and everything about one pod.
//!
//! Reads only. What it finds is for the caller to mend, by attaching again.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    os::fd::{AsFd, BorrowedFd},
};

use culvert_ebpf::abi::{pod_flags, programs};
use serde::Serialize;

use super::{
    dns,
    error::Result,
    netconf,
    netlink::Rtnetlink,
    netns::{Netns, NetnsCookie},
    node::Node,
    object::{ATTACH_SETSOCKOPT, ATTACH_SOCK_CREATE, ATTACH_SOCK_OPS},
    pod, resolv_conf, sys, sysctl,
};
use crate::plan::netns::{self as plan, Observed, Step};

/// What is not as it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A program of the node is not attached, or not in its place.
    Program,
    /// A program for DNS over UDP is not attached, not run or not where pods are, and a pod has them on; or the pod's
    /// resolvers are others by now.
    Dns,
    /// The pod has no entry in `PODS`: nothing of it is captured.
    Entry,
    /// The pod's `culvert_enter` is not pinned, or not attached to its namespace.
    Link,
    /// Rules of ours in the namespace.
    Rule,
    /// Routes of ours in the namespace.
    Route,
    /// Addresses that count as the pod's.
    Address,
    /// A sysctl of the namespace.
    Sysctl,
}

impl Kind {
    /// What a step of a plan is about.
    pub(super) fn of(step: &Step) -> Self {
        match step {
            Step::AddRule(_) | Step::DelRule(_) => Self::Rule,
            Step::AddRoute(_) | Step::DelRoute(_) => Self::Route,
        }
    }
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// The pod; none when it concerns the whole node.
    pub cookie: Option<NetnsCookie>,
    /// What kind of thing.
    pub kind: Kind,
    /// In words.
    pub what: String,
}

/// Something of ours that was gone or changed, and is as it should be again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repair {
    /// What kind of thing.
    pub kind: Kind,
    /// In words.
    pub what: String,
}

impl std::fmt::Display for Repair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.what)
    }
}

impl Problem {
    fn pod(cookie: NetnsCookie, kind: Kind, what: impl Into<String>) -> Self {
        Self {
            cookie: Some(cookie),
            kind,
            what: what.into(),
        }
    }
}

/// The node's programs, and of each pod its entry and its link: microseconds a pod. Where lookups are captured by what
/// pods' `resolv.conf` say, a look through all processes as well.
pub fn verify_quick(node: &Node, places: &[&Netns]) -> Result<Vec<Problem>> {
    let mut problems = verify_programs(node)?;
    let mut following = Vec::new();
    for place in places {
        let cookie = place.cookie();
        match node.maps().pods.get(&cookie.0)? {
            None => {
                let what = "not enrolled: nothing of it is captured";
                problems.push(Problem::pod(cookie, Kind::Entry, what));
            }
            Some(pod) if pod.flags & (pod_flags::DNS_PENDING | pod_flags::DNS_FOLLOWED) != 0 => {
                following.push(*place);
            }
            Some(_) => {}
        }
        problems.extend(link(node, cookie, None));
    }
    if !following.is_empty() {
        problems.extend(resolvers(node, &following)?);
    }
    Ok(problems)
}

/// Pods whose `resolv.conf` names others than those whose lookups are captured. While there is no process there is no
/// file, and nobody who asks.
fn resolvers(node: &Node, places: &[&Netns]) -> Result<Vec<Problem>> {
    let mut found = resolv_conf::of_each(places)?;
    let captured = node.resolvers()?;
    let mut problems = Vec::new();
    for place in places {
        let cookie = place.cookie();
        let captured = captured.get(&cookie).map_or(&[][..], Vec::as_slice);
        if let Some(now) = found.remove(&(place.dev(), place.inode()))
            && now != captured
        {
            let what = format!(
                "its resolv.conf names {now:?}, the list of captured lookups {captured:?}: attach again"
            );
            problems.push(Problem::pod(cookie, Kind::Dns, what));
        }
    }
    Ok(problems)
}

/// The node's programs alone.
pub fn verify_programs(node: &Node) -> Result<Vec<Problem>> {
    let mut problems = Vec::new();
    let mut wrong = |name: &str, what: &str| {
        problems.push(Problem {
            cookie: None,
            kind: Kind::Program,
            what: format!("{name} {what}"),
        });
    };
    for (name, kind) in [
        (programs::CONNECT, ATTACH_SOCK_OPS),
        (programs::SOCKOPT, ATTACH_SETSOCKOPT),
        (programs::VOUCH, ATTACH_SOCK_CREATE),
    ] {
        let info = sys::obj_get(&node.pins().link(name))
            .and_then(|link| sys::cgroup_link_info(link.as_fd()));
        match info {
            Err(_) => wrong(name, "is not pinned"),
            Ok(info) if info.target == 0 => wrong(name, "is not attached: its cgroup is gone"),
            // A link may be there and the cgroup run something else all the same: ask the cgroup.
            Ok(info) => match node.cgroup().map(|dir| effective(dir, kind)) {
                Some(Ok(ids)) if !ids.contains(&info.prog_id) => {
                    wrong(name, "is pinned, but its cgroup does not run it");
                }
                Some(Err(error)) => return Err(error),
                _ => {}
            },
        }
    }
    if node.maps().steer.get(&0)?.is_none() {
        wrong(programs::STEER, "is not in its place: nothing is steered");
    }
    if dns::wanted(node)? {
        problems.extend(dns::problems(node).into_iter().map(|what| Problem {
            cookie: None,
            kind: Kind::Dns,
            what,
        }));
    }
    Ok(problems)
}

fn effective(cgroup: BorrowedFd<'_>, kind: u32) -> Result<Vec<u32>> {
    sys::prog_query_effective(cgroup, kind)
        .map_err(|e| super::Error::system("list programs of", "the cgroup", e))
}

/// Everything about one pod but what [`verify_quick`] says of the node.
pub fn verify_deep(node: &Node, netns: &Netns) -> Result<Vec<Problem>> {
    let guard = netns.enter()?;
    let observed = netconf::observe(&guard, &mut Rtnetlink::open()?)?;
    let sysctls = sysctl::wrong(&guard)?;
    drop(guard);
    let cookie = netns.cookie();
    let known = node.maps().pod_addrs.keys()?;
    let known = known.into_iter().filter(|k| k.cookie == cookie.0);
    let known: BTreeSet<IpAddr> = known.map(|k| k.addr.into()).collect();
    compare(node, netns, &observed, &sysctls, &known)
}

/// What is wrong with a pod whose namespace was read already.
pub(super) fn compare(
    node: &Node,
    netns: &Netns,
    observed: &Observed,
    sysctls: &[&'static str],
    known: &BTreeSet<IpAddr>,
) -> Result<Vec<Problem>> {
    let cookie = netns.cookie();
    let problem = |kind, what: String| Problem::pod(cookie, kind, what);
    let Some(entry) = node.maps().pods.get(&cookie.0)? else {
        let what = "not enrolled: attach it, or detach it again once its connections have ended";
        return Ok(vec![problem(Kind::Entry, what.to_owned())]);
    };
    let mut problems = Vec::new();
    let concerned = match entry.flags & pod_flags::IPV4_ONLY {
        0 => observed.clone(),
        _ => observed.clone().ipv4_alone(),
    };
    for step in plan::enrol(&concerned, &pod::virtual_names(&entry, observed)) {
        problems.push(problem(
            Kind::of(&step),
            format!("to do: {step}; attach again, or run `culvert netns watch`"),
        ));
    }
    let own: BTreeSet<IpAddr> = observed.own().into_iter().collect();
    if *known != own {
        problems.push(problem(
            Kind::Address,
            format!(
                "addresses known {known:?}, present {own:?}: attach again, or run `culvert netns watch`"
            ),
        ));
    }
    for path in sysctls {
        problems.push(problem(
            Kind::Sysctl,
            format!("{path} is not 1: attach again"),
        ));
    }
    if entry.flags & (pod_flags::DNS_PENDING | pod_flags::DNS_FOLLOWED) != 0 {
        problems.extend(resolvers(node, &[netns])?);
    }
    problems.extend(link(node, cookie, Some(netns.inode())));
    Ok(problems)
}

/// The pod's link is pinned and attached, to this namespace where its inode is known.
fn link(node: &Node, cookie: NetnsCookie, inode: Option<u64>) -> Option<Problem> {
    let target = sys::obj_get(&node.pins().pod(cookie))
        .and_then(|link| sys::netns_link_info(link.as_fd()))
        .map_or(0, |info| info.target);
    let attached = target != 0 && inode.is_none_or(|inode| inode == target);
    let what = "culvert_enter is not attached: attach again";
    (!attached).then(|| Problem::pod(cookie, Kind::Link, what))
}
