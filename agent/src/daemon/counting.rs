//! What the parts do, as numbers.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use crate::{
    admin::{Liveness, Metrics, status::PodState},
    kernel::Node,
    reconcile::{Reconciler, live::Live},
};

/// After each pass: how many pods stand how, and that the loop lives.
pub(super) async fn keep(
    reconciler: Reconciler<Live>,
    metrics: Arc<Metrics>,
    liveness: Liveness,
    end: CancellationToken,
) {
    let mut passes = reconciler.passes();
    loop {
        tokio::select! {
            () = end.cancelled() => return,
            changed = passes.changed() => if changed.is_err() { return },
        }
        passes.mark_unchanged();
        liveness.beat();
        metrics.reconcile_rounds.inc();
        let mut counts = [0_i64; 4];
        let mut wanted = 0;
        reconciler.for_each(|pod_wanted, state| {
            wanted += i64::from(pod_wanted);
            match state {
                PodState::Enrolled => counts[0] += 1,
                PodState::Pending => counts[1] += 1,
                PodState::Draining => counts[2] += 1,
                PodState::Failing | PodState::Refused => counts[3] += 1,
                PodState::NotEnrolled | PodState::Waiting => {}
            }
        });
        let [enrolled, pending, draining, failing] = counts;
        metrics.wanted_pods.set(wanted);
        metrics.enrolled_pods.set(enrolled);
        metrics.pending_pods.set(pending);
        metrics.draining_pods.set(draining);
        metrics.failing_pods.set(failing);
    }
}

/// Sums of the pods' verdicts, read when they are asked for.
pub(super) fn verdicts(metrics: &Metrics, node: &Arc<Node>) {
    let node = Arc::clone(node);
    metrics.count_verdicts(Box::new(move || {
        let maps = node.maps();
        let cookies = maps.pods.keys().ok()?;
        let counts = cookies.into_iter().filter_map(|cookie| {
            let counters = maps.counters.get(cookie).ok()??;
            let mut row = [0; culvert_ebpf::decide::Verdict::ALL.len()];
            for (to, from) in row.iter_mut().zip(counters.by_verdict) {
                *to = from;
            }
            Some((cookie, row))
        });
        Some(counts.collect())
    }));
}

/// Connections from the node to enrolled pods.
pub(super) fn probes(metrics: &Metrics, node: &Arc<Node>) {
    let node = Arc::clone(node);
    metrics.count_probes(move || node.maps().probe_counts.get().ok());
}
