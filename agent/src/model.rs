//! Pods and namespaces as the agent sees them: plain data, whatever they were read from.
//!
//! Only what a decision needs is kept, so that a node's worth of pods and a cluster's worth of namespaces stay small.
//! Nothing here decides, asks or changes anything.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use crate::plan::{network_policy::Ports, selector::LabelSelector};

/// `metadata.uid` of a pod.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PodUid(pub Arc<str>);

impl PodUid {
    /// The UID as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for PodUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<&str> for PodUid {
    fn from(uid: &str) -> Self {
        Self(uid.into())
    }
}

/// How far a pod has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum Phase {
    /// Not all containers have run yet, or nothing is known.
    #[default]
    Pending,
    /// At least one container runs.
    Running,
    /// Ended well: it needs its network no more.
    Succeeded,
    /// Ended badly: it needs its network no more.
    Failed,
}

/// One pod of this node.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Pod {
    /// `metadata.uid`.
    pub uid: PodUid,
    /// Annotation `kubernetes.io/config.hash` of a static pod: what the kubelet, the container runtime and the cgroup
    /// path use as its UID in place of the mirror pod's.
    pub static_uid: Option<PodUid>,
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
    /// `spec.serviceAccountName`.
    pub service_account: String,
    /// `metadata.labels`.
    pub labels: BTreeMap<String, String>,
    /// Those annotations that mean something to us.
    pub annotations: BTreeMap<String, String>,
    /// `spec.hostNetwork`.
    pub host_network: bool,
    /// `spec.runtimeClassName`.
    pub runtime_class: Option<String>,
    /// `status.phase`.
    pub phase: Phase,
    /// `metadata.deletionTimestamp` is set.
    pub deleting: bool,
    /// `status.podIPs`, or `status.podIP` where there is no list.
    pub addresses: BTreeSet<IpAddr>,
    /// `spec.dnsConfig.nameservers`, where `spec.dnsPolicy` is `None`: all that its `resolv.conf` will name. Otherwise the
    /// kubelet adds others, and this is empty.
    pub nameservers: BTreeSet<IpAddr>,
    /// Its condition [`keys::CAPTURED`], where it has one.
    pub uncaptured: Option<Uncaptured>,
}

/// A pod's condition [`keys::CAPTURED`], which is `False` or not there: why it is not in the mesh though it asks for it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Uncaptured {
    /// [`Self::REFUSED`] or [`Self::FAILING`].
    pub reason: String,
    /// In words, with the cure.
    pub message: String,
}

impl Uncaptured {
    /// It is of a kind that cannot be served.
    pub const REFUSED: &str = "Refused";
    /// It is tried again and again, in vain so far.
    pub const FAILING: &str = "Failing";
}

/// What it takes to speak about a pod after it has left the view.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct PodRef {
    /// `metadata.uid`.
    pub uid: PodUid,
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
}

impl fmt::Display for PodRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl Pod {
    /// Names this pod.
    #[must_use]
    pub fn reference(&self) -> PodRef {
        PodRef {
            uid: self.uid.clone(),
            namespace: self.namespace.clone(),
            name: self.name.clone(),
        }
    }

    /// Whether the node calls this pod by that UID: a static pod's is not its mirror pod's.
    #[must_use]
    pub fn is_called(&self, uid: &PodUid) -> bool {
        self.uid == *uid || self.static_uid.as_ref() == Some(uid)
    }

    /// What its annotation tells istiod now.
    #[must_use]
    pub fn redirection(&self) -> Option<&str> {
        self.annotations.get(keys::REDIRECTION).map(String::as_str)
    }
}

/// A namespace of the cluster.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Namespace {
    /// `metadata.labels`.
    pub labels: BTreeMap<String, String>,
    /// Those annotations that mean something to us.
    pub annotations: BTreeMap<String, String>,
}

