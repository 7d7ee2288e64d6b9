//! Enrolling a network namespace and letting it go.
//!
//! Order on the way in: the record (what to put back), the pinned link (which finds the pod again and does
//! nothing yet), rules and sysctls, addresses and exclusions, and last the entry in `PODS`, which switches
//! both programs on at once. Whoever is killed in between leaves something the next attach completes or the
//! next detach undoes. On the way out `PODS` goes first; rules stay until no socket of ours needs them.

mod entries;
mod release;
mod sync;

use std::{
    net::IpAddr,
    os::fd::AsFd,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use culvert_ebpf::abi::{INITIAL_ORDER, MAX_VIRTUAL, Pod, Record, Role, RoleKey, pod_flags, role};
use ipnet::IpNet;
pub use release::{collect, detach, forget, release};
use serde::{Deserialize, Serialize};
pub use sync::Synced;
pub(super) use sync::{sync, sync_sysctls, virtual_names};

use super::{
    dns, earlier,
    ears::Ears,
    error::{Error, Result},
    listeners, netconf,
    netlink::Rtnetlink,
    netns::{self, Netns, NetnsCookie},
    node::Node,
    object::ATTACH_SK_LOOKUP,
    pins, resolv_conf, sys,
};
use crate::plan::netns as plan;
use entries::{pod_entry, set_addresses, set_exclusions, set_resolvers};

/// How a pod is to be treated.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
    /// Which lookups go to ztunnel's DNS listener.
    pub dns: Dns,
    /// ztunnel is told by its process, not by its mark alone.
    pub named_ztunnel: bool,
    /// IPv6 too; else what goes by it is left alone, in both directions.
    pub ipv6: bool,
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
            dns: Dns::Off,
            named_ztunnel: false,
            ipv6: true,
        }
    }
}

impl Policy {
    /// With the resolvers of the pod's processes by name, if they are to count and are known.
    fn resolved(&self, netns: &Netns) -> Result<Self> {
        let mut policy = self.clone();
        if policy.dns == Dns::ResolvConf {
            let found = resolv_conf::of(netns)?;
            if !found.is_empty() {
                policy.dns = Dns::Found(found);
            }
        }
        Ok(policy)
    }

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

/// Which lookups of a pod, over UDP and TCP port 53, ztunnel answers.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Dns {
    /// None.
    #[default]
    Off,
    /// All, whichever resolver they ask.
    All,
    /// Those that ask one of these resolvers.
    Resolvers(Vec<IpAddr>),
    /// Those that ask a resolver of the pod's own `/etc/resolv.conf`; all, until a process of the pod has one.
    ResolvConf,
    /// [`ResolvConf`](Self::ResolvConf), with what the file said when it was read.
    Found(Vec<IpAddr>),
}

impl From<bool> for Dns {
    fn from(on: bool) -> Self {
        if on { Self::All } else { Self::Off }
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
    attach_and_listen(node, netns, policy).map(|(attached, _)| attached)
}

/// Like [`attach`]. The ears hear whatever the pod has done since it was looked at.
pub fn attach_and_listen(node: &Node, netns: &Netns, policy: &Policy) -> Result<(Attached, Ears)> {
    let cookie = netns.cookie();
    policy.check()?;
    let config = node.config()?;
    if cookie.0 == config.node_cookie || netns::here()? == cookie {
        return Err(Error::wrong(
            "enrol",
            netns.path().display(),
            "this is the node's own network namespace",
            "give the namespace of a pod; hostNetwork pods cannot be captured",
        ));
    }
    let policy = &policy.resolved(netns)?;
    let _lock = node.lock()?;
    let entry = node.maps().pods.get(&cookie.0)?;
    let fresh = entry.is_none();
    if policy.dns != Dns::Off {
        // Before the pod's own entry asks for them.
        match dns::ensure(node) {
            // It has had them, so nobody is told that it has them now; the rest of it is looked after all the same.
            Err(error) if entry.is_some_and(|pod| pod.flags & pod_flags::DNS != 0) => {
                tracing::warn!(%cookie, %error, "lookups go past ztunnel");
            }
            ensured => ensured?,
        }
    }
    let known = node.maps().records.get(&cookie.0)?.is_some();
    let result = enrol(node, netns, policy, known);
    if let (Err(_), true) = (&result, fresh && !earlier::holds(node.pins(), cookie)) {
        // Half an enrolment helps nobody: back to how it was. The first error is the one that counts. But what another
        // version's programs still need stays.
        if let Err(error) = release::let_go(node, netns) {
            tracing::warn!(%cookie, %error, "rolling back a failed attach");
        }
    }
    let attached = if fresh {
        Attached::Enrolled
    } else {
        Attached::Updated
    };
    Ok((attached, result?))
}

fn enrol(node: &Node, netns: &Netns, policy: &Policy, known: bool) -> Result<Ears> {
    let cookie = netns.cookie();
    let guard = netns.enter()?;
    let mut ears = Ears::open(&guard)?;
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
                sysctls: ears.sysctls.values(),
                pad: 0,
            },
        )?;
    }
    ensure_link(node, netns)?;
    node.maps().counters.ensure(cookie.0)?;
    ensure_role(node, cookie)?;
    let mut netlink = Rtnetlink::open()?;
    ears.ignore(&netlink);
    let mut observed = netconf::observe(&guard, &mut netlink)?;
    if !policy.ipv6 {
        observed = observed.ipv4_alone();
    }
    netconf::apply(
        &guard,
        &mut netlink,
        &plan::enrol(&observed, &policy.virtual_interfaces),
    )?;
    ears.sysctls.set_all(&guard)?;
    if node.maps().pods.get(&cookie.0)?.is_none() {
        let freed = listeners::free(&guard)?;
        if freed > 0 {
            tracing::info!(%cookie, freed, "listeners with a mark or device of their own now take deliveries");
        }
    }
    drop(guard);
    set_addresses(node, cookie, &observed.own(), known)?;
    set_exclusions(node, cookie, policy, known)?;
    set_resolvers(node, cookie, &policy.dns, known)?;
    let pod = pod_entry(policy, &observed);
    let before = node.maps().pods.get(&cookie.0)?;
    if before != Some(pod) {
        node.maps().pods.set(&cookie.0, &pod)?;
    }
    let captured = |pod: &Pod| pod.flags & pod_flags::DNS != 0;
    if before.is_some_and(|before| captured(&before)) && !captured(&pod) {
        release::strays(cookie, &netns.enter()?);
    }
    Ok(ears)
}

/// Takes up a pod that was let go, and whose connections from before still need its rules: [`collect`] waits for them.
pub(super) fn keep_draining(node: &Node, netns: &Netns) -> Result<()> {
    let _lock = node.lock()?;
    ensure_link(node, netns)
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
