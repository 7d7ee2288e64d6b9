//! What the maps hold of one pod: its entry in `PODS`, its addresses, its exclusions.
//!
//! Each function brings the maps to a wanted state and may be called again; the caller holds the lock.

use std::net::IpAddr;

use culvert_ebpf::{
    abi::{
        CidrKey, LISTENER_SLOTS, ListenerKey, MAX_ANSWERED_AT, MAX_ANSWERING, MAX_VIRTUAL, Pod,
        PodAddr, PortKey, RoleKey, pod_flags, role,
    },
    addr::Addr,
};
use ipnet::IpNet;

use super::{Dns, Policy};
use crate::{
    kernel::{earlier, error::Result, maps::LpmCidr, netns::NetnsCookie, node::Node},
    plan::netns::Observed,
};

pub(super) fn pod_entry(policy: &Policy, observed: &Observed) -> Pod {
    let mut flags = 0;
    for (on, flag) in [
        (policy.dns != Dns::Off, pod_flags::DNS),
        (
            matches!(policy.dns, Dns::Resolvers(_) | Dns::Found(_)),
            pod_flags::DNS_LISTED,
        ),
        (matches!(policy.dns, Dns::Found(_)), pod_flags::DNS_FOLLOWED),
        (policy.dns == Dns::ResolvConf, pod_flags::DNS_PENDING),
        (policy.bypass_inbound, pod_flags::BYPASS_INBOUND),
        (!policy.exclude_outbound_cidrs.is_empty(), pod_flags::CIDRS),
        (
            !policy.exclude_outbound_ports.is_empty(),
            pod_flags::OUT_PORTS,
        ),
        (
            !policy.exclude_inbound_ports.is_empty(),
            pod_flags::IN_PORTS,
        ),
        (policy.named_ztunnel, pod_flags::NAMED_ZTUNNEL),
        (!policy.ipv6, pod_flags::IPV4_ONLY),
    ] {
        if on {
            flags |= flag;
        }
    }
    let hold = policy.hold.map_or(u64::MAX, |d| {
        u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)
    });
    let mut pod = Pod {
        flags,
        single_ifindex: 0,
        hold,
        virtual_ifindexes: [0; MAX_VIRTUAL],
        answering_ifindexes: [0; MAX_ANSWERING],
        lookup_sources: [Addr::UNSPECIFIED; 2],
        answered_at: [Addr::UNSPECIFIED; MAX_ANSWERED_AT],
    };
    set_interfaces(&mut pod, observed, &policy.virtual_interfaces);
    pod
}

pub(super) fn set_interfaces(pod: &mut Pod, observed: &Observed, virtual_interfaces: &[String]) {
    pod.flags &= !(pod_flags::VIRTUAL | pod_flags::MULTI_INTERFACE);
    pod.virtual_ifindexes = [0; MAX_VIRTUAL];
    pod.answering_ifindexes = [0; MAX_ANSWERING];
    for (slot, index) in pod
        .answering_ifindexes
        .iter_mut()
        .zip(&observed.default_routes)
    {
        *slot = *index;
    }
    pod.single_ifindex = observed.single_interface().unwrap_or(0);
    let interface = pod.lookup_ifindex();
    let source = |v4| {
        let fits = |(on, ip): &&(u32, IpAddr)| {
            *on == interface && ip.is_ipv4() == v4 && !is_link_local(*ip)
        };
        let found = observed.addresses.iter().find(fits);
        found.map_or(Addr::UNSPECIFIED, |(_, ip)| Addr::from(*ip))
    };
    pod.lookup_sources = [source(true), source(false)];
    pod.answered_at = [Addr::UNSPECIFIED; MAX_ANSWERED_AT];
    // A socket bound to a link-local address is bound to its device as well, and not captured.
    let own = observed.own().into_iter().filter(|ip| !is_link_local(*ip));
    for (place, ip) in pod.answered_at.iter_mut().zip(own) {
        *place = ip.into();
    }
    if pod.single_ifindex == 0 {
        pod.flags |= pod_flags::MULTI_INTERFACE;
    }
    let indexes = observed
        .links
        .iter()
        .filter(|l| virtual_interfaces.contains(&l.name))
        .map(|l| l.index);
    for (slot, index) in pod.virtual_ifindexes.iter_mut().zip(indexes) {
        *slot = index;
        pod.flags |= pod_flags::VIRTUAL;
    }
}

