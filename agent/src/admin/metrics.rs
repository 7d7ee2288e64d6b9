//! Every metric of the agent, in one struct that is registered once.
//!
//! Each series exists from the start, at 0. The help text begins with [STABLE] where name, labels and meaning stay from
//! release to release; docs/metrics.md lists them all and is compared with what is encoded here.

use std::{fmt, sync::Arc, time::Duration};

use prometheus_client::{
    encoding::text::encode,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram, info::Info},
    registry::Registry,
};

use super::{
    labels::{
        By, CniCommand, EventKind, InstallResult, Labels, Outcome, ProbeOrigin, RepairKind,
        ResponseCode, Stage, UnenrolReason, WatchRestart, Write, ZdsOutcome,
    },
    verdicts::{VerdictSource, Verdicts},
};

/// From 100 µs to 26 s, four to a factor of ten: an enrolment takes milliseconds, one that waits for ztunnel seconds.
const DURATIONS: [f64; 19] = [
    0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.003, 0.004, 0.006, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25,
    0.5, 1.0, 2.5, 10.0, 25.0,
];

fn durations() -> Histogram {
    Histogram::new(DURATIONS)
}

type Histograms<L> = Family<L, Histogram, fn() -> Histogram>;

/// Whether dashboards may rely on a metric.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stability {
    Stable,
    Unstable,
}
use Stability::{Stable, Unstable};

/// The metrics.
#[derive(Debug)]
pub struct Metrics {
    /// ztunnels that are connected.
    pub ztunnel_connected: Gauge,
    /// What the watches reported.
    pub reconcile_events: Family<By<EventKind>, Counter>,
    /// 1 while the plugin and its configuration are in place.
    pub install_ready: Gauge,
    /// Installations of the plugin.
    pub installs: Family<By<InstallResult>, Counter>,
    /// Requests of the plugin by what they were answered.
    pub plugin_requests: Family<By<ResponseCode>, Counter>,
    /// Requests of the plugin by command.
    pub cni_requests: Family<(By<CniCommand>, By<Outcome>), Counter>,
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
    /// Second and later tries of whatever failed.
    pub retries: Counter,
    /// Rounds of the reconcile loop.
    pub reconcile_rounds: Counter,
    /// How long they took.
    pub reconcile_duration: Histogram,
    /// Connections of ztunnels that were taken.
    pub zds_connections: Counter,
    /// Connections that were not: wrong peer, wrong protocol.
    pub zds_refused: Counter,
    /// Messages to ztunnel.
    pub zds_messages: Family<By<ZdsOutcome>, Counter>,
    /// Watches begun anew.
    pub watch_restarts: Family<By<WatchRestart>, Counter>,
    /// Writes to the API server.
    pub api_writes: Family<(By<Write>, By<Outcome>), Counter>,
    /// Connections of the node's processes that were vouched for.
    pub vouched: Family<By<ProbeOrigin>, Counter>,
    /// Connections of the node's processes to enrolled pods that were not vouched for.
    pub not_vouched: Counter,
    verdicts: Arc<Verdicts>,
    registry: Registry,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// Registers under a name and with a help text.
struct Book(Registry);

impl Book {
    fn help(stability: Stability, help: &str) -> String {
        match stability {
            Stable => format!("[STABLE] {help}"),
            Unstable => format!("[UNSTABLE] {help}"),
        }
    }

    fn one<M: prometheus_client::registry::Metric + Clone>(
        &mut self,
        name: &str,
        stability: Stability,
        help: &str,
        metric: M,
    ) -> M {
        self.0
            .register(name, Self::help(stability, help), metric.clone());
        metric
    }

    fn counter(&mut self, name: &str, stability: Stability, help: &str) -> Counter {
        self.one(name, stability, help, Counter::default())
    }

    fn gauge(&mut self, name: &str, stability: Stability, help: &str) -> Gauge {
        self.one(name, stability, help, Gauge::default())
    }

