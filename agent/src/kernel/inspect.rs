//! Looking at what is programmed: which pods, whether each is whole, whose the listeners are, how it decided.
//!
//! Reads only.

use std::{collections::BTreeMap, net::IpAddr, os::fd::AsFd, path::PathBuf};

use culvert_ebpf::{
    abi::{RoleKey, mark, pod_flags, role},
    addr::Addr,
    decide::Verdict,
};
use serde::Serialize;

use super::{
    dns,
    error::Result,
    listeners::{self, ROLE_NAMES},
    netconf,
    netlink::Rtnetlink,
    netns::{self, Netns, NetnsCookie},
    node::Node,
    sockdiag, sys, sysctl, verify,
};
use crate::plan::netns as plan;

/// Where a pod stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Captured.
    Enrolled,
    /// Let go; old connections still use our rules. Or an attach that was killed before it switched on.
    Draining,
    /// The namespace is gone.
    Dead,
}

/// A pod in a list.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Identity.
    pub cookie: NetnsCookie,
    /// Inode of the namespace.
    pub inode: u64,
    /// A path of it, when one is found.
    pub path: Option<PathBuf>,
    /// State.
    pub state: State,
    /// Addresses that count as its own.
    pub addresses: Vec<IpAddr>,
    /// Seconds since 1970.
    pub enrolled_at: u64,
}

/// A registered listener of ztunnel.
#[derive(Clone, Debug, Serialize)]
pub struct Listener {
    /// Role.
    pub role: &'static str,
    /// Socket cookie.
    pub socket: u64,
    /// Tried first, second, ...
    pub rank: usize,
    /// Address it listens on; none if the kernel lists no such socket.
    pub local: Option<String>,
    /// IP_TRANSPARENT, which answering from foreign addresses takes.
    pub transparent: Option<bool>,
}

/// Everything about one pod.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// As in the list.
    #[serde(flatten)]
    pub summary: Summary,
    /// Everything that should be there is.
    pub whole: bool,
    /// What is not as it should be, each with its cure.
    pub problems: Vec<String>,
    /// What deserves attention but is no fault.
    pub notes: Vec<String>,
    /// Settings in force.
    pub policy: BTreeMap<&'static str, serde_json::Value>,
    /// Rules and routes of ours in the namespace.
    pub programmed: Vec<String>,
    /// ztunnel's listeners.
    pub listeners: Vec<Listener>,
    /// Connections that carry a mark of ours.
    pub marked_connections: usize,
    /// The programs for DNS over UDP; none when no pod ever had capture on.
    pub dns: Option<dns::Hooks>,
    /// Decisions since enrolment.
    pub counters: BTreeMap<&'static str, u64>,
}

fn summary(
    node: &Node,
    cookie: NetnsCookie,
    paths: &[((u64, u64), PathBuf)],
    own: Vec<IpAddr>,
) -> Result<Summary> {
    let record = node.maps().records.get(&cookie.0)?;
    let target = sys::obj_get(&node.pins().pod(cookie))
        .ok()
        .and_then(|link| sys::netns_link_info(link.as_fd()).ok())
        .map(|info| info.target);
    let entry = node.maps().pods.get(&cookie.0)?;
    let enrolled = entry.is_some_and(|pod| pod.flags & pod_flags::LEAVING == 0);
    let id = record.map(|r| (r.netns_dev, r.netns_inode));
    Ok(Summary {
        cookie,
        inode: record.map_or(0, |r| r.netns_inode),
        path: paths
            .iter()
            .find(|(at, _)| Some(*at) == id)
            .map(|(_, path)| path.clone()),
        state: match target {
            Some(0) => State::Dead,
            _ if enrolled => State::Enrolled,
            _ => State::Draining,
        },
        addresses: own,
        enrolled_at: record.map_or(0, |r| r.enrolled_at),
    })
}

/// Pods with anything of ours.
pub fn list(node: &Node) -> Result<Vec<Summary>> {
    let mut cookies: Vec<NetnsCookie> = node.pins().pods();
    cookies.extend(node.maps().records.keys()?.into_iter().map(NetnsCookie));
    cookies.sort_unstable();
    cookies.dedup();
    let paths = netns::paths();
    let mut own: BTreeMap<u64, Vec<IpAddr>> = BTreeMap::new();
    for key in node.maps().pod_addrs.keys()? {
        own.entry(key.cookie).or_default().push(key.addr.into());
    }
    cookies
        .into_iter()
        .map(|cookie| {
            let mut addresses = own.remove(&cookie.0).unwrap_or_default();
            addresses.sort_unstable();
            summary(node, cookie, &paths, addresses)
        })
        .collect()
}

