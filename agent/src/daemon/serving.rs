//! What is served beside the plugin's requests: health and metrics, and the status that `culvert status` prints.

use std::{sync::Arc, time::Instant};

use axum::{Json, Router, extract::State, routing::get};
use tokio_util::sync::CancellationToken;

use crate::{
    admin::{Readiness, StatusReport, server::Bound, status::ZtunnelStatus},
    reconcile::{Reconciler, live::Live},
    zds,
};

/// Health and metrics, until the end.
pub(super) async fn admin(bound: Bound, end: CancellationToken) {
    if let Err(error) = bound.serve(end).await {
        tracing::error!(%error, "health and metrics are not served any more");
    }
}

/// Where the status comes from.
#[derive(Debug)]
pub(super) struct Status {
    pub(super) node: String,
    pub(super) started: Instant,
    pub(super) readiness: Readiness,
    pub(super) zds: zds::Server,
    pub(super) reconciler: Reconciler<Live>,
}

/// `GET /v1/status`.
pub(super) fn status(status: Status) -> Router {
    Router::new()
        .route("/v1/status", get(report))
        .with_state(Arc::new(status))
}

async fn report(State(status): State<Arc<Status>>) -> Json<StatusReport> {
    let mut ztunnels: Vec<ZtunnelStatus> = status
        .zds
        .status()
        .peers
        .iter()
        .map(|peer| ZtunnelStatus {
            pid: peer.pid,
            connected_seconds: peer.connected.elapsed().unwrap_or_default().as_secs(),
            snapshot_sent: matches!(peer.state, zds::PeerState::Synced),
            pods: peer.served,
            refused: peer.nacked,
        })
        .collect();
    ztunnels.reverse();
    Json(StatusReport {
        node: status.node.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        uptime_seconds: status.started.elapsed().as_secs(),
        readiness: status.readiness.report(),
        ztunnels,
        pods: status.reconciler.report(),
    })
}