/// Which addresses of a pod are new, and which are gone.
#[derive(Debug, Default)]
pub(super) struct AddressChange {
    pub(super) added: Vec<IpAddr>,
    pub(super) removed: Vec<IpAddr>,
}

/// Makes `own` the pod's addresses. With `known` there may be others from before.
pub(super) fn set_addresses(
    node: &Node,
    cookie: NetnsCookie,
    own: &[IpAddr],
    known: bool,
) -> Result<AddressChange> {
    let maps = node.maps();
    let mut change = AddressChange::default();
    let wanted: Vec<Addr> = own.iter().map(|a| Addr::from(*a)).collect();
    let all = if known {
        maps.pod_addrs.keys()?
    } else {
        Vec::new()
    };
    let own_keys = all.iter().filter(|k| k.cookie == cookie.0);
    let present: Vec<Addr> = own_keys.map(|k| k.addr).collect();
    for addr in wanted.iter().filter(|a| !present.contains(a)) {
        maps.pod_addrs.set(
            &PodAddr {
                cookie: cookie.0,
                addr: *addr,
            },
            &1,
        )?;
        change.added.push((*addr).into());
    }
    for addr in own.iter().filter(|a| !is_link_local(**a)) {
        let addr = Addr::from(*addr);
        if maps.pod_by_addr.get(&addr)? != Some(cookie.0) {
            maps.pod_by_addr.set(&addr, &cookie.0)?;
        }
    }
    for addr in present.iter().filter(|a| !wanted.contains(a)) {
        forget_address(node, cookie, *addr, &all)?;
        change.removed.push((*addr).into());
    }
    Ok(change)
}

/// Every pod has its own fe80::/10: as a key for the whole node they mean nothing.
fn is_link_local(addr: IpAddr) -> bool {
    matches!(addr, IpAddr::V6(v6) if v6.is_unicast_link_local())
}

/// `all` are the addresses of all pods.
fn forget_address(node: &Node, cookie: NetnsCookie, addr: Addr, all: &[PodAddr]) -> Result<()> {
    let maps = node.maps();
    maps.pod_addrs.remove(&PodAddr {
        cookie: cookie.0,
        addr,
    })?;
    if maps.pod_by_addr.get(&addr)? == Some(cookie.0) {
        // Two namespaces may have the same address; the other one's probes stay possible.
        let same = |k: &&PodAddr| k.addr == addr && k.cookie != cookie.0;
        match all.iter().find(same) {
            Some(other) => maps.pod_by_addr.set(&addr, &other.cookie)?,
            None => drop(maps.pod_by_addr.remove(&addr)?),
        }
    }
    Ok(())
}

fn lpm(cookie: NetnsCookie, net: &IpNet) -> LpmCidr {
    let mapped = if net.addr().is_ipv4() { 96 } else { 0 };
    LpmCidr {
        prefix_len: 64 + mapped + u32::from(net.prefix_len()),
        data: CidrKey {
            cookie: cookie.0,
            addr: Addr::from(net.network()),
        },
    }
}

