//! DNS capture: lookups of a pod answered by ztunnel, over UDP and TCP, whoever asks however.
#![expect(
    clippy::unwrap_used,
    reason = "test code: a step that fails is a test that fails"
)]

mod clients;
mod forged;
mod governed;
mod interface;
mod many;
mod place;
mod seen;
mod several;
mod sockets;
mod switching;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::Result;
use culvert_e2e::{Mesh, dns::Resolver};
use culvert_lab::{Family, Lab, Ns, Zds, Ztunnel, ZtunnelOptions};

/// What ztunnel itself says of `mesh.test`.
const BY_ZTUNNEL: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
/// What the resolver says of every name.
const BY_RESOLVER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
/// What another resolver says, that ztunnel never asks.
const BY_OTHER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 3);

/// A pod, its ztunnel that answers for `mesh.test`, and a resolver outside that it asks for all else.
struct Stage {
    resolver: Resolver,
    /// The same in IPv6.
    resolver6: Resolver,
    mesh: Mesh,
    pod: Ns,
    outside: Ns,
}

fn options(upstream: SocketAddr) -> ZtunnelOptions {
    ZtunnelOptions::new()
        .arg("--dns-name")
        .arg(&format!("mesh.test={BY_ZTUNNEL}"))
        .arg("--dns-upstream")
        .arg(&upstream.to_string())
}

impl Stage {
    /// Nothing is enrolled yet.
    fn open(name: &str) -> Result<Self> {
        let lab = Lab::new(name)?;
        let outside = lab.outside()?;
        let resolver = Resolver::start(&outside, outside.ip(Family::V4)?, BY_RESOLVER)?;
        let resolver6 = Resolver::start(&outside, outside.ip(Family::V6)?, BY_RESOLVER)?;
        let zds = Zds::start(&lab)?;
        let ztunnel = Ztunnel::start(&lab, &zds, &options(resolver.addr()))?;
        let pod = lab.pod("a")?;
        let mesh = Mesh { zds, ztunnel, lab };
        Ok(Self {
            resolver,
            resolver6,
            mesh,
            pod,
            outside,
        })
    }

    /// With capture on for the pod.
    fn captured(name: &str) -> Result<Self> {
        let stage = Self::open(name)?;
        stage.enrol(&["--dns"])?;
        Ok(stage)
    }

    /// Enrols the pod and waits for ztunnel's DNS listeners as well.
    fn enrol(&self, args: &[&str]) -> Result<()> {
        self.mesh.enrol(&self.pod, args)?;
        self.mesh.expect_listeners(&self.pod, 5)
    }

    fn resolver(&self, family: Family) -> SocketAddr {
        match family {
            Family::V4 => self.resolver.addr(),
            Family::V6 => self.resolver6.addr(),
        }
    }

    fn count(&self, verdict: &str) -> u64 {
        self.mesh.counter(&self.pod, verdict).unwrap()
    }

    fn pod_ip(&self, family: Family) -> IpAddr {
        self.pod.ip(family).unwrap()
    }
}

/// An address of the resolver's network where nobody is.
fn nobody(family: Family) -> SocketAddr {
    match family {
        Family::V4 => "10.88.0.99:53".parse().unwrap(),
        Family::V6 => "[fd88::99]:53".parse().unwrap(),
    }
}
