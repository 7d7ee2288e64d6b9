//! Who is in the mesh, and how: from a pod, its namespace and the settings to a wish, with its reason.
//!
//! Pure: looks at nothing but its arguments. An annotation that we write ourselves is an output and never read here.

use std::{collections::BTreeSet, fmt, net::IpAddr};

use ipnet::IpNet;

pub use super::settings::{Selector, Settings, default_selectors, parse_selectors};
use super::{annotations::Reader, selector::Labels};
use crate::model::{Namespace, Phase, Pod, keys};

/// What should become of a pod.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Membership {
    /// In the mesh, like this.
    In(Wanted),
    /// Not in the mesh; if it was, it is to be let go.
    Out(Reason),
    /// Belongs into the mesh, but cannot be captured: to be said loudly.
    Refused(Refusal),
    /// Cannot be told or done yet: whatever is, stays.
    Wait(Waiting),
}

/// How a pod is to be captured.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Wanted {
    /// Plaintext from outside goes to the application, past ztunnel.
    pub bypass_inbound: bool,
    /// Names are asked of ztunnel.
    pub dns: bool,
    /// All resolvers that the pod's `resolv.conf` will name, where its manifest alone decides that.
    pub resolvers: BTreeSet<IpAddr>,
    /// What enters the pod by these interfaces is outbound traffic.
    pub virtual_interfaces: Vec<String>,
    /// Destination ports left alone.
    pub exclude_outbound_ports: BTreeSet<u16>,
    /// Destinations left alone.
    pub exclude_outbound_cidrs: BTreeSet<IpNet>,
    /// The pod's own ports left alone.
    pub exclude_inbound_ports: BTreeSet<u16>,
    /// What was asked for and not understood, one sentence each.
    pub warnings: Vec<String>,
}

/// Why a pod is not in the mesh.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Reason {
    /// `spec.hostNetwork`.
    HostNetwork,
    /// ztunnel itself.
    Ztunnel,
    /// Its namespace is excluded by configuration.
    ExcludedNamespace,
    /// Succeeded or failed.
    Ended,
    /// It has a sidecar.
    Sidecar,
    /// Its own label says so.
    OptedOut,
    /// Nobody asked for it.
    NotSelected,
}

/// Why a pod that belongs into the mesh is not captured.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// Its sockets are not this kernel's.
    RuntimeClass(String),
    /// It has IPv6 addresses only, and IPv6 is switched off.
    Ipv6Off,
}

/// What is missing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Waiting {
    /// The API shows no address yet; whoever knows the addresses from elsewhere may go ahead like this.
    Address(Wanted),
    /// Its namespace is not known (yet, or no longer), and the namespace decides.
    Namespace,
}

/// Decides about one pod. `namespace` is `None` where it is not known.
#[must_use]
pub fn decide(pod: &Pod, namespace: Option<&Namespace>, settings: &Settings) -> Membership {
    if let Some(reason) = never(pod, settings) {
        return Membership::Out(reason);
    }
    match namespace {
        Some(ns) if selected(pod, &ns.labels, settings) => {}
        None if settings
            .selectors
            .iter()
            .any(|s| s.pod_selector.matches(&pod.labels)) =>
        {
            return Membership::Wait(Waiting::Namespace);
        }
        _ => {
            let label = pod.labels.get(keys::DATAPLANE_MODE).map(String::as_str);
            return Membership::Out(if label == Some(keys::NONE) {
                Reason::OptedOut
            } else {
                Reason::NotSelected
            });
        }
    }
    if let Some(class) = &pod.runtime_class
        && settings.is_sandboxed(class)
    {
        return Membership::Refused(Refusal::RuntimeClass(class.clone()));
    }
    let nothing = Namespace::default();
    let wanted = wanted(pod, namespace.unwrap_or(&nothing), settings);
    if pod.addresses.is_empty() {
        Membership::Wait(Waiting::Address(wanted))
    } else if !settings.ipv6 && pod.addresses.iter().all(std::net::IpAddr::is_ipv6) {
        Membership::Refused(Refusal::Ipv6Off)
    } else {
        Membership::In(wanted)
    }
}

/// Whether any pod of that namespace may be in the mesh. Where this is false, a pod may start without asking: nothing
/// there is selected without a label of its own, and no pod has such a label (`opted_in` counts them).
#[must_use]
pub fn could_be_in(name: &str, labels: &Labels, opted_in: usize, settings: &Settings) -> bool {
    settings.could_be_in(name, labels, opted_in)
}

