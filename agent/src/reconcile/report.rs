//! What the agent knows of its pods, for `culvert status` and for metrics.

use tokio::time::Instant;

use super::{Entry, Reconciler, world::World};
use crate::{
    admin::status::{PodState, PodStatus},
    plan::pod::{Kernel, Wish, Ztunnel},
};

/// Of a pod that was served.
const AWAY: &str = "no ztunnel is connected: new connections wait, then are refused; look at this node's ztunnel pod";

fn state<P>(entry: &Entry<P>, now: Instant) -> PodState {
    let so = entry.observed(now);
    let failing = entry.trouble.is_some();
    match (entry.wish, so.kernel, so.ztunnel) {
        (_, Kernel::Draining | Kernel::Released, _) => PodState::Draining,
        (Wish::In, Kernel::In, Ztunnel::Acked) => PodState::Enrolled,
        (Wish::In, ..) if failing && entry.place.is_some() => PodState::Failing,
        (Wish::In, Kernel::In, _) => PodState::Pending,
        (Wish::In, Kernel::Stale, _) => PodState::Failing,
        (Wish::In, Kernel::Out, _) => PodState::Waiting,
        (Wish::Out, Kernel::Out, _) if entry.refused => PodState::Refused,
        _ => PodState::NotEnrolled,
    }
}

impl<W: World> Reconciler<W> {
    /// All pods that mean something to the mesh.
    #[must_use]
    pub fn report(&self) -> Vec<PodStatus> {
        let now = Instant::now();
        let entries = self.entries();
        let report = entries.values().map(|entry| {
            let trouble = entry.trouble.as_ref().or(entry.mute.as_ref());
            let reason = match trouble {
                Some(trouble) => trouble.failure.message.as_str(),
                None if entry.wish == Wish::In && entry.ztunnel == Ztunnel::Away => AWAY,
                None => entry.reason.as_str(),
            };
            let place = entry.place.as_ref();
            PodStatus {
                namespace: entry.target.namespace.clone(),
                name: entry.target.name.clone(),
                uid: entry.target.uid.clone(),
                wanted: entry.wish == Wish::In,
                state: state(entry, now),
                netns_cookie: place.map(|p| self.inner.world.cookie(p)),
                addresses: entry.addresses.iter().copied().collect(),
                redirection: entry.annotation,
                last_error: (!reason.is_empty()).then(|| reason.to_owned()),
                retry_in_seconds: entry.again().map(|at| (at - now).as_secs()),
                warnings: entry.warnings.clone(),
            }
        });
        report.collect()
    }

    /// Shows of each of them whether it is wanted, and how far it has come.
    pub fn for_each(&self, mut show: impl FnMut(bool, PodState)) {
        let now = Instant::now();
        for entry in self.entries().values() {
            show(entry.wish == Wish::In, state(entry, now));
        }
    }
}
