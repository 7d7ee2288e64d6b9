//! The terms in which a conversation is spoken of: who a pod is, what is said and heard, and why it ends. Plain data, known to
//! the conversation, to those who decide who is told, and to those who carry it out.

use std::{
    fmt,
    time::{Duration, Instant},
};

use super::messages::VERSION;
use crate::model::PodUid;

/// Who a pod is, for ztunnel's certificate request and logs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Workload {
    /// The pod's name.
    pub name: String,
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's service account.
    pub service_account: String,
}

/// Numbers each pairing of a pod with a namespace, so that an ack is never taken for that of an earlier one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(super) struct Generation(pub(super) u64);

/// Numbers the calls that wait for a pod to be let go.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(super) struct RemovalId(pub(super) u64);

/// A pod that ztunnel is to serve.
#[derive(Clone, Debug)]
pub(super) struct Wanted<N> {
    pub(super) workload: Workload,
    /// `None`: in the mesh, but the namespace is not known.
    pub(super) netns: Option<N>,
    pub(super) generation: Generation,
    /// Somebody waits for its ack.
    pub(super) awaited: bool,
}

/// How long to wait for what.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Patience {
    pub(super) hello: Duration,
    pub(super) ack: Duration,
    /// Before what was nacked is said again: first, and at most.
    pub(super) retry: (Duration, Duration),
}

/// What is to be said.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Message<N> {
    Add {
        uid: PodUid,
        workload: Workload,
        netns: N,
    },
    Keep {
        uid: PodUid,
    },
    SnapshotSent,
    Del {
        uid: PodUid,
    },
}

/// What the connection does next.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Step<N> {
    /// Say this, and have it answered by then.
    Send(Message<N>, Instant),
    /// Listen; look again when something changes, or at this time.
    Wait(Option<Instant>),
    /// Hang up.
    Close(Reason),
}

/// What was outstanding when an answer came.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Said {
    Add(PodUid, Generation),
    Keep(PodUid),
    SnapshotSent,
    Del(PodUid, Vec<RemovalId>),
}

/// What a packet of ztunnel's meant.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Heard {
    Hello,
    Ack(Said),
    Nack(Said, String),
}

/// Why a conversation is over.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Reason {
    /// ztunnel has ended or closed the connection.
    #[error("ztunnel has hung up")]
    HungUp,
    /// Whoever connected never said what it is.
    #[error("no hello within {0:?}: whoever connected does not speak ZDS")]
    NoHello(Duration),
    /// A ztunnel newer than we are.
    #[error(
        "its hello is of version {0}, not {VERSION}: run a ztunnel of the release that this agent supports"
    )]
    Version(i32),
    /// An answer did not come in time; a later one could not be told from the next.
    #[error(
        "{said} was not acknowledged within {after:?}: look at ztunnel's log and whether it gets CPU time"
    )]
    Late {
        /// The message.
        said: String,
        /// The time it was given.
        after: Duration,
    },
    /// It said something that ZDS does not allow.
    #[error("ztunnel broke the protocol: {0}")]
    Protocol(String),
    /// It did not accept the end of the snapshot, so what it serves is unknown.
    #[error("ztunnel refused the end of its snapshot: {0}")]
    Snapshot(String),
    /// The kernel would not carry a message.
    #[error("cannot send to ztunnel: {0}")]
    Send(String),
    /// The kernel would not deliver a message.
    #[error("cannot hear ztunnel: {0}")]
    Receive(String),
    /// This server has ended.
    #[error("the agent has stopped serving ztunnels")]
    Stopped,
}

/// How far a conversation has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum PeerState {
    /// Connected, has not said hello.
    Greeting,
    /// Has said hello and waits until the node's pods are known here.
    Held,
    /// Is being told which pods there are.
    Snapshot,
    /// Knows all pods, and is told what changes.
    Synced,
}

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Add(uid, _) => write!(f, "Add of pod {uid}"),
            Self::Keep(uid) => write!(f, "Keep of pod {uid}"),
            Self::SnapshotSent => f.write_str("SnapshotSent"),
            Self::Del(uid, _) => write!(f, "Del of pod {uid}"),
        }
    }
}
