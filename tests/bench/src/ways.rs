//! The four ways to the same listener, each set up in a pod of its own.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use culvert::kernel::{
    LoadOptions, Netns, Node, listeners,
    pod::{self, Policy},
};
use culvert_lab::{Family, Lab, Ns};

use crate::netfilter::Tool;
use crate::proxy::{self, Proxy};
use crate::worker::Worker;

/// How what a pod sends gets to the listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// The client connects to the listener itself, over loopback.
    Straight,
    Culvert,
    Iptables,
    Nftables,
}

impl Way {
    pub(crate) const ALL: [Self; 4] = [
        Self::Straight,
        Self::Culvert,
        Self::Iptables,
        Self::Nftables,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Straight => "straight",
            Self::Culvert => "culvert",
            Self::Iptables => "iptables",
            Self::Nftables => "nftables",
        }
    }

    fn tool(self) -> Option<Tool> {
        match self {
            Self::Iptables => Some(Tool::Iptables),
            Self::Nftables => Some(Tool::Nftables),
            Self::Straight | Self::Culvert => None,
        }
    }
}

/// A pod with one way in it, its listener and its client.
#[derive(Debug)]
pub(crate) struct Path {
    pub(crate) way: Way,
    pub(crate) proxy: Proxy,
    pub(crate) client: Worker,
    pub(crate) pod: Ns,
}

impl Path {
    /// Sets it up; `node` is needed for Culvert's.
    pub(crate) fn new(lab: &Lab, node: &Node, way: Way) -> Result<Self> {
        let pod = lab.pod(way.name())?;
        steady(&pod)?;
        if way == Way::Culvert {
            // As the agent does it: the kernel's side first, then ztunnel opens its listeners.
            let netns = Netns::open(pod.path())?;
            let policy = Policy {
                named_ztunnel: true,
                ..Policy::default()
            };
            lab.node().run(|| pod::attach(node, &netns, &policy))?;
        }
        if let Some(tool) = way.tool() {
            pod.run(|| tool.apply(&pod))?;
            steady_conntrack(&pod)?;
        }
        Ok(Self {
            way,
            proxy: Proxy::ztunnel(&pod)?,
            client: Worker::start(&pod)?,
            pod,
        })
    }

    /// Where the client is to connect to.
    pub(crate) fn target(&self, family: Family) -> SocketAddr {
        match self.way {
            Way::Straight => SocketAddr::new(family.loopback(), proxy::PORT),
            _ => elsewhere(family),
        }
    }
}

/// An address outside the pod where nothing listens: only a redirected connection succeeds.
pub(crate) fn elsewhere(family: Family) -> SocketAddr {
    let ip: IpAddr = match family {
        Family::V4 => Ipv4Addr::new(10, 99, 0, 1).into(),
        Family::V6 => Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, 0, 1).into(),
    };
    SocketAddr::new(ip, 80)
}

/// Loads the node programs for a lab, in this process, and names this process as ztunnel, as the agent names the real one.
pub(crate) fn load(lab: &Lab) -> Result<Node> {
    let options = LoadOptions {
        bpffs: lab.bpffs().to_owned(),
        cgroup_root: Some(lab.cgroup().to_owned()),
        dns_cgroup: None,
        probe_source: None,
        at_home: true,
        set_aside: false,
    };
    lab.node().run(|| {
        let (node, _) = Node::load(&options)?;
        listeners::name_process(&node, std::process::id())?;
        Ok(node)
    })
}

/// Ten thousands of connections a second must not run out of ports, so those of closed ones are used again after a second.
pub(crate) fn steady(ns: &Ns) -> Result<()> {
    for (key, value) in [
        ("net/ipv4/ip_local_port_range", "1024 65535"),
        ("net/ipv4/tcp_max_tw_buckets", "200000"),
        ("net/ipv4/tcp_tw_reuse", "1"),
    ] {
        ns.set_sysctl(key, value)?;
    }
    // Reserved, or a client may be given the listener's own port.
    ns.set_sysctl("net/ipv4/ip_local_reserved_ports", "15000-15099")
}

/// The same for connection tracking, in its favour: with its usual two minutes its table would fill.
fn steady_conntrack(ns: &Ns) -> Result<()> {
    for state in ["time_wait", "close", "last_ack", "fin_wait", "close_wait"] {
        let key = format!("net/netfilter/nf_conntrack_tcp_timeout_{state}");
        ensure!(
            ns.has_sysctl(&key),
            "connection tracking is not in this namespace, though NAT rules are: load nf_conntrack"
        );
        ns.set_sysctl(&key, "1").context("shortening a timeout")?;
    }
    Ok(())
}
