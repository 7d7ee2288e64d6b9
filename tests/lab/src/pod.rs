//! How a pod is put together: addresses, the interface that joins it to the node, further interfaces. What happens inside
//! it afterwards is up to the test.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::lab::{GATEWAY4, GATEWAY6, PREFIX4, PREFIX6};
use crate::ns::Face;
use crate::{Lab, Ns, Route};

/// How the pod's interface ends on the node.
#[derive(Debug, Clone)]
enum Join {
    /// As a port of this bridge.
    Bridge(String),
    /// As an interface of the node without address or bridge: what the pod sends arrives, but nothing finds back.
    Loose,
    /// Not at all.
    Nothing,
}

/// Builds a pod: `lab.pod_builder("a").ipv4_only().build()`. Without any option it is what `lab.pod` makes.
#[derive(Debug)]
pub struct PodBuilder<'lab> {
    lab: &'lab Lab,
    name: String,
    addr4: Option<Ipv4Addr>,
    addr6: Option<Ipv6Addr>,
    join: Join,
    ipv4: bool,
    ipv6: bool,
    ifname: String,
    extra: Vec<(String, Vec<IpNet>)>,
}

impl<'lab> PodBuilder<'lab> {
    pub(crate) fn new(lab: &'lab Lab, name: &str) -> Self {
        let join = Join::Bridge(crate::lab::BRIDGE.to_owned());
        let (name, ifname) = (name.to_owned(), "eth0".to_owned());
        Self {
            lab,
            name,
            addr4: None,
            addr6: None,
            join,
            ipv4: true,
            ipv6: true,
            ifname,
            extra: Vec::new(),
        }
    }

    /// This IPv4 address instead of the next free one. Two pods may have the same if they are not on the same bridge.
    pub fn addr4(mut self, addr: Ipv4Addr) -> Self {
        self.addr4 = Some(addr);
        self
    }

    /// This IPv6 address instead of the next free one.
    pub fn addr6(mut self, addr: Ipv6Addr) -> Self {
        self.addr6 = Some(addr);
        self
    }

    /// The same addresses as another pod. Put it on another bridge, or on none.
    pub fn same_addrs(mut self, other: &Ns) -> Self {
        self.addr4 = other.v4().ok();
        self.addr6 = other.v6().ok();
        self
    }

    /// No IPv6 in this pod at all: `disable_ipv6` everywhere, as on nodes that switched it off.
    pub fn ipv4_only(mut self) -> Self {
        self.ipv6 = false;
        self
    }

    /// No IPv4 address in this pod.
    pub fn ipv6_only(mut self) -> Self {
        self.ipv4 = false;
        self
    }

    /// Another bridge than `br0`, made if it is not there; it has no address of the node, so pods on it reach each other
    /// and nobody else.
    pub fn bridge(mut self, name: &str) -> Self {
        self.join = Join::Bridge(name.to_owned());
        self
    }

    /// No bridge: what the pod sends arrives at `host_ifname()` on the node, with the gateway's hardware address known
    /// beforehand, so that a capture sees every packet that leaves. Answers do not find back.
    pub fn no_bridge(mut self) -> Self {
        self.join = Join::Loose;
        self
    }

    /// No interface but `lo`, no address.
    pub fn no_interface(mut self) -> Self {
        self.join = Join::Nothing;
        self
    }

    /// Another name for `eth0`.
    pub fn ifname(mut self, name: &str) -> Self {
        name.clone_into(&mut self.ifname);
        self
    }

    /// A further interface: a veth pair whose other end is on the node, up and without address.
    pub fn extra_interface(mut self, name: &str, addrs: &[IpNet]) -> Self {
        self.extra.push((name.to_owned(), addrs.to_vec()));
        self
    }

    /// Builds it.
    pub fn build(self) -> Result<Ns> {
        let name = self.name.clone();
        self.make().with_context(|| format!("building pod {name}"))
    }

    fn make(self) -> Result<Ns> {
        let (lab, node) = (self.lab, self.lab.node());
        let pod = lab.new_ns(&self.name)?;
        if !self.ipv6 {
            for scope in ["all", "default", "lo"] {
                pod.set_sysctl(&format!("net/ipv6/conf/{scope}/disable_ipv6"), "1")?;
            }
        }
        let mut face = Face::default();
        if !matches!(self.join, Join::Nothing) {
            let number = lab.next_address();
            face.addr4 = self
                .ipv4
                .then(|| self.addr4.unwrap_or_else(|| address4(number)));
            face.addr6 = self
                .ipv6
                .then(|| self.addr6.unwrap_or_else(|| address6(number)));
            face.host_ifname = lab.next_ifname();
            face.ifname.clone_from(&self.ifname);
            pod.add_veth(&self.ifname, node, &face.host_ifname)?;
        }
        if let Join::Bridge(bridge) = &self.join {
            lab.ensure_bridge(bridge)?;
            node.set_master(&face.host_ifname, bridge)?;
        }
        for (addr, prefix, gateway) in face_nets(&face) {
            pod.add_addr(
                &self.ifname,
                IpNet::new(addr, prefix).context("an address with its prefix")?,
            )?;
            if matches!(self.join, Join::Loose) {
                pod.add_neighbour(&self.ifname, gateway, &node.mac(&face.host_ifname)?)?;
            }
            pod.add_route(&Route::default_via(gateway))?;
        }
        for (ifname, addrs) in &self.extra {
            lab.add_interface(&pod, ifname)?;
            for addr in addrs {
                pod.add_addr(ifname, *addr)?;
            }
        }
        pod.set_face(face);
        Ok(pod)
    }
}

fn face_nets(face: &Face) -> Vec<(IpAddr, u8, IpAddr)> {
    let v4 = face
        .addr4
        .map(|addr| (addr.into(), PREFIX4, GATEWAY4.into()));
    let v6 = face
        .addr6
        .map(|addr| (addr.into(), PREFIX6, GATEWAY6.into()));
    v4.into_iter().chain(v6).collect()
}

/// The `number`th address of the pods' IPv4 subnet.
fn address4(number: u16) -> Ipv4Addr {
    let base = Ipv4Net::new_assert(GATEWAY4, PREFIX4).network();
    Ipv4Addr::from_bits(base.to_bits() | u32::from(number))
}

/// The `number`th address of the pods' IPv6 subnet.
fn address6(number: u16) -> Ipv6Addr {
    let base = Ipv6Net::new_assert(GATEWAY6, PREFIX6).network();
    Ipv6Addr::from_bits(base.to_bits() | u128::from(number))
}
