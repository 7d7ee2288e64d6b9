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
    /// How long connections may go on after SIGTERM.
    pub drain: Duration,
}
