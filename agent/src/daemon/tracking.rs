//! What the tracker finds out about captured pods, told: logged, counted, and on the pod where somebody should look.

use std::sync::Arc;

use anyhow::Result;
use tokio::sync::mpsc;

use crate::{
    admin::{Metrics, labels::By},
    kernel::{Node, track},
    reconcile::{Reconciler, world::World},
};

/// What the tracker says, in its order. Ends with the tracker's thread, however that comes about.
pub(super) type Events = mpsc::UnboundedReceiver<track::Event>;

/// Starts the tracker, which never waits for whoever listens.
pub(super) fn start(node: Arc<Node>) -> Result<(track::Tracker, Events)> {
    let (sender, events) = mpsc::unbounded_channel();
    let tracker = track::Tracker::start(node, move |event| {
        // The agent that ends does not listen any more.
        let _unheard = sender.send(event);
    })?;
    Ok((tracker, events))
}

/// Tells, for as long as the tracker lives.
pub(super) async fn tell<W: World>(
    mut events: Events,
    reconciler: Reconciler<W>,
    metrics: Arc<Metrics>,
) {
    while let Some(event) = events.recv().await {
        match event {
            track::Event::Followed { cookie, changes } => {
                tracing::info!(%cookie, changes = changes.join("; "), "the pod's interfaces or addresses changed");
            }
            track::Event::Repaired { cookie, repairs } => {
                for repair in &repairs {
                    metrics.repairs.get_or_create(&By(repair.kind.into())).inc();
                }
                let said: Vec<&str> = repairs.iter().map(|r| r.what.as_str()).collect();
                tracing::warn!(%cookie, repairs = said.join("; "), "something of ours was changed in the pod and is as it was");
                if !reconciler.put_back(cookie.0, repairs).await {
                    tracing::debug!(%cookie, "no pod is known to be there");
                }
            }
            track::Event::Gone { .. } => {}
            track::Event::Failed { cookie, error } => {
                tracing::warn!(%cookie, %error, "keeping the pod up to date; it is tried again");
            }
        }
    }
}
