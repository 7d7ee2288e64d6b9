//! How long the plugin's requests take, from their arrival to the answer.

use std::{sync::Arc, time::Instant};

use axum::{
    Router,
    extract::{Request, State},
    middleware::{self, Next},
    response::Response,
};
use culvert_cni::api::paths;

use super::{
    Metrics,
    labels::{By, CniCommand},
};

/// The same routes, with the time of each request noted. One that is dropped before its answer is not.
pub fn timed(routes: Router, metrics: &Arc<Metrics>) -> Router {
    routes.layer(middleware::from_fn_with_state(Arc::clone(metrics), note))
}

async fn note(State(metrics): State<Arc<Metrics>>, request: Request, next: Next) -> Response {
    let command = command(request.uri().path());
    let started = Instant::now();
    let response = next.run(request).await;
    if let Some(command) = command {
        Metrics::observe(&metrics.cni_duration, &By(command), started.elapsed());
    }
    response
}

fn command(path: &str) -> Option<CniCommand> {
    match path {
        paths::ADD => Some(CniCommand::Add),
        paths::DEL => Some(CniCommand::Del),
        paths::CHECK => Some(CniCommand::Check),
        paths::GC => Some(CniCommand::Gc),
        paths::STATUS => Some(CniCommand::Status),
        _ => None,
    }
}