    fn counters<L: Labels>(
        &mut self,
        name: &str,
        stability: Stability,
        help: &str,
    ) -> Family<L, Counter> {
        let family = self.one(name, stability, help, Family::<L, Counter>::default());
        for labels in L::every() {
            drop(family.get_or_create(&labels));
        }
        family
    }

    fn histograms<L: Labels>(
        &mut self,
        name: &str,
        stability: Stability,
        help: &str,
    ) -> Histograms<L> {
        let new: fn() -> Histogram = durations;
        let family = self.one(name, stability, help, Family::new_with_constructor(new));
        for labels in L::every() {
            drop(family.get_or_create(&labels));
        }
        family
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
            ztunnel_connected: book.gauge("ztunnel_connected", Stable, "ztunnels connected to this agent"),
            reconcile_events: book.counters("nodeagent_reconcile_events", Stable, "Changes of pods and namespaces that the watches reported"),
            install_ready: book.gauge("istio_cni_install_ready", Stable, "1 while the CNI plugin and its configuration are in place"),
            installs: book.counters("istio_cni_installs", Stable, "Installations of the CNI plugin, those that heal included"),
            plugin_requests: book.counters("istio_cni_plugin_requests", Stable, "Requests of the CNI plugin by HTTP status of the answer"),
            cni_requests: book.counters("culvert_cni_requests", Stable, "Requests of the CNI plugin by command"),
            cni_duration: book.histograms("culvert_cni_request_duration_seconds", Stable, "Time from a request of the CNI plugin to its answer"),
            wanted_pods: book.gauge("culvert_wanted_pods", Stable, "Pods of this node that belong to the mesh"),
            enrolled_pods: book.gauge("culvert_enrolled_pods", Stable, "Pods that the kernel captures and ztunnel serves"),
            pending_pods: book.gauge("culvert_pending_pods", Stable, "Pods that the kernel captures and ztunnel has not acknowledged yet"),
            draining_pods: book.gauge("culvert_draining_pods", Unstable, "Pods that are let go and whose old connections still need rules"),
            failing_pods: book.gauge("culvert_failing_pods", Stable, "Pods that belong to the mesh and whose last enrolment failed"),
            enrolments: book.counters("culvert_enrolments", Stable, "Enrolments of pods"),
            enrol_duration: book.histograms("culvert_enrol_duration_seconds", Stable, "Time an enrolment took"),
            unenrolments: book.counters("culvert_unenrolments", Stable, "Pods let go"),
            repairs: book.counters("culvert_repairs", Stable, "What was found not as it should be, and put right"),
            retries: book.counter("culvert_retries", Unstable, "Second and later tries of what had failed"),
            reconcile_rounds: book.counter("culvert_reconcile_rounds", Unstable, "Rounds of the reconcile loop"),
            reconcile_duration: book.one(
                "culvert_reconcile_duration_seconds",
                Unstable,
                "Time a round of the reconcile loop took",
                durations(),
            ),
            zds_connections: book.counter("culvert_zds_connections", Stable, "Connections of ztunnels that were taken"),
            zds_refused: book.counter("culvert_zds_refused_connections", Stable, "Connections to ztunnel's socket that were refused"),
            zds_messages: book.counters("culvert_zds_messages", Stable, "Messages to ztunnel"),
            watch_restarts: book.counters("culvert_watch_restarts", Stable, "Watches of the API server that were begun anew"),
            api_writes: book.counters("culvert_api_writes", Unstable, "Writes to the API server"),
            vouched: book.counters("culvert_vouched_connections", Stable, "Connections from the node to enrolled pods that passed by ztunnel as probes"),
            not_vouched: book.counter(
                "culvert_not_vouched_node_connections",
                Stable,
                "Connections from the node to enrolled pods that went through ztunnel because of the probe source in force",
            ),
            verdicts: Arc::clone(&verdicts),
            registry: Registry::default(),
        };
        book.0.register_collector(Box::new(verdicts));
        Self {
            registry: book.0,
            ..metrics
        }
    }

    /// Says where the decisions of the kernel's programs are read, pod by pod, at each scrape.
    pub fn count_verdicts(&self, source: VerdictSource) {
        self.verdicts.read_from(source);
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