/// A NetworkPolicy, as far as it tells who is cut off.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NetworkPolicy {
    /// Whom it selects.
    pub pods: LabelSelector,
    /// Rules for what comes in; none where it says nothing about that.
    pub inbound: Option<Vec<Ports>>,
    /// Rules for what goes out, likewise.
    pub outbound: Option<Vec<Ports>>,
}

/// All that is watched, as it is now.
#[derive(Clone, Debug, Default)]
pub struct Cluster {
    /// Pods and namespaces have been listed once: what is missing here does not exist.
    pub listed: bool,
    /// Pods of this node.
    pub pods: BTreeMap<PodUid, Pod>,
    /// All namespaces by name.
    pub namespaces: BTreeMap<String, Namespace>,
    /// Pods that ask for the mesh by their own labels have been listed once: who is missing in `opted_in` has none.
    pub opted_in_listed: bool,
    /// Namespaces in which a pod, on whatever node, asks for the mesh by its own label; with how many do.
    pub opted_in: BTreeMap<String, usize>,
    /// NetworkPolicies by namespace and name.
    pub policies: BTreeMap<String, BTreeMap<String, NetworkPolicy>>,
}

/// What the pod's annotation tells istiod.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Redirection {
    /// The kernel captures; ztunnel has not acknowledged yet.
    Pending,
    /// ztunnel serves the pod.
    Enabled,
}

impl Redirection {
    /// The annotation's value.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Enabled => "enabled",
        }
    }
}

/// Labels and annotations, spelled once.
pub mod keys {
    /// Label on pods and namespaces: [`AMBIENT`] or [`NONE`].
    pub const DATAPLANE_MODE: &str = "istio.io/dataplane-mode";
    /// In the mesh.
    pub const AMBIENT: &str = "ambient";
    /// Out of the mesh.
    pub const NONE: &str = "none";
    /// Annotation of pods with a sidecar.
    pub const SIDECAR_STATUS: &str = "sidecar.istio.io/status";
    /// Annotation we write: [`Redirection`](super::Redirection).
    pub const REDIRECTION: &str = "ambient.istio.io/redirection";
    /// Annotation: no inbound capture.
    pub const BYPASS_INBOUND: &str = "ambient.istio.io/bypass-inbound-capture";
    /// Annotation: DNS capture on or off.
    pub const DNS_CAPTURE: &str = "ambient.istio.io/dns-capture";
    /// Annotation: interfaces behind which others send.
    pub const VIRTUAL_INTERFACES: &str = "istio.io/reroute-virtual-interfaces";
    /// Annotation on pods or namespaces: destination ports left alone.
    pub const EXCLUDE_OUTBOUND_PORTS: &str = "culvert.dev/exclude-outbound-ports";
    /// Annotation on pods or namespaces: destinations left alone.
    pub const EXCLUDE_OUTBOUND_CIDRS: &str = "culvert.dev/exclude-outbound-cidrs";
    /// Annotation on pods or namespaces: the pod's own ports left alone.
    pub const EXCLUDE_INBOUND_PORTS: &str = "culvert.dev/exclude-inbound-ports";
    /// Condition we write on pods that ask for the mesh and are not in it: [`Uncaptured`](super::Uncaptured).
    pub const CAPTURED: &str = "culvert.dev/Captured";
    /// Annotation of static pods: their UID on the node.
    pub const CONFIG_HASH: &str = "kubernetes.io/config.hash";
    /// Annotation of pods in manifests: path of their network namespace.
    pub const NETNS: &str = "culvert.dev/netns";

    /// Annotations that are kept; all others are dropped when an object is read.
    pub const KEPT: [&str; 10] = [
        SIDECAR_STATUS,
        REDIRECTION,
        BYPASS_INBOUND,
        DNS_CAPTURE,
        VIRTUAL_INTERFACES,
        EXCLUDE_OUTBOUND_PORTS,
        EXCLUDE_OUTBOUND_CIDRS,
        EXCLUDE_INBOUND_PORTS,
        CONFIG_HASH,
        NETNS,
    ];
}
