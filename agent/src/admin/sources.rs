//! Whom the metrics ask: parts of the agent that count for themselves, and the process.

use std::{fs, sync::Arc};

use culvert_ebpf::abi::ProbeCounts;

use super::{
    Metrics,
    book::{
        Book,
        Stability::{self, Stable, Unstable},
    },
    sampled::{Read, Row, Sampled},
    verdicts::VerdictSource,
};
use crate::{cni_server, install, kernel::memory, watch};

/// The metrics that are read where somebody else keeps them.
#[derive(Debug)]
pub(super) struct Sources {
    plugin: [Arc<Sampled>; 3],
    watch: [Arc<Sampled>; 6],
    installer: [Arc<Sampled>; 3],
    probes: [Arc<Sampled>; 2],
}

#[expect(
    clippy::cast_precision_loss,
    reason = "counts stay far below 2^53, and Prometheus knows no other numbers"
)]
fn number(count: u64) -> f64 {
    count as f64
}

fn one(count: u64) -> Vec<Row> {
    vec![(Vec::new(), number(count))]
}

/// One row for each word of one label.
fn by<const N: usize>(rows: [(&str, u64); N]) -> Vec<Row> {
    rows.map(|(word, count)| (vec![word.to_owned()], number(count)))
        .into()
}

fn plugin_by_code(counters: &cni_server::Counters) -> Vec<Row> {
    counters
        .answered()
        .filter(|(method, ..)| *method == cni_server::Method::Add)
        .map(|(_, code, count)| (vec![code.to_string()], number(count)))
        .collect()
}

fn plugin_by_command(counters: &cni_server::Counters) -> Vec<Row> {
    counters
        .answered()
        .map(|(method, code, count)| {
            let labels = vec![method.name().to_owned(), code.to_string()];
            (labels, number(count))
        })
        .collect()
}

fn watch_restarts(stats: &watch::stats::Stats) -> Vec<Row> {
    let silent = stats.dead_connections.get();
    let error = stats.interruptions.get().saturating_sub(silent);
    by([("silent", silent), ("error", error)])
}

fn watch_events(stats: &watch::stats::Stats) -> Vec<Row> {
    by([
        ("add", stats.added.get()),
        ("update", stats.updated.get()),
        ("delete", stats.deleted.get()),
    ])
}

fn installs(status: &install::Status) -> Vec<Row> {
    by([
        ("SUCCESS", status.installs),
        ("COPY_BINARIES_FAILURE", status.plugin_failures),
        ("CREATE_CNI_CONFIG_FAILURE", status.configuration_failures),
    ])
}

fn vouched(counts: ProbeCounts) -> Vec<Row> {
    by([("kubelet", counts.kubelet), ("node", counts.node)])
}

impl Sources {
    pub(super) fn register(book: &mut Book) -> Self {
        let mut counter = |name, stability, help: &str, labels, read| {
            book.sampled(name, stability, help, labels, false, read)
        };
        let none = cni_server::Counters::default();
        let (codes, commands) = (plugin_by_code(&none), plugin_by_command(&none));
        let plugin = [
            counter(
                "istio_cni_plugin_requests",
                Stable,
                "ADD requests of the CNI plugin by the HTTP status of the answer",
                &["response_code"],
                fixed(codes),
            ),
            counter(
                "culvert_cni_requests",
                Stable,
                "Requests of the CNI plugin by the HTTP status of the answer",
                &["command", "response_code"],
                fixed(commands),
            ),
            counter(
                "culvert_cni_dropped_requests",
                Stable,
                "Requests of CNI plugins that went away before the answer",
                &[],
                fixed(one(0)),
            ),
        ];
        let stats = watch::stats::Stats::default();
        let watch = [
            counter(
                "nodeagent_reconcile_events",
                Stable,
                "Changes of pods and namespaces that the watches reported",
                &["type"],
                fixed(watch_events(&stats)),
            ),
            counter(
                "culvert_watch_restarts",
                Stable,
                "Watches of the API server that were begun anew, because the connection had silently died or with an error",
                &["reason"],
                fixed(watch_restarts(&stats)),
            ),
            counter(
                "culvert_watch_lists",
                Unstable,
                "Complete lists read from the API server",
                &[],
                fixed(one(0)),
            ),
            counter(
                "culvert_watch_objects",
                Unstable,
                "Objects received from the API server",
                &[],
                fixed(one(0)),
            ),
            counter(
                "culvert_events_suppressed",
                Unstable,
                "Kubernetes events that were not written because there were too many",
                &[],
                fixed(one(0)),
            ),
            counter(
                "culvert_events_failed",
                Unstable,
                "Kubernetes events that the API server did not take",
                &[],
                fixed(one(0)),
            ),
        ];
        let status = install::Status::default();
        let (installs, healed) = (
            counter(
                "istio_cni_installs",
                Stable,
                "Installations of the CNI plugin, those that heal included",
                &["result"],
                fixed(installs(&status)),
            ),
            counter(
                "culvert_cni_heals",
                Stable,
                "Installations of the CNI plugin after somebody else had undone the last one",
                &[],
                fixed(one(0)),
            ),
        );
        let probes = [
            counter(
                "culvert_vouched_connections",
                Stable,
                "Connections from the node to enrolled pods that passed by ztunnel as probes",
                &["source"],
                fixed(by([("kubelet", 0), ("node", 0)])),
            ),
            counter(
                "culvert_not_vouched_node_connections",
                Stable,
                "Connections from the node to enrolled pods that went through ztunnel because of the probe source in force",
                &[],
                fixed(one(0)),
            ),
        ];
        let ready = book.sampled(
            "istio_cni_install_ready",
            Stable,
            "1 while the CNI plugin and its configuration are in place; absent where somebody else installs them",
            &[],
            true,
            fixed(one(0)),
        );
        process(book);
        Self {
            plugin,
            watch,
            installer: [installs, healed, ready],
            probes,
        }
    }
}