/// One pod in full; none when there is nothing of ours.
pub fn show(node: &Node, netns: &Netns) -> Result<Option<Report>> {
    let Some(summary) = list(node)?.into_iter().find(|s| s.cookie == netns.cookie()) else {
        return Ok(None);
    };
    let summary = Summary {
        path: Some(netns.path().to_owned()),
        ..summary
    };
    let guard = netns.enter()?;
    let observed = netconf::observe(&guard, &mut Rtnetlink::open()?)?;
    let open = sockdiag::listeners(&guard)?;
    let marked_connections = sockdiag::marked(&guard, mark::FAMILY, mark::FAMILY_MASK)?;
    let wrong_sysctls = sysctl::wrong(&guard)?;
    drop(guard);
    let ours = |r: &&plan::Rule| r.protocol == plan::PROTOCOL;
    let rules: Vec<String> = observed
        .rules
        .iter()
        .filter(ours)
        .map(ToString::to_string)
        .collect();
    let routes = observed.routes.iter().map(ToString::to_string);
    let mut report = Report {
        whole: false,
        notes: Vec::new(),
        policy: policy(node, netns)?,
        programmed: rules.into_iter().chain(routes).collect(),
        listeners: listeners_of(node, netns, &open)?,
        marked_connections,
        dns: dns::look(node)?,
        counters: counters(node, netns)?,
        problems: Vec::new(),
        summary,
    };
    let known = report.summary.addresses.iter().copied().collect();
    let problems = verify::compare(node, netns, &observed, &wrong_sysctls, &known)?;
    let mut problems = problems.into_iter().map(|p| p.what).collect::<Vec<_>>();
    if report.policy.get("dns") == Some(&true.into()) {
        match &report.dns {
            None => problems.push("the DNS programs are not attached: attach again".to_owned()),
            Some(hooks) => {
                problems.extend(hooks.problems.iter().cloned());
                report.notes.extend(hooks.ahead.iter().map(|other| {
                    format!("{other} runs before the DNS programs: it may replace resolvers' addresses first")
                }));
            }
        }
    }
    if report.summary.state == State::Enrolled {
        let foreign = observed.rules.iter().filter(|r| {
            r.pref == 0 && r.protocol != plan::PROTOCOL && (r.foreign || r.mark.is_some())
        });
        for rule in foreign {
            report
                .notes
                .push(format!("somebody else's rule stands beside ours: {rule}"));
        }
    }
    for role in [role::OUTBOUND, role::INBOUND, role::HBONE] {
        let name = ROLE_NAMES[role as usize];
        if !report.listeners.iter().any(|l| l.role == name) {
            let then = if role == role::OUTBOUND {
                "new connections wait, then are refused"
            } else {
                "its connections are refused"
            };
            report
                .notes
                .push(format!("no ztunnel listens as {name}: {then}"));
        }
    }
    for listener in &report.listeners {
        if listener.transparent == Some(false) {
            report.notes.push(format!(
                "ztunnel's {} listener is not transparent: give ztunnel CAP_NET_ADMIN, or its answers have no way out",
                listener.role
            ));
        }
    }
    if report.summary.state == State::Enrolled
        && report.policy.get("ztunnel_named") == Some(&false.into())
    {
        report.notes.push(
            "ztunnel is told by its mark alone: name its process with --ztunnel PID".to_owned(),
        );
    }
    report.whole = problems.is_empty();
    report.problems = problems;
    Ok(Some(report))
}