/// What holds whatever the labels say.
fn never(pod: &Pod, settings: &Settings) -> Option<Reason> {
    let is_ztunnel = pod.namespace == settings.system_namespace
        && pod.labels.get("app").is_some_and(|app| app == "ztunnel");
    if pod.host_network {
        Some(Reason::HostNetwork)
    } else if is_ztunnel {
        Some(Reason::Ztunnel)
    } else if settings.excluded_namespaces.contains(&pod.namespace) {
        Some(Reason::ExcludedNamespace)
    } else if matches!(pod.phase, Phase::Succeeded | Phase::Failed) {
        Some(Reason::Ended)
    } else if pod.annotations.contains_key(keys::SIDECAR_STATUS) {
        Some(Reason::Sidecar)
    } else {
        None
    }
}

fn selected(pod: &Pod, namespace: &Labels, settings: &Settings) -> bool {
    settings
        .selectors
        .iter()
        .any(|s| s.pod_selector.matches(&pod.labels) && s.namespace_selector.matches(namespace))
}

fn wanted(pod: &Pod, namespace: &Namespace, settings: &Settings) -> Wanted {
    let mut read = Reader::new(&pod.annotations, &namespace.annotations);
    Wanted {
        bypass_inbound: read.switch(keys::BYPASS_INBOUND).unwrap_or(false),
        dns: read.switch(keys::DNS_CAPTURE).unwrap_or(settings.dns),
        resolvers: pod.nameservers.clone(),
        virtual_interfaces: read.interfaces(keys::VIRTUAL_INTERFACES),
        exclude_outbound_ports: read.ports(keys::EXCLUDE_OUTBOUND_PORTS),
        exclude_outbound_cidrs: read.networks(keys::EXCLUDE_OUTBOUND_CIDRS),
        exclude_inbound_ports: read.ports(keys::EXCLUDE_INBOUND_PORTS),
        warnings: read.warnings,
    }
}

impl Reason {
    /// As a label of a metric or a key in JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::HostNetwork => "host_network",
            Self::Ztunnel => "ztunnel",
            Self::ExcludedNamespace => "excluded_namespace",
            Self::Ended => "ended",
            Self::Sidecar => "sidecar",
            Self::OptedOut => "opted_out",
            Self::NotSelected => "not_selected",
        }
    }
}

impl Refusal {
    /// As a label of a metric or a key in JSON.
    #[must_use]
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::RuntimeClass(_) => "runtime_class",
            Self::Ipv6Off => "ipv6_off",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::HostNetwork => "it uses the node's network (spec.hostNetwork)",
            Self::Ztunnel => "it is ztunnel itself",
            Self::ExcludedNamespace => "its namespace is excluded by configuration",
            Self::Ended => "it has ended",
            Self::Sidecar => "it has a sidecar (annotation sidecar.istio.io/status)",
            Self::OptedOut => "its label istio.io/dataplane-mode=none keeps it out",
            Self::NotSelected => {
                "neither its labels nor its namespace's ask for the mesh (istio.io/dataplane-mode=ambient does)"
            }
        })
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RuntimeClass(class) => write!(
                f,
                "its runtime class {class} keeps its sockets in a kernel of its own, where they cannot be captured: run \
                 it with the node's default runtime, or keep it out with the label istio.io/dataplane-mode=none"
            ),
            Self::Ipv6Off => f.write_str(
                "it has IPv6 addresses only, and capturing IPv6 is switched off: switch it on (AMBIENT_IPV6=true), or \
                 keep the pod out with the label istio.io/dataplane-mode=none",
            ),
        }
    }
}

impl fmt::Display for Waiting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Address(_) => "it has no address yet",
            Self::Namespace => "its namespace is not known yet",
        })
    }
}

/// A sentence that continues "the pod is".
impl fmt::Display for Membership {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::In(_) => f.write_str("in the mesh"),
            Self::Out(reason) => write!(f, "not in the mesh: {reason}"),
            Self::Refused(why) => write!(f, "refused: {why}"),
            Self::Wait(what) => write!(f, "waiting: {what}"),
        }
    }
}

#[cfg(test)]
mod tests;
