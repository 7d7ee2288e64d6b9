//! ztunnels that come and go: who they are, what they acknowledge, what follows for the pods.

use std::sync::Arc;

use anyhow::Result;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::{
    admin::{
        Metrics,
        labels::{By, ZdsOutcome},
    },
    config::Config,
    kernel::{Node, listeners},
    reconcile::{Reconciler, live::Live},
    zds::{self, Event},
};

/// Can the kernel side be told which process ztunnel is?
pub(super) fn can_be_named() -> bool {
    match listeners::check_process(std::process::id()) {
        Ok(()) => true,
        Err(error) => {
            tracing::warn!(%error, "ztunnel is told by its mark alone");
            false
        }
    }
}

/// Listens for ztunnels. Each is named to the kernel before it hears of a pod: its sockets in the pods would be refused
/// their mark otherwise.
pub(super) fn serve(
    config: &Config,
    node: Arc<Node>,
    named: bool,
) -> Result<(zds::Server, mpsc::UnboundedReceiver<Event>)> {
    let admit = move |pid| match named {
        true => listeners::name_process(&node, pid).map_err(|e| e.to_string()),
        false => Ok(()),
    };
    let options = zds::Options {
        // An agent that was killed leaves its socket; one that is ending may still hold it.
        ..zds::Options::default()
    };
    Ok(zds::Server::bind_with(&config.zds_socket, options, admit)?)
}

/// Follows the conversations.
pub(super) async fn listen(
    mut events: mpsc::UnboundedReceiver<Event>,
    reconciler: Reconciler<Live>,
    metrics: Arc<Metrics>,
    end: CancellationToken,
) {
    // Those that have had their snapshot.
    let mut serving: Vec<u32> = Vec::new();
    loop {
        let event = tokio::select! {
            () = end.cancelled() => return,
            event = events.recv() => match event {
                Some(event) => event,
                None => return,
            },
        };
        let count = |outcome| metrics.zds_messages.get_or_create(&By(outcome)).inc();
        match event {
            Event::Connected { .. } => {
                metrics.zds_connections.inc();
                metrics.ztunnel_connected.inc();
            }
            Event::Synced { pid } => {
                tracing::info!(pid, "ztunnel knows this node's pods");
                serving.push(pid);
                reconciler.ztunnels_changed(true);
            }
            Event::Acked { uid, .. } => {
                count(ZdsOutcome::Ack);
                reconciler.acked(&uid);
            }
            Event::Nacked { uid, error, .. } => {
                count(ZdsOutcome::Nack);
                reconciler.nacked(&uid, &error);
            }
            Event::Disconnected { pid, reason } => {
                metrics.ztunnel_connected.dec();
                if matches!(reason, zds::Reason::Late { .. }) {
                    count(ZdsOutcome::Timeout);
                }
                tracing::warn!(pid, ?reason, "a ztunnel is gone");
                if let Some(place) = serving.iter().position(|other| *other == pid) {
                    serving.swap_remove(place);
                    reconciler.ztunnels_changed(!serving.is_empty());
                }
            }
            Event::Refused { .. } => {
                metrics.zds_refused.inc();
            }
        }
    }
}
