//! What is answered on which path.
//!
//! Whoever reaches the node may read; what changes something is taken from the node itself alone, since nobody here has to
//! say who they are.

use std::net::SocketAddr;

use axum::{
    Router,
    extract::{ConnectInfo, Query, State},
    http::{StatusCode, header},
    response::{IntoResponse, Json, Response},
    routing::get,
};
use serde::Deserialize;

use super::server::Admin;
use crate::config::{LogLevel, Value as _};

/// `/metrics` and `/loglevel`.
pub(super) fn metrics(admin: Admin) -> Router {
    Router::new()
        .route("/metrics", get(scrape))
        .route("/loglevel", get(level).put(set_level))
        .fallback(|| async { (StatusCode::NOT_FOUND, "there are /metrics and /loglevel\n") })
        .with_state(admin)
}

/// `/healthz` and `/readyz`.
pub(super) fn health(admin: Admin) -> Router {
    Router::new()
        .route("/healthz", get(alive))
        .route("/readyz", get(ready))
        .fallback(|| async { (StatusCode::NOT_FOUND, "there are /healthz and /readyz\n") })
        .with_state(admin)
}

async fn scrape(State(admin): State<Admin>) -> Response {
    const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    // Reading the kernel's maps takes its time; other connections are served meanwhile.
    match tokio::task::spawn_blocking(move || admin.metrics.encode()).await {
        Ok(Ok(text)) => ([(header::CONTENT_TYPE, OPEN_METRICS)], text).into_response(),
        Ok(Err(_)) | Err(_) => (
            StatusCode::INTERNAL_SERVER_ERROR,
            "the metrics cannot be encoded: see the log\n",
        )
            .into_response(),
    }
}

async fn level(State(admin): State<Admin>) -> String {
    format!("{}\n", admin.log.level())
}

#[derive(Deserialize)]
struct LevelQuery {
    level: Option<String>,
}

async fn set_level(
    State(admin): State<Admin>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    Query(query): Query<LevelQuery>,
) -> Response {
    if !peer.ip().to_canonical().is_loopback() {
        let text = "the level is changed from the node alone: send this to the same port at 127.0.0.1 or [::1], from the \
                    node's network namespace or by `kubectl port-forward` to the agent's pod\n";
        return (StatusCode::FORBIDDEN, text).into_response();
    }
    let cure = "PUT /loglevel?level=debug";
    let Some(level) = query.level else {
        return (
            StatusCode::BAD_REQUEST,
            format!("no level is given: {cure}\n"),
        )
            .into_response();
    };
    match LogLevel::parse(&level) {
        Ok(level) => match admin.log.set(&level) {
            Ok(()) => format!("{}\n", level.as_str()).into_response(),
            Err(why) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{why}\n")).into_response(),
        },
        Err(why) => (StatusCode::BAD_REQUEST, format!("{why}: {cure}\n")).into_response(),
    }
}

async fn alive(State(admin): State<Admin>) -> Response {
    match admin.liveness.check() {
        Ok(ago) => format!(
            "alive: the reconcile loop went round {} ms ago\n",
            ago.as_millis()
        )
        .into_response(),
        Err(ago) => {
            let text = format!(
                "dead: the reconcile loop has not gone round for {} s\n",
                ago.as_secs()
            );
            (StatusCode::SERVICE_UNAVAILABLE, text).into_response()
        }
    }
}

#[derive(Deserialize)]
struct ReadyQuery {
    format: Option<String>,
}

async fn ready(State(admin): State<Admin>, Query(query): Query<ReadyQuery>) -> Response {
    let report = admin.readiness.report();
    let status = if report.ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    match query.format.as_deref() {
        None | Some("text") => (status, report.to_text()).into_response(),
        Some("json") => (status, Json(report)).into_response(),
        Some(_) => (StatusCode::BAD_REQUEST, "format is text or json\n").into_response(),
    }
}
