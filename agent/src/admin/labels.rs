//! Labels of metrics: closed enums, so that the number of series is known when the program is built.

use std::fmt;

use prometheus_client::encoding::{
    EncodeLabel, EncodeLabelKey, EncodeLabelSet, EncodeLabelValue, LabelSetEncoder,
};

use crate::{kernel::verify, plan::cilium};

/// A label whose values are known beforehand.
pub trait Closed: Copy + Eq + std::hash::Hash + fmt::Debug + Send + Sync + 'static {
    /// The label's name.
    const NAME: &'static str;
    /// Every value it can have.
    const ALL: &'static [Self];
    /// A value as it is written.
    fn word(self) -> &'static str;
}

/// A set of labels all of whose combinations can be listed.
pub trait Labels:
    EncodeLabelSet + Clone + Eq + std::hash::Hash + fmt::Debug + Send + Sync + 'static
{
    /// Every combination.
    fn every() -> Vec<Self>;
}

/// The set of one label.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct By<L>(pub L);

impl<L: Closed> EncodeLabelSet for By<L> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        encode(encoder, L::NAME, self.0.word())
    }
}

impl<L: Closed> Labels for By<L> {
    fn every() -> Vec<Self> {
        L::ALL.iter().copied().map(Self).collect()
    }
}

impl<A: Labels, B: Labels> Labels for (A, B) {
    fn every() -> Vec<Self> {
        let pairs = |a: A| B::every().into_iter().map(move |b| (a.clone(), b));
        A::every().into_iter().flat_map(pairs).collect()
    }
}

/// Writes one label.
pub(super) fn encode(encoder: &mut LabelSetEncoder<'_>, name: &str, value: &str) -> fmt::Result {
    struct Label<'a>(&'a str, &'a str);
    impl EncodeLabel for Label<'_> {
        fn encode(
            &self,
            mut encoder: prometheus_client::encoding::LabelEncoder<'_>,
        ) -> fmt::Result {
            let mut key = encoder.encode_label_key()?;
            EncodeLabelKey::encode(&self.0, &mut key)?;
            let mut value = key.encode_label_value()?;
            EncodeLabelValue::encode(&self.1, &mut value)?;
            value.finish()
        }
    }
    Label(name, value).encode(encoder.encode_label())
}

macro_rules! labels {
    ($( $(#[$meta:meta])* $name:ident, $label:literal { $( $(#[$variant_meta:meta])* $variant:ident = $word:literal ),+ $(,)? } )+) => { $(
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        pub enum $name { $( $(#[$variant_meta])* $variant ),+ }

        impl Closed for $name {
            const NAME: &'static str = $label;
            const ALL: &'static [Self] = &[$( Self::$variant ),+];
            fn word(self) -> &'static str {
                match self { $( Self::$variant => $word ),+ }
            }
        }
    )+ };
}

impl From<verify::Kind> for RepairKind {
    fn from(kind: verify::Kind) -> Self {
        match kind {
            verify::Kind::Program | verify::Kind::Dns => Self::NodePrograms,
            verify::Kind::Entry => Self::Enrolment,
            verify::Kind::Link => Self::Program,
            verify::Kind::Rule => Self::Rules,
            verify::Kind::Route => Self::Routes,
            verify::Kind::Address => Self::Addresses,
            verify::Kind::Sysctl => Self::Sysctls,
        }
    }
}

impl From<cilium::Setting> for CiliumSetting {
    fn from(setting: cilium::Setting) -> Self {
        match setting {
            cilium::Setting::Ztunnel => Self::Ztunnel,
            cilium::Setting::CniExclusive => Self::CniExclusive,
            cilium::Setting::SocketLb => Self::SocketLb,
        }
    }
}

labels! {
    /// What the plugin asked for.
    CniCommand, "command" {
        /// A pod starts.
        Add = "add",
        /// A pod ends.
        Del = "del",
        /// Is it captured?
        Check = "check",
        /// These pods are left.
        Gc = "gc",
        /// Is the plugin usable?
        Status = "status",
    }

    /// How something that is tried ended.
    Outcome, "result" {
        /// Well.
        Success = "success",
        /// Badly; it is tried again.
        Retry = "retry",
        /// Badly, and trying again does not help until something changes.
        Failure = "failure",
    }

    /// What was not as it should be.
    RepairKind, "kind" {
        /// The pod was not enrolled any more.
        Enrolment = "enrolment",
        /// Policy rules.
        Rules = "rules",
        /// Routes.
        Routes = "routes",
        /// Sysctls.
        Sysctls = "sysctls",
        /// Own addresses.
        Addresses = "addresses",
        /// The program attached to the namespace.
        Program = "program",
        /// The node's programs.
        NodePrograms = "node_programs",
        /// ztunnel's listeners.
        Listeners = "listeners",
        /// The annotation.
        Annotation = "annotation",
        /// Something of ours that belongs to no pod.
        Leftover = "leftover",
    }

    /// What is wrong with Cilium.
    CiliumSetting, "setting" {
        /// It captures for a ztunnel itself.
        Ztunnel = "ztunnel",
        /// It puts our configuration aside.
        CniExclusive = "cni_exclusive",
        /// Its socket load balancing answers pods.
        SocketLb = "socket_lb",
    }

    /// Why a pod was let go.
    UnenrolReason, "reason" {
        /// It is not to be in the mesh any more.
        NotWanted = "not_wanted",
        /// It ended or was deleted.
        Gone = "gone",
    }

    /// Part of an enrolment.
    Stage, "stage" {
        /// Until the kernel captures.
        Kernel = "kernel",
        /// From then until ztunnel has acknowledged.
        Ztunnel = "ztunnel",
        /// Both, without the waiting between.
        Total = "total",
    }

    /// What became of a trace's span.
    SpanOutcome, "result" {
        /// The collector has it.
        Taken = "taken",
        /// The collector was away or did not want it.
        Lost = "lost",
    }

    /// What became of a message to ztunnel.
    ZdsOutcome, "result" {
        /// Acknowledged.
        Ack = "ack",
        /// Refused by ztunnel.
        Nack = "nack",
        /// Not answered in time.
        Timeout = "timeout",
    }
}
