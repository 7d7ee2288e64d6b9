//! Enrolling a network namespace and letting it go.
//!
//! Order on the way in: the record (what to put back), the pinned link (which finds the pod again and does
//! nothing yet), rules and sysctls, addresses and exclusions, and last the entry in `PODS`, which switches
//! both programs on at once. Whoever is killed in between leaves something the next attach completes or the
//! next detach undoes. On the way out `PODS` goes first; rules stay until no socket of ours needs them.

use std::{
    net::IpAddr,
    os::fd::AsFd,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use culvert_ebpf::{
    abi::{
        CidrKey, INITIAL_ORDER, LISTENER_SLOTS, ListenerKey, MAX_ANSWERING, MAX_VIRTUAL, Pod,
        PodAddr, PortKey, Record, Role, RoleKey, mark, pod_flags, role,
    },
    addr::Addr,
};
use ipnet::IpNet;

use super::{
    error::{Error, Result},
    listeners,
    maps::LpmCidr,
    netconf,
    netlink::Rtnetlink,
    netns::{Guard, Netns, NetnsCookie},
    node::Node,
    object::ATTACH_SK_LOOKUP,
    pins, sockdiag, sys, sysctl,
};
use crate::plan::netns::{self as plan, Observed};

/// How a pod is to be treated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Destinations left alone.
    pub exclude_outbound_cidrs: Vec<IpNet>,
    /// Destination ports left alone.
    pub exclude_outbound_ports: Vec<u16>,
    /// The pod's own ports left alone.
    pub exclude_inbound_ports: Vec<u16>,
    /// No inbound capture.
    pub bypass_inbound: bool,
    /// Interfaces whose TCP is outbound traffic of others (a VM's tap).
    pub virtual_interfaces: Vec<String>,
    /// How long new connections wait for an absent ztunnel; none = for ever.
    pub hold: Option<Duration>,
    /// TCP port 53 goes to ztunnel's DNS listener.
    pub dns: bool,
    /// ztunnel is told by its process, not by its mark alone.
    pub named_ztunnel: bool,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            exclude_outbound_cidrs: Vec::new(),
            exclude_outbound_ports: Vec::new(),
            exclude_inbound_ports: Vec::new(),
            bypass_inbound: false,
            virtual_interfaces: Vec::new(),
            hold: Some(Duration::from_secs(10)),
            dns: false,
            named_ztunnel: false,
        }
    }
}

impl Policy {
    /// Fails, without looking at anything, if this can be no pod's policy.
    pub fn check(&self) -> Result<()> {
        const OPERATION: &str = "enrol with";
        let names = &self.virtual_interfaces;
        if names.len() > MAX_VIRTUAL {
            return Err(Error::wrong(
                OPERATION,
                format_args!("{} virtual interfaces", names.len()),
                "that is too many",
                format!("name at most {MAX_VIRTUAL}"),
            ));
        }
        let longest = libc::IFNAMSIZ - 1;
        match names.iter().find(|n| n.is_empty() || n.len() > longest) {
            Some(name) => Err(Error::wrong(
                OPERATION,
                format_args!("virtual interface `{name}`"),
                "no interface can have this name",
                format!("give a name of 1 to {longest} bytes, as `ip link` shows it"),
            )),
            None => Ok(()),
        }
    }
}

/// What [`attach`] found and did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attached {
    /// The pod was not enrolled.
    Enrolled,
    /// It was, and is now as asked.
    Updated,
}

/// What [`detach`] found and did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detached {
    /// Nothing of ours is left.
    Gone,
    /// New connections go direct; this many old ones still need our rules.
    Draining(usize),
    /// There was nothing of ours.
    NotEnrolled,
}

/// Enrols the namespace, or makes an enrolled one be as asked.
pub fn attach(node: &Node, netns: &Netns, policy: &Policy) -> Result<Attached> {
    let cookie = netns.cookie();
    policy.check()?;
    let config = node.config()?;
    if cookie.0 == config.node_cookie || Netns::current()?.cookie() == cookie {
        return Err(Error::wrong(
            "enrol",
            netns.path().display(),
            "this is the node's own network namespace",
            "give the namespace of a pod; hostNetwork pods cannot be captured",
        ));
    }
    let _lock = node.lock()?;
    let fresh = node.maps().pods.get(&cookie.0)?.is_none();
    let known = node.maps().records.get(&cookie.0)?.is_some();
    let result = enrol(node, netns, policy, known);
    if let (Err(_), true) = (&result, fresh) {
        // Half an enrolment helps nobody: back to how it was. The first error is the one that counts.
        if let Err(error) = let_go(node, netns) {
            tracing::warn!(%cookie, %error, "rolling back a failed attach");
        }
    }
    result?;
    Ok(if fresh {
        Attached::Enrolled
    } else {
        Attached::Updated
    })
}