fn policy(node: &Node, netns: &Netns) -> Result<BTreeMap<&'static str, serde_json::Value>> {
    let cookie = netns.cookie().0;
    let mut out = BTreeMap::new();
    let Some(pod) = node.maps().pods.get(&cookie)? else {
        return Ok(out);
    };
    let on = |flag| serde_json::Value::from(pod.flags & flag != 0);
    out.insert("dns", on(pod_flags::DNS));
    out.insert("ipv4_only", on(pod_flags::IPV4_ONLY));
    if pod.flags & pod_flags::DNS_LISTED != 0 {
        let resolvers = node
            .resolvers()?
            .remove(&netns.cookie())
            .unwrap_or_default();
        out.insert(
            "dns_resolvers",
            resolvers.iter().map(ToString::to_string).collect(),
        );
    }
    if pod.flags & pod_flags::DNS_PENDING != 0 {
        out.insert("dns_resolvers", "not known yet, so all".into());
    }
    out.insert("bypass_inbound", on(pod_flags::BYPASS_INBOUND));
    out.insert("ztunnel_named", on(pod_flags::NAMED_ZTUNNEL));
    out.insert(
        "hold_seconds",
        if pod.hold == u64::MAX {
            "forever".into()
        } else {
            (pod.hold / 1_000_000_000).into()
        },
    );
    let virtual_interfaces: Vec<u32> = pod
        .virtual_ifindexes
        .into_iter()
        .filter(|i| *i != 0)
        .collect();
    out.insert("virtual_interface_indexes", virtual_interfaces.into());
    let mut outbound = Vec::new();
    let mut inbound = Vec::new();
    for key in node
        .maps()
        .excluded_ports
        .keys()?
        .into_iter()
        .filter(|k| k.cookie == cookie)
    {
        if key.inbound == 0 {
            outbound.push(key.port)
        } else {
            inbound.push(key.port)
        }
    }
    outbound.sort_unstable();
    inbound.sort_unstable();
    out.insert("exclude_outbound_ports", outbound.into());
    out.insert("exclude_inbound_ports", inbound.into());
    let mut cidrs = Vec::new();
    for key in node.maps().excluded_cidrs.keys()? {
        let data = key.data;
        if data.cookie == cookie {
            cidrs.push(cidr(data.addr, key.prefix_len));
        }
    }
    cidrs.sort_unstable();
    out.insert("exclude_outbound_cidrs", cidrs.into());
    let away = node.maps().roles.get(&RoleKey {
        cookie,
        role: role::OUTBOUND,
        pad: 0,
    })?;
    let since = away.map_or(0, |r| r.away_since);
    let seconds = (since != 0).then(|| super::events::now().saturating_sub(since) / 1_000_000_000);
    out.insert("ztunnel_away_seconds", seconds.into());
    Ok(out)
}

fn cidr(network: Addr, prefix_len: u32) -> String {
    let skipped = 64 + if network.is_v4() { 96 } else { 0 };
    format!(
        "{}/{}",
        IpAddr::from(network),
        prefix_len.saturating_sub(skipped)
    )
}

fn listeners_of(
    node: &Node,
    netns: &Netns,
    open: &[sockdiag::InetSocket],
) -> Result<Vec<Listener>> {
    let mut found = Vec::new();
    for (number, slot, socket) in listeners::registered(node, netns)? {
        let key = RoleKey {
            cookie: netns.cookie().0,
            role: number,
            pad: 0,
        };
        let order = node
            .maps()
            .roles
            .get(&key)?
            .map_or(culvert_ebpf::abi::INITIAL_ORDER, |r| r.order);
        let rank =
            (0..culvert_ebpf::abi::LISTENER_SLOTS).position(|i| (order >> (2 * i)) & 3 == slot);
        let seen = open.iter().find(|s| s.cookie == socket);
        found.push(Listener {
            role: ROLE_NAMES[number as usize],
            socket,
            rank: rank.unwrap_or(0),
            local: seen.map(|s| std::net::SocketAddr::new(s.local, s.port).to_string()),
            transparent: seen.and_then(|s| s.transparent),
        });
    }
    found.sort_by_key(|l| (ROLE_NAMES.iter().position(|n| *n == l.role), l.rank));
    for role in ROLE_NAMES {
        let alive = found.iter_mut().filter(|l| l.role == role);
        alive
            .enumerate()
            .for_each(|(rank, listener)| listener.rank = rank);
    }
    Ok(found)
}

fn counters(node: &Node, netns: &Netns) -> Result<BTreeMap<&'static str, u64>> {
    let Some(counters) = node.maps().counters.get(netns.cookie().0)? else {
        return Ok(BTreeMap::new());
    };
    Ok(Verdict::ALL
        .into_iter()
        .map(|v| (v.name(), counters.by_verdict[v as usize]))
        .collect())
}
