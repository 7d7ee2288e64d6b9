//! What the plugin asks the agent and what it is told: JSON bodies of HTTP/1.1 requests over a unix socket.
//!
//! Both sides are built from these types. Fields may be added with a default, never renamed or given another meaning:
//! while a node is upgraded the plugin of one release talks to the agent of another.

use std::{fmt, net::IpAddr};

use serde::{Deserialize, Serialize};

/// The agent's socket unless the configuration names another.
pub const SOCKET: &str = "/run/culvert/agent.sock";

/// Longest body either side reads, in bytes.
pub const MAX_BODY: usize = 1 << 20;

/// Where each request goes.
pub mod paths {
    /// POST [`AddRequest`](super::AddRequest), answered with [`AddReply`](super::AddReply).
    pub const ADD: &str = "/v1/cni/add";
    /// POST [`DelRequest`](super::DelRequest), answered with `{}`.
    pub const DEL: &str = "/v1/cni/del";
    /// POST [`CheckRequest`](super::CheckRequest), answered with [`CheckReply`](super::CheckReply).
    pub const CHECK: &str = "/v1/cni/check";
    /// POST [`GcRequest`](super::GcRequest), answered with `{}`.
    pub const GC: &str = "/v1/cni/gc";
    /// GET, answered with [`StatusReply`](super::StatusReply).
    pub const STATUS: &str = "/v1/cni/status";
    /// POST [`LogRecord`](super::LogRecord), answered with `{}`.
    pub const LOG: &str = "/v1/cni/log";
}

/// Error codes of the CNI specification, and ours from 100 on.
pub mod code {
    /// The configuration's version is none of those we speak.
    pub const INCOMPATIBLE_VERSION: u32 = 1;
    /// A variable of the environment is missing or makes no sense.
    pub const INVALID_ENVIRONMENT: u32 = 4;
    /// A file, socket or stream could not be read or written.
    pub const IO: u32 = 5;
    /// What was read is not what it should be: no JSON, cut off, too long.
    pub const DECODING: u32 = 6;
    /// The network configuration is JSON but cannot be meant.
    pub const INVALID_CONFIG: u32 = 7;
    /// The runtime should come again later.
    pub const TRY_AGAIN_LATER: u32 = 11;
    /// STATUS: the plugin cannot serve an ADD.
    pub const NOT_AVAILABLE: u32 = 50;
    /// The agent cannot serve this pod, and trying again will not help.
    pub const CANNOT_ENROL: u32 = 100;
    /// CHECK: the pod is not steered as it should be.
    pub const NOT_STEERED: u32 = 101;
}

/// Which pod, as the runtime's `CNI_ARGS` name it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PodRef {
    /// `K8S_POD_NAMESPACE`.
    pub namespace: String,
    /// `K8S_POD_NAME`.
    pub name: String,
    /// `K8S_POD_UID`; older runtimes do not pass it. For a static pod it is the configuration's hash.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<String>,
}

impl fmt::Display for PodRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A pod is about to start: is it of the mesh, and if so, capture it now.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct AddRequest {
    /// The pod.
    pub pod: PodRef,
    /// `CNI_CONTAINERID`: the sandbox.
    pub container_id: String,
    /// `CNI_IFNAME`.
    pub ifname: String,
    /// Name of the network whose list the plugin is in.
    pub network: String,
    /// A path to the pod's network namespace, `/proc/PID/fd/N` of the plugin; the server puts in the number that whoever
    /// asks has in the agent's PID namespace. It can be opened until the plugin has its
    /// answer and no longer; the plugin does not look inside, so it may be no namespace at all.
    pub netns: String,
    /// The container's own addresses that earlier plugins of the list have set.
    pub addresses: Vec<IpAddr>,
    /// How long the plugin still waits for the answer, in milliseconds.
    pub budget_ms: u64,
}

/// The pod may start.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct AddReply {
    /// It is captured and ztunnel has acknowledged it; false: it is not of the mesh.
    pub enrolled: bool,
    /// Why, for the log.
    pub reason: String,
    /// Where the time went.
    #[serde(default)]
    pub timings: Timings,
}