fn fixed(rows: Vec<Row>) -> Read {
    Box::new(move || rows.clone())
}

/// Numbers of this process, under the names that Prometheus's own libraries give them.
fn process(book: &mut Book) {
    type Number = (&'static str, &'static str, bool, fn() -> Option<f64>);
    let all: [Number; 5] = [
        (
            "culvert_heap_in_use_bytes",
            "What of the agent's memory is in use by it; the rest of the resident memory is code and the allocator's",
            true,
            || memory::in_use().and_then(|bytes| u64::try_from(bytes).ok().map(number)),
        ),
        (
            "process_resident_memory_bytes",
            "Resident memory of the agent",
            true,
            || status("VmRSS:").map(|kib| kib * 1024.0),
        ),
        ("process_threads", "Threads of the agent", true, || {
            status("Threads:")
        }),
        (
            "process_open_fds",
            "Open descriptors of the agent",
            true,
            || {
                let count = fs::read_dir("/proc/self/fd").ok()?.count();
                // One of them is the directory.
                u64::try_from(count.saturating_sub(1)).ok().map(number)
            },
        ),
        (
            "process_cpu_seconds",
            "CPU time of the agent",
            false,
            cpu_seconds,
        ),
    ];
    for (name, help, gauge, read) in all {
        let rows = move || {
            read()
                .map(|value| (Vec::new(), value))
                .into_iter()
                .collect()
        };
        let stability: Stability = Stable;
        drop(book.sampled(name, stability, help, &[], gauge, Box::new(rows)));
    }
}

fn status(key: &str) -> Option<f64> {
    let text = fs::read_to_string("/proc/self/status").ok()?;
    let value = text.lines().find_map(|l| l.strip_prefix(key))?;
    value.split_whitespace().next()?.parse().ok()
}

fn cpu_seconds() -> Option<f64> {
    /// `sysconf(_SC_CLK_TCK)`, which is 100 on every architecture of Linux that we run on.
    const TICKS: f64 = 100.0;
    let text = fs::read_to_string("/proc/self/stat").ok()?;
    // The program's name may contain anything; it ends with the last parenthesis.
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = |at: usize| fields.get(at)?.parse::<f64>().ok();
    Some((ticks(11)? + ticks(12)?) / TICKS)
}

impl Metrics {
    /// Says where the decisions of the kernel's programs are read, pod by pod.
    pub fn count_verdicts(&self, source: VerdictSource) {
        self.verdicts.read_from(source);
    }

    /// Says who counts the plugin's requests.
    pub fn count_plugin(&self, counters: &Arc<cni_server::Counters>) {
        let [codes, commands, dropped] = &self.sources.plugin;
        let reads: [fn(&cni_server::Counters) -> Vec<Row>; 3] =
            [plugin_by_code, plugin_by_command, |c| one(c.dropped())];
        for (metric, read) in [codes, commands, dropped].into_iter().zip(reads) {
            let counters = Arc::clone(counters);
            metric.read_from(Box::new(move || read(&counters)));
        }
    }

    /// Says who watches.
    pub fn count_watch(&self, source: &Arc<watch::Source>) {
        let reads: [fn(&watch::stats::Stats) -> Vec<Row>; 6] = [
            watch_events,
            watch_restarts,
            |s| one(s.lists.get()),
            |s| one(s.objects.get()),
            |s| one(s.events_suppressed.get()),
            |s| one(s.events_failed.get()),
        ];
        for (metric, read) in self.sources.watch.iter().zip(reads) {
            let source = Arc::clone(source);
            let none = watch::stats::Stats::default();
            metric.read_from(Box::new(move || match source.as_ref() {
                watch::Source::Api(api) => read(api.stats()),
                watch::Source::Manifests(_) => read(&none),
            }));
        }
    }

    /// Says how the installer's state is read.
    pub fn count_installer(
        &self,
        state: impl Fn() -> install::Status + Send + Sync + Clone + 'static,
    ) {
        let reads: [fn(&install::Status) -> Vec<Row>; 3] = [
            installs,
            |s| one(s.healed),
            |s| {
                one(u64::from(matches!(
                    s.state,
                    install::State::Installed { .. }
                )))
            },
        ];
        for (metric, read) in self.sources.installer.iter().zip(reads) {
            let state = state.clone();
            metric.read_from(Box::new(move || read(&state())));
        }
    }

    /// Says that nothing is installed from here: whether the plugin is in place is not for us to say.
    pub fn count_no_installer(&self) {
        let [_, _, ready] = &self.sources.installer;
        ready.read_from(fixed(Vec::new()));
    }

    /// Says how the kernel's counts of probes are read; none when they cannot be read now.
    pub fn count_probes(
        &self,
        read: impl Fn() -> Option<ProbeCounts> + Send + Sync + Clone + 'static,
    ) {
        let reads: [fn(ProbeCounts) -> Vec<Row>; 2] = [vouched, |c| one(c.not_vouched)];
        for (metric, rows) in self.sources.probes.iter().zip(reads) {
            let read = read.clone();
            metric.read_from(Box::new(move || read().map(rows).unwrap_or_default()));
        }
    }
}
