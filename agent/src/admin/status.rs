//! What `culvert status` shows: the agent's own account of itself, as JSON over its socket.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::readiness::ReadinessReport;
use crate::model::{PodUid, Redirection};

/// The agent's account of itself, at `/v1/status` of its socket.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct StatusReport {
    /// The Node object's name.
    pub node: String,
    /// The agent's version.
    pub version: String,
    /// Its process id.
    pub pid: u32,
    /// How long it has been running.
    pub uptime_seconds: u64,
    /// Whether it is ready, and what is not.
    pub readiness: ReadinessReport,
    /// ztunnels that are connected, newest first.
    pub ztunnels: Vec<ZtunnelStatus>,
    /// Pods that are or should be enrolled, or are being let go.
    pub pods: Vec<PodStatus>,
}

/// A ztunnel that is connected.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ZtunnelStatus {
    /// Its process id, as seen from the agent.
    pub pid: u32,
    /// How long it has been connected.
    pub connected_seconds: u64,
    /// It has had its snapshot: new pods are given to the newest that has.
    pub snapshot_sent: bool,
    /// Pods it has acknowledged.
    pub pods: usize,
    /// Pods it has refused, which it is given again.
    pub refused: usize,
}

/// How far a pod has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PodState {
    /// Nothing of ours is there.
    NotEnrolled,
    /// Its address or namespace is not known yet.
    Waiting,
    /// The kernel captures; ztunnel has not acknowledged.
    Pending,
    /// The kernel captures and ztunnel serves.
    Enrolled,
    /// Let go; old connections still use our rules.
    Draining,
    /// It failed, and is tried again.
    Failing,
    /// It cannot be enrolled.
    Refused,
}

impl PodState {
    /// For tables.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotEnrolled => "not enrolled",
            Self::Waiting => "waiting",
            Self::Pending => "pending",
            Self::Enrolled => "enrolled",
            Self::Draining => "draining",
            Self::Failing => "failing",
            Self::Refused => "refused",
        }
    }
}

/// A pod of this node.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct PodStatus {
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
    /// `metadata.uid`.
    pub uid: PodUid,
    /// It belongs to the mesh.
    pub wanted: bool,
    /// How far it has come.
    pub state: PodState,
    /// Its network namespace, once found.
    pub netns_cookie: Option<u64>,
    /// Addresses that count as its own.
    pub addresses: Vec<IpAddr>,
    /// What its annotation says, as far as we wrote it.
    pub redirection: Option<Redirection>,
    /// Why it is not as it should be; with the cure.
    pub last_error: Option<String>,
    /// When it is tried again.
    pub retry_in_seconds: Option<u64>,
    /// What deserves attention: bad annotations, a NetworkPolicy in the way.
    pub warnings: Vec<String>,
}
