//! Every metric of the agent, in one struct that is registered once.
//!
//! Each series exists from the start, at 0. The help text begins with `[STABLE]` where name, labels and meaning stay from
//! release to release; docs/metrics.md lists them all and is compared with what is encoded here.

use std::{fmt, sync::Arc, time::Duration};

use prometheus_client::{
    encoding::text::encode,
    metrics::{counter::Counter, family::Family, gauge::Gauge, info::Info},
    registry::Registry,
};

use super::{
    book::{
        Book, Histograms,
        Stability::{Stable, Unstable},
    },
    labels::{
        By, CiliumSetting, CniCommand, Labels, Outcome, RepairKind, SpanOutcome, Stage,
        UnenrolReason, ZdsOutcome,
    },
    sources::Sources,
    verdicts::Verdicts,
};

/// The metrics.
#[derive(Debug)]
pub struct Metrics {
    /// ztunnels that are connected.
    pub ztunnel_connected: Gauge,
    /// Files that the ztunnel nearest its limit has open.
    pub ztunnel_open_files: Gauge,
    /// And how many it may.
    pub ztunnel_open_files_limit: Gauge,
    /// How long they took.
    pub cni_duration: Histograms<By<CniCommand>>,
    /// Pods that are to be enrolled.
    pub wanted_pods: Gauge,
    /// Pods that are: kernel and ztunnel.
    pub enrolled_pods: Gauge,
    /// Pods that the kernel captures and ztunnel has not acknowledged.
    pub pending_pods: Gauge,
    /// Pods that are let go and whose old connections still use our rules.
    pub draining_pods: Gauge,
    /// Pods whose last enrolment failed.
    pub failing_pods: Gauge,
    /// Enrolments.
    pub enrolments: Family<By<Outcome>, Counter>,
    /// How long they took.
    pub enrol_duration: Histograms<By<Stage>>,
    /// Pods let go.
    pub unenrolments: Family<By<UnenrolReason>, Counter>,
    /// Repairs.
    pub repairs: Family<By<RepairKind>, Counter>,
    /// Rounds of the reconcile loop.
    pub reconcile_rounds: Counter,
    /// Connections of ztunnels that were taken.
    pub zds_connections: Counter,
    /// Connections that were not: wrong peer, wrong protocol.
    pub zds_refused: Counter,
    /// Messages to ztunnel.
    pub zds_messages: Family<By<ZdsOutcome>, Counter>,
    /// Writes of the redirection annotation.
    pub annotation_writes: Family<By<Outcome>, Counter>,
    /// Spans of traces, those that did not fit the queue left out.
    pub trace_spans: Family<By<SpanOutcome>, Counter>,
    /// 1 for each setting of Cilium's that is wrong.
    pub cilium_findings: Family<By<CiliumSetting>, Gauge>,
    pub(super) verdicts: Arc<Verdicts>,
    pub(super) sources: Sources,
    registry: Registry,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// All at 0.
    #[must_use]
    pub fn new() -> Self {
        let mut book = Book(Registry::default());
        let build = vec![
            ("version", env!("CARGO_PKG_VERSION")),
            ("rust_version", env!("CARGO_PKG_RUST_VERSION")),
        ];
        book.0.register(
            "culvert_build",
            Book::help(Stable, "Which build this is"),
            Info::new(build),
        );
        let verdicts = Arc::new(Verdicts::default());
        let metrics = Self {
            ztunnel_connected: book.gauge(
                "ztunnel_connected",
                Stable,
                "ztunnels connected to this agent",
            ),
            ztunnel_open_files: book.gauge(
                "culvert_ztunnel_open_files",
                Stable,
                "Files that a connected ztunnel has open, of several that which is nearest its limit",
            ),
            ztunnel_open_files_limit: book.gauge(
                "culvert_ztunnel_open_files_limit",
                Stable,
                "Files that this ztunnel may have open; 0 while none is connected",
            ),
            cni_duration: book.histograms(
                "culvert_cni_request_duration_seconds",
                Stable,
                "Time from a request of the CNI plugin to its answer",
            ),
            wanted_pods: book.gauge(
                "culvert_wanted_pods",
                Stable,
                "Pods of this node that belong to the mesh",
            ),
            enrolled_pods: book.gauge(
                "culvert_enrolled_pods",
                Stable,
                "Pods that the kernel captures and ztunnel serves",
            ),
            pending_pods: book.gauge(
                "culvert_pending_pods",
                Stable,
                "Pods that the kernel captures and ztunnel has not acknowledged yet",
            ),
            draining_pods: book.gauge(
                "culvert_draining_pods",
                Unstable,
                "Pods that are let go and whose old connections still need rules",
            ),
            failing_pods: book.gauge(
                "culvert_failing_pods",
                Stable,
                "Pods that belong to the mesh and whose last enrolment failed",
            ),
            enrolments: book.counters("culvert_enrolments", Stable, "Enrolments of pods"),
            enrol_duration: book.histograms(
                "culvert_enrol_duration_seconds",
                Stable,
                "Time an enrolment took",
            ),
            unenrolments: book.counters("culvert_unenrolments", Stable, "Pods let go"),
            repairs: book.counters(
                "culvert_repairs",
                Stable,
                "What was found not as it should be, and put right",
            ),
            reconcile_rounds: book.counter(
                "culvert_reconcile_rounds",
                Unstable,
                "Rounds of the reconcile loop",
            ),
            zds_connections: book.counter(
                "culvert_zds_connections",
                Stable,
                "Connections of ztunnels that were taken",
            ),
            zds_refused: book.counter(
                "culvert_zds_refused_connections",
                Stable,
                "Connections to ztunnel's socket that were refused",
            ),
            zds_messages: book.counters("culvert_zds_messages", Stable, "Messages to ztunnel"),
            annotation_writes: book.counters(
                "culvert_annotation_writes",
                Stable,
                "Writes of the annotation ambient.istio.io/redirection",
            ),
            trace_spans: book.counters(
                "culvert_trace_spans",
                Unstable,
                "Spans of traces sent to the collector",
            ),
            cilium_findings: book.gauges(
                "culvert_cilium_findings",
                Stable,
                "1 for each setting of Cilium that the mesh cannot live with; the node's events say what to do",
            ),
            sources: Sources::register(&mut book),
            verdicts: Arc::clone(&verdicts),
            registry: Registry::default(),
        };
        book.0.register_collector(Box::new(verdicts));
        Self {
            registry: book.0,
            ..metrics
        }
    }

    /// Notes how long something took.
    pub fn observe<L: Labels>(family: &Histograms<L>, labels: &L, took: Duration) {
        family.get_or_create(labels).observe(took.as_secs_f64());
    }

    /// As OpenMetrics text.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut text = String::with_capacity(32 * 1024);
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}
