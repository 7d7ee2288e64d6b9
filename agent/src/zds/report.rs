//! What the server is told and tells: options, events, status. Plain data; nothing here does anything.

use std::{
    os::fd::OwnedFd,
    sync::Arc,
    time::{Duration, SystemTime},
};

use super::terms::{PeerState, Reason};
use crate::model::PodUid;

/// What can be set. The defaults are ztunnel's own expectations.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// From a connection to its hello.
    pub hello: Duration,
    /// From a message to its ack.
    pub ack: Duration,
    /// Before a pod that was refused is offered again: first, doubled up to the second.
    pub retry: (Duration, Duration),
    /// How long [`Server::remove`](super::Server::remove) waits for all ztunnels together.
    pub remove: Duration,
    /// The user that ztunnel runs as, in our user namespace.
    pub uid: u32,
    /// Connections at the same time; more are refused.
    pub peers: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            hello: Duration::from_secs(5),
            ack: Duration::from_secs(5),
            retry: (Duration::from_secs(5), Duration::from_secs(60)),
            remove: Duration::from_secs(10),
            uid: 0,
            peers: 16,
        }
    }
}

/// A pod that ztunnel serves.
#[derive(Clone, Debug)]
pub struct Acked {
    /// The ztunnel's process number.
    pub pid: u32,
    /// The process itself; `None` before Linux 6.5.
    pub pidfd: Option<Arc<OwnedFd>>,
}

/// What happens without being asked for.
#[derive(Clone, Debug)]
pub enum Event {
    /// Somebody who may has connected.
    Connected {
        /// Its process number.
        pid: u32,
        /// The process itself; `None` before Linux 6.5.
        pidfd: Option<Arc<OwnedFd>>,
    },
    /// A ztunnel has had its snapshot: new pods go to it now.
    Synced {
        /// Its process number.
        pid: u32,
    },
    /// A ztunnel serves a pod, in the snapshot or after it.
    Acked {
        /// The pod.
        uid: PodUid,
        /// The ztunnel's process number.
        pid: u32,
    },
    /// A ztunnel refused a pod. It is offered again later.
    Nacked {
        /// The pod.
        uid: PodUid,
        /// The ztunnel's process number.
        pid: u32,
        /// Its reason.
        error: String,
    },
    /// A conversation is over.
    Disconnected {
        /// The process number.
        pid: u32,
        /// Why.
        reason: Reason,
    },
    /// Somebody was not let in.
    Refused {
        /// The process number, 0 when it cannot be seen from here.
        pid: i32,
        /// Its user.
        uid: u32,
        /// Why.
        why: &'static str,
    },
}

/// What `culvert status`, metrics and readiness show.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Status {
    /// [`Server::open`](super::Server::open) was called.
    pub open: bool,
    /// Pods to be served.
    pub pods: usize,
    /// Those of them whose namespace is not known.
    pub expected: usize,
    /// Oldest first.
    pub peers: Vec<PeerStatus>,
    /// Connections refused so far.
    pub refused: u64,
    /// Pods refused by ztunnels so far.
    pub nacks: u64,
    /// Conversations that ended because an ack or a hello came too late.
    pub timeouts: u64,
    /// Tries that failed for want of room in the kernel or because ztunnel did not read.
    pub send_retries: u64,
}

/// One connection.
#[derive(Clone, Debug, serde::Serialize)]
pub struct PeerStatus {
    /// Process number.
    pub pid: u32,
    /// Since when.
    pub connected: SystemTime,
    /// How far it has come.
    pub state: PeerState,
    /// Messages that wait.
    pub pending: usize,
    /// Pods it has acknowledged.
    pub served: usize,
    /// Pods it refuses at present.
    pub nacked: usize,
}
