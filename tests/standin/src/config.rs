//! What all pods of one proxy share: settings from the command line.

use std::time::Duration;

use crate::workloads::Workloads;

/// Shared by all pods.
#[derive(Debug)]
pub struct Config {
    /// Peers that speak HBONE.
    pub workloads: Workloads,
    /// How long connections may go on after SIGTERM.
    pub drain: Duration,
}