fn enrol(node: &Node, netns: &Netns, policy: &Policy, known: bool) -> Result<()> {
    let cookie = netns.cookie();
    let guard = netns.enter()?;
    if !known {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        node.maps().records.set(
            &cookie.0,
            &Record {
                netns_inode: netns.inode(),
                netns_dev: netns.dev(),
                enrolled_at: now.as_secs(),
                sysctls: sysctl::read_all(&guard)?,
                pad: 0,
            },
        )?;
    }
    ensure_link(node, netns)?;
    node.maps().counters.ensure(cookie.0)?;
    ensure_role(node, cookie)?;
    let mut netlink = Rtnetlink::open()?;
    let observed = netconf::observe(&guard, &mut netlink)?;
    netconf::apply(
        &guard,
        &mut netlink,
        &plan::enrol(&observed, &policy.virtual_interfaces),
    )?;
    sysctl::set_all(&guard)?;
    if node.maps().pods.get(&cookie.0)?.is_none() {
        let freed = listeners::free(&guard)?;
        if freed > 0 {
            tracing::info!(%cookie, freed, "listeners with a mark or device of their own now take deliveries");
        }
    }
    drop(guard);
    set_addresses(node, cookie, &observed.own(), known)?;
    set_exclusions(node, cookie, policy, known)?;
    let pod = pod_entry(policy, &observed);
    if node.maps().pods.get(&cookie.0)? != Some(pod) {
        node.maps().pods.set(&cookie.0, &pod)?;
    }
    Ok(())
}

/// Brings an enrolled pod's addresses, routes, rules and interfaces up to date with its namespace.
/// False when it is not enrolled any more.
pub fn sync(node: &Node, netns: &Netns) -> Result<bool> {
    let cookie = netns.cookie();
    let _lock = node.lock()?;
    let Some(mut pod) = node.maps().pods.get(&cookie.0)? else {
        return Ok(false);
    };
    let guard = netns.enter()?;
    let mut netlink = Rtnetlink::open()?;
    let observed = netconf::observe(&guard, &mut netlink)?;
    let virtual_interfaces = virtual_names(&observed);
    // New addresses count as own before anything else: until then connections to them are refused.
    set_addresses(node, cookie, &observed.own(), true)?;
    netconf::apply(
        &guard,
        &mut netlink,
        &plan::enrol(&observed, &virtual_interfaces),
    )?;
    sysctl::set_all(&guard)?;
    drop(guard);
    let before = pod;
    set_interfaces(&mut pod, &observed, &virtual_interfaces);
    if pod != before {
        node.maps().pods.set(&cookie.0, &pod)?;
    }
    Ok(true)
}

/// The virtual interfaces an enrolled pod was given: our rules remember their names.
fn virtual_names(observed: &Observed) -> Vec<String> {
    let mut names: Vec<String> = observed
        .rules
        .iter()
        .filter(|r| r.protocol == plan::PROTOCOL)
        .filter_map(|r| r.iif.clone())
        .collect();
    names.sort_unstable();
    names.dedup();
    names
}

fn pod_entry(policy: &Policy, observed: &Observed) -> Pod {
    let mut flags = 0;
    for (on, flag) in [
        (policy.dns, pod_flags::DNS),
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
    };
    set_interfaces(&mut pod, observed, &policy.virtual_interfaces);
    pod
}