pub(super) fn set_exclusions(
    node: &Node,
    cookie: NetnsCookie,
    policy: &Policy,
    known: bool,
) -> Result<()> {
    let maps = node.maps();
    let port = |port: &u16, inbound| PortKey {
        cookie: cookie.0,
        port: *port,
        inbound,
        pad: [0; 5],
    };
    let out = policy.exclude_outbound_ports.iter().map(|p| port(p, 0));
    let ports: Vec<PortKey> = out
        .chain(policy.exclude_inbound_ports.iter().map(|p| port(p, 1)))
        .collect();
    let cidrs: Vec<LpmCidr> = policy
        .exclude_outbound_cidrs
        .iter()
        .map(|net| lpm(cookie, net))
        .collect();
    for key in &ports {
        maps.excluded_ports.set(key, &1)?;
    }
    for key in &cidrs {
        maps.excluded_cidrs.set(key, &1)?;
    }
    if known {
        for key in maps
            .excluded_ports
            .keys()?
            .iter()
            .filter(|k| k.cookie == cookie.0 && !ports.contains(k))
        {
            maps.excluded_ports.remove(key)?;
        }
        let same = |a: &LpmCidr, b: &LpmCidr| {
            ({ a.prefix_len } == { b.prefix_len }) && { a.data } == { b.data }
        };
        for key in maps.excluded_cidrs.keys()? {
            if { key.data }.cookie == cookie.0 && !cidrs.iter().any(|c| same(c, &key)) {
                maps.excluded_cidrs.remove(&key)?;
            }
        }
    }
    Ok(())
}

/// Adds all destinations there are, of both families: IPv4 is a part of IPv6 here.
pub(super) fn exclude_everything(node: &Node, cookie: NetnsCookie) -> Result<()> {
    let all = IpNet::V6(ipnet::Ipv6Net::default());
    node.maps().excluded_cidrs.set(&lpm(cookie, &all), &1)
}

/// Makes the resolvers of `dns` the ones whose lookups are captured. With `known` there may be others from before.
pub(super) fn set_resolvers(
    node: &Node,
    cookie: NetnsCookie,
    dns: &Dns,
    known: bool,
) -> Result<()> {
    let resolvers = &node.maps().resolvers;
    let key = |ip: &IpAddr| PodAddr {
        cookie: cookie.0,
        addr: Addr::from(*ip),
    };
    let wanted: Vec<PodAddr> = match dns {
        Dns::Resolvers(list) | Dns::Found(list) => list.iter().map(key).collect(),
        Dns::Off | Dns::All | Dns::ResolvConf => Vec::new(),
    };
    for key in &wanted {
        resolvers.set(key, &1)?;
    }
    if known {
        let stale = |k: &PodAddr| k.cookie == cookie.0 && !wanted.contains(k);
        for key in resolvers.keys()?.into_iter().filter(stale) {
            resolvers.remove(&key)?;
        }
    }
    Ok(())
}

/// Everything the programs know of the pod. `PODS` first: from then on they leave it alone.
pub(super) fn forget_maps(node: &Node, cookie: NetnsCookie) -> Result<()> {
    let maps = node.maps();
    maps.pods.remove(&cookie.0)?;
    earlier::forget(node.pins(), cookie)?;
    let all = maps.pod_addrs.keys()?;
    for key in all.iter().filter(|k| k.cookie == cookie.0) {
        forget_address(node, cookie, key.addr, &all)?;
    }
    for key in maps
        .excluded_ports
        .keys()?
        .into_iter()
        .filter(|k| k.cookie == cookie.0)
    {
        maps.excluded_ports.remove(&key)?;
    }
    for key in maps
        .excluded_cidrs
        .keys()?
        .into_iter()
        .filter(|k| { k.data }.cookie == cookie.0)
    {
        maps.excluded_cidrs.remove(&key)?;
    }
    set_resolvers(node, cookie, &Dns::Off, true)?;
    for role in 0..role::COUNT {
        maps.roles.remove(&RoleKey {
            cookie: cookie.0,
            role,
            pad: 0,
        })?;
        for slot in 0..LISTENER_SLOTS {
            maps.listeners.remove(&ListenerKey {
                cookie: cookie.0,
                role,
                slot,
            })?;
        }
    }
    Ok(())
}
