//! What all pods of one proxy share: settings from the command line.

use std::time::Duration;

use crate::dns::Dns;
use crate::identity::Ca;
use crate::workloads::Workloads;

/// Shared by all pods.
#[derive(Debug)]
pub struct Config {
    /// Issues the pods' certificates.
    pub ca: Ca,
    /// Peers that speak HBONE.
    pub workloads: Workloads,
    /// Names and the resolver.
    pub dns: Dns,
    /// Where lookups are answered.
    pub dns_listen: DnsListen,
    /// How long connections may go on after SIGTERM.
    pub drain: Duration,
}

/// On which loopback addresses of a pod lookups are answered, over UDP and TCP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum DnsListen {
    /// As ztunnel does it where the pod has both families.
    Both,
    /// As where ::1 cannot be bound.
    Ipv4,
    /// As a ztunnel does it that has its DNS proxy switched off.
    None,
}