fn set_interfaces(pod: &mut Pod, observed: &Observed, virtual_interfaces: &[String]) {
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

fn ensure_link(node: &Node, netns: &Netns) -> Result<()> {
    let cookie = netns.cookie();
    let path = node.pins().pod(cookie);
    if let Ok(link) = sys::obj_get(&path) {
        let target = sys::netns_link_info(link.as_fd()).map_or(0, |info| info.target);
        if target == netns.inode() {
            return Ok(());
        }
        pins::remove(&path)?;
    }
    let prog = node.programs().load_enter(cookie.0)?;
    let link = sys::link_create(prog.as_fd(), netns.as_fd(), ATTACH_SK_LOOKUP)
        .map_err(|e| Error::system("attach culvert_enter to", netns.path().display(), e))?;
    sys::obj_pin(link.as_fd(), &path).map_err(|e| Error::system("pin link", path.display(), e))
}

fn ensure_role(node: &Node, cookie: NetnsCookie) -> Result<()> {
    let key = RoleKey {
        cookie: cookie.0,
        role: role::OUTBOUND,
        pad: 0,
    };
    if node.maps().roles.get(&key)?.is_none() {
        // The grace runs from now: no ztunnel has been here yet.
        let role = Role {
            order: INITIAL_ORDER,
            live: 0,
            away_since: super::events::now(),
        };
        node.maps().roles.set(&key, &role)?;
    }
    Ok(())
}

/// Makes `own` the pod's addresses. With `known` there may be others from before.
fn set_addresses(node: &Node, cookie: NetnsCookie, own: &[IpAddr], known: bool) -> Result<()> {
    let maps = node.maps();
    let wanted: Vec<Addr> = own.iter().map(|a| Addr::from(*a)).collect();
    let mut present = Vec::new();
    if known {
        present.extend(
            maps.pod_addrs
                .keys()?
                .into_iter()
                .filter(|k| k.cookie == cookie.0)
                .map(|k| k.addr),
        );
    }
    for addr in wanted.iter().filter(|a| !present.contains(a)) {
        maps.pod_addrs.set(
            &PodAddr {
                cookie: cookie.0,
                addr: *addr,
            },
            &1,
        )?;
    }
    for addr in own.iter().filter(|a| !is_link_local(**a)) {
        let addr = Addr::from(*addr);
        if maps.pod_by_addr.get(&addr)? != Some(cookie.0) {
            maps.pod_by_addr.set(&addr, &cookie.0)?;
        }
    }
    for addr in present.iter().filter(|a| !wanted.contains(a)) {
        forget_address(node, cookie, *addr)?;
    }
    Ok(())
}

/// Every pod has its own fe80::/10: as a key for the whole node they mean nothing.
fn is_link_local(addr: IpAddr) -> bool {
    matches!(addr, IpAddr::V6(v6) if v6.is_unicast_link_local())
}

fn forget_address(node: &Node, cookie: NetnsCookie, addr: Addr) -> Result<()> {
    let maps = node.maps();
    maps.pod_addrs.remove(&PodAddr {
        cookie: cookie.0,
        addr,
    })?;
    if maps.pod_by_addr.get(&addr)? == Some(cookie.0) {
        // Two namespaces may have the same address; the other one's probes stay possible.
        match maps.pod_addrs.keys()?.into_iter().find(|k| k.addr == addr) {
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

fn set_exclusions(node: &Node, cookie: NetnsCookie, policy: &Policy, known: bool) -> Result<()> {
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

/// Lets the pod go: new connections go direct at once, old ones live on.
pub fn detach(node: &Node, netns: &Netns) -> Result<Detached> {
    let _lock = node.lock()?;
    let_go(node, netns)
}

fn let_go(node: &Node, netns: &Netns) -> Result<Detached> {
    let cookie = netns.cookie();
    let record = node.maps().records.get(&cookie.0)?;
    forget_maps(node, cookie)?;
    let guard = netns.enter()?;
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

/// Everything the programs know of the pod. `PODS` first: from then on they leave it alone.
fn forget_maps(node: &Node, cookie: NetnsCookie) -> Result<()> {
    let maps = node.maps();
    maps.pods.remove(&cookie.0)?;
    for key in maps
        .pod_addrs
        .keys()?
        .into_iter()
        .filter(|k| k.cookie == cookie.0)
    {
        forget_address(node, cookie, key.addr)?;
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

/// The last traces: link, counters, and the record, which is what finds the pod again until now.
fn forget_pod(node: &Node, cookie: NetnsCookie) -> Result<()> {
    pins::remove(&node.pins().pod(cookie))?;
    node.maps().counters.remove(cookie.0)?;
    node.maps().records.remove(&cookie.0)?;
    Ok(())
}

/// Removes what is left of pods whose namespace is gone, and of attaches that were killed before they
/// changed anything; lets drained pods go for good. Returns how many were cleaned up.
pub fn collect(node: &Node) -> Result<usize> {
    let _lock = node.lock()?;
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
    let paths = super::netns::paths();
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
