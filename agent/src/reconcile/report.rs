//! What the agent knows of its pods, for `culvert status` and for metrics.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::{Reconciler, world::World};
use crate::{
    model::Redirection,
    plan::pod::{Kernel, Wish, Ztunnel},
};

/// One pod that is, was or should be in the mesh.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PodReport {
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
    /// `metadata.uid`.
    pub uid: String,
    /// It is meant to be in the mesh.
    pub wanted: bool,
    /// `waiting`, `captured`, `served`, `broken`, `draining`, `leaving` or `out`.
    pub state: String,
    /// Its addresses as the cluster knows them.
    pub addresses: Vec<IpAddr>,
    /// Value of the redirection annotation.
    pub redirection: Option<Redirection>,
    /// Why it is not as wanted, or not wanted.
    pub reason: Option<String>,
    /// Tries that failed since it last went well.
    pub tries: u32,
    /// Milliseconds until the next try; none while there is nothing to retry.
    pub retry_in_ms: Option<u64>,
    /// Old connections that still need the pod's rules.
    pub draining: usize,
    /// What in its annotations was ignored.
    pub warnings: Vec<String>,
}

impl<W: World> Reconciler<W> {
    /// All pods that mean something to the mesh.
    #[must_use]
    pub fn report(&self) -> Vec<PodReport> {
        let now = Instant::now();
        let entries = self.entries();
        let report = entries.values().map(|entry| {
            let so = entry.observed(now);
            let state = match (entry.wish, so.kernel, so.ztunnel) {
                (_, Kernel::Draining, _) => "draining",
                (Wish::In, Kernel::In, Ztunnel::Acked) => "served",
                (Wish::In, Kernel::In, _) => "captured",
                (Wish::In, Kernel::Stale, _) => "broken",
                (Wish::In, Kernel::Out, _) => "waiting",
                (_, Kernel::In | Kernel::Stale, _) => "leaving",
                _ => "out",
            };
            let trouble = entry.trouble.as_ref();
            let reason = trouble.map_or(entry.reason.as_str(), |t| t.failure.message.as_str());
            PodReport {
                namespace: entry.target.namespace.clone(),
                name: entry.target.name.clone(),
                uid: entry.target.uid.to_string(),
                wanted: entry.wish == Wish::In,
                state: state.to_owned(),
                addresses: entry.addresses.iter().copied().collect(),
                redirection: entry.annotation,
                reason: (!reason.is_empty()).then(|| reason.to_owned()),
                tries: trouble.map_or(0, |t| t.tries),
                retry_in_ms: trouble
                    .and_then(|t| t.again)
                    .map(|at| u64::try_from((at - now).as_millis()).unwrap_or(u64::MAX)),
                draining: entry.draining,
                warnings: entry.warnings.clone(),
            }
        });
        report.collect()
    }
}