/// Where the time of an ADD went, in microseconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Timings {
    /// Finding out what the pod is: waiting for the watch, asking the API server.
    pub lookup_us: u64,
    /// The kernel side.
    pub kernel_us: u64,
    /// From telling ztunnel to its acknowledgement.
    pub ztunnel_us: u64,
}

/// A sandbox is taken down, or one of its interfaces.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DelRequest {
    /// The pod, when the runtime says so.
    #[serde(default)]
    pub pod: Option<PodRef>,
    /// `CNI_CONTAINERID`.
    pub container_id: String,
    /// `CNI_IFNAME`.
    pub ifname: String,
    /// Name of the network.
    pub network: String,
}

/// Is a pod as its ADD left it?
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CheckRequest {
    /// The pod.
    pub pod: PodRef,
    /// `CNI_CONTAINERID`.
    pub container_id: String,
    /// `CNI_IFNAME`.
    pub ifname: String,
    /// Name of the network.
    pub network: String,
    /// As in [`AddRequest::netns`].
    pub netns: String,
    /// As in [`AddRequest::addresses`].
    pub addresses: Vec<IpAddr>,
}

/// How a pod stands.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct CheckReply {
    /// It is of the mesh.
    pub enrolled: bool,
    /// What is not as it should be.
    #[serde(default)]
    pub problem: Option<String>,
}

/// Of one network, all that still lives; what else the agent knows of that network is gone.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct GcRequest {
    /// Name of the network.
    pub network: String,
    /// `cni.dev/valid-attachments`.
    pub valid: Vec<Attachment>,
}

/// An interface of a sandbox.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct Attachment {
    /// `CNI_CONTAINERID`.
    #[serde(alias = "containerID")]
    pub container_id: String,
    /// `CNI_IFNAME`.
    pub ifname: String,
}

/// Whether the agent could serve an ADD.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct StatusReply {
    /// The agent's version.
    pub version: String,
    /// What is broken for good: no ADD of a mesh pod can succeed until a person acts. Never set because something is
    /// only late or away: a failing STATUS makes the node NotReady.
    #[serde(default)]
    pub broken: Option<String>,
}

/// How much a log record matters.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// All as it should be.
    Info,
    /// It worked, or was let go, but not as it should.
    Warn,
    /// The call failed.
    Error,
}

/// One line of the plugin's log.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LogRecord {
    /// RFC 3339, UTC.
    pub time: String,
    /// How much it matters.
    pub level: Level,
    /// `CNI_COMMAND`.
    pub command: String,
    /// The pod, when known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<PodRef>,
    /// `CNI_CONTAINERID`.
    #[serde(default)]
    pub container_id: String,
    /// `CNI_IFNAME`.
    #[serde(default)]
    pub ifname: String,
    /// What happened.
    pub message: String,
    /// How long the call took, in microseconds.
    #[serde(default)]
    pub took_us: u64,
    /// Where the time of an ADD went, as the agent says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timings: Option<Timings>,
}

/// Why a request was not done: the body of every answer that is not a success.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, thiserror::Error)]
#[error("{message}{}{cure}", if cure.is_empty() { "" } else { ": " })]
pub struct Refusal {
    /// For the runtime: one of [`code`].
    pub code: u32,
    /// What is wrong.
    pub message: String,
    /// What to do about it.
    #[serde(default)]
    pub cure: String,
    /// The same request may succeed in a moment: the plugin repeats it while its budget lasts.
    #[serde(default)]
    pub retry: bool,
    /// The agent itself does not know the cluster: what the plugin may decide without an agent it may decide now.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub undecided: bool,
}

impl Refusal {
    /// Not now: the plugin asks again while its budget lasts, and then the runtime comes again.
    pub fn later(message: impl Into<String>, cure: impl Into<String>) -> Self {
        Self {
            code: code::TRY_AGAIN_LATER,
            message: message.into(),
            cure: cure.into(),
            retry: true,
            undecided: false,
        }
    }

    /// As [`later`](Self::later), from an agent that knows no more than the plugin.
    pub fn undecided(message: impl Into<String>, cure: impl Into<String>) -> Self {
        Self {
            undecided: true,
            ..Self::later(message, cure)
        }
    }

    /// Not until somebody changes something: the plugin does not ask again.
    pub fn for_good(code: u32, message: impl Into<String>, cure: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            cure: cure.into(),
            retry: false,
            undecided: false,
        }
    }
}
