//! Paths, bounds and answers: from a request's bytes to the handler and back.
//!
//! Every answer is JSON; one that is not a success is a [`Refusal`], so that the plugin, and whoever reads its error, gets
//! a cure with it.

use std::{future::Future, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    body::{Body, to_bytes},
    extract::{ConnectInfo, Request},
    http::{Method as Verb, StatusCode, Uri},
    response::{IntoResponse as _, Response},
    routing::{get, post},
};
use culvert_cni::api::{
    AddRequest, CheckRequest, Level, LogRecord, MAX_BODY, Refusal, code, paths,
};
use serde::{Serialize, de::DeserializeOwned};

use super::{Counters, Handler, Method, listener::Peer};

/// Time for all but an ADD, which brings its own; also for reading a body.
const TIME: Duration = Duration::from_secs(10);

/// Longest time an ADD may ask for.
const MAX_BUDGET: Duration = Duration::from_secs(120);

/// How much earlier than the plugin we give up, so that it hears from us why.
const HEAD_START: Duration = Duration::from_millis(200);

/// The paths of [`paths`], to be merged with others of the same socket.
pub fn router<H: Handler>(handler: Arc<H>, counters: Arc<Counters>) -> Router {
    let (add, del, check, gc, status) = (
        handler.clone(),
        handler.clone(),
        handler.clone(),
        handler.clone(),
        handler,
    );
    let counting = |method| {
        let counters = counters.clone();
        Arc::new(move || Counting::new(counters.clone(), method))
    };
    let [n_add, n_del, n_check, n_gc, n_status, n_log] = Method::ALL.map(counting);
    Router::new()
        .route(
            paths::ADD,
            post(move |request: Request| async move {
                n_add()
                    .answer(async {
                        let peer = peer(&request);
                        let mut request: AddRequest = read(request).await?;
                        request.netns = as_seen_from_here(request.netns, peer)?;
                        let budget = Duration::from_millis(request.budget_ms).min(MAX_BUDGET);
                        within(budget.saturating_sub(HEAD_START), add.add(request)).await
                    })
                    .await
            }),
        )
        .route(
            paths::DEL,
            post(move |request: Request| async move {
                n_del()
                    .answer(async { within(TIME, del.del(read(request).await?)).await.map(empty) })
                    .await
            }),
        )
        .route(
            paths::CHECK,
            post(move |request: Request| async move {
                n_check()
                    .answer(async {
                        let peer = peer(&request);
                        let mut request: CheckRequest = read(request).await?;
                        request.netns = as_seen_from_here(request.netns, peer)?;
                        within(TIME, check.check(request)).await
                    })
                    .await
            }),
        )
        .route(
            paths::GC,
            post(move |request: Request| async move {
                n_gc()
                    .answer(async { within(TIME, gc.gc(read(request).await?)).await.map(empty) })
                    .await
            }),
        )
        .route(
            paths::STATUS,
            get(move || async move { n_status().answer(async { Ok(status.status()) }).await }),
        )
        .route(
            paths::LOG,
            post(move |request: Request| async move {
                n_log()
                    .answer(async {
                        log(&read(request).await?);
                        Ok(empty(()))
                    })
                    .await
            }),
        )
}

/// Answers in JSON where there is no path, or not that method.
pub(super) fn with_fallbacks(app: Router) -> Router {
    app.method_not_allowed_fallback(async |verb: Verb, uri: Uri| {
        let message = format!("{verb} is not for {}", uri.path());
        no_such(StatusCode::METHOD_NOT_ALLOWED, message)
    })
    .fallback(async |uri: Uri| {
        let message = format!("there is no {} here", uri.path());
        no_such(StatusCode::NOT_FOUND, message)
    })
}

/// The plugin repeats such a request: it meets an agent of another release only while a node is upgraded.
fn no_such(status: StatusCode, message: String) -> Response {
    let version = env!("CARGO_PKG_VERSION");
    let cure = format!(
        "this is culvert {version}; GET {}, POST {}, {}, {}, {}, {}",
        paths::STATUS,
        paths::ADD,
        paths::DEL,
        paths::CHECK,
        paths::GC,
        paths::LOG
    );
    (status, Json(Refusal::later(message, cure))).into_response()
}

/// Why a request was not done, with its status.
struct Refused(StatusCode, Refusal);

impl From<Refusal> for Refused {
    fn from(refusal: Refusal) -> Self {
        let status = if refusal.retry {
            StatusCode::SERVICE_UNAVAILABLE
        } else {
            StatusCode::UNPROCESSABLE_ENTITY
        };
        Self(status, refusal)
    }
}

/// One request, counted when it is answered or dropped.
struct Counting {
    counters: Arc<Counters>,
    method: Method,
    answered: bool,
}

impl Counting {
    fn new(counters: Arc<Counters>, method: Method) -> Self {
        Self {
            counters,
            method,
            answered: false,
        }
    }

    async fn answer<T: Serialize>(
        mut self,
        work: impl Future<Output = Result<T, Refused>>,
    ) -> Response {
        let response = match work.await {
            Ok(reply) => Json(reply).into_response(),
            Err(Refused(status, refusal)) => (status, Json(refusal)).into_response(),
        };
        self.answered = true;
        self.counters.count(self.method, response.status());
        response
    }
}

impl Drop for Counting {
    fn drop(&mut self) {
        if !self.answered {
            self.counters.count_dropped();
        }
    }
}

/// Reads a body, whatever type it claims to be of: `curl -d` says it is a form.
async fn read<T: DeserializeOwned>(request: Request<Body>) -> Result<T, Refused> {
    let body = tokio::time::timeout(TIME, to_bytes(request.into_body(), MAX_BODY))
        .await
        .map_err(|_elapsed| too_late(TIME))?
        .map_err(|error| {
            Refused(
                StatusCode::PAYLOAD_TOO_LARGE,
                Refusal::for_good(
                    code::DECODING,
                    format!("the body cannot be read: {error}"),
                    format!("at most {MAX_BODY} bytes, all of them sent"),
                ),
            )
        })?;
    serde_json::from_slice(&body).map_err(|error| {
        Refused(
            StatusCode::BAD_REQUEST,
            Refusal::for_good(
                code::DECODING,
                format!("the body is not the JSON of this request: {error}"),
                "the plugin and the agent must be of releases that go together",
            ),
        )
    })
}

fn peer(request: &Request) -> Option<Peer> {
    let info: Option<&ConnectInfo<Peer>> = request.extensions().get();
    info.map(|ConnectInfo(peer)| *peer)
}

/// The plugin names a descriptor of its own by the number it has in its own PID namespace; where that is not ours (a
/// runtime in a container), the number is somebody else's here. The kernel says who is really asking.
fn as_seen_from_here(netns: String, peer: Option<Peer>) -> Result<String, Refusal> {
    let descriptor = netns
        .strip_prefix("/proc/")
        .and_then(|rest| rest.split_once("/fd/"))
        .filter(|(pid, _)| pid.bytes().all(|digit| digit.is_ascii_digit()))
        .map(|(_, descriptor)| descriptor);
    match (descriptor, peer) {
        (Some(descriptor), Some(Peer { pid: Some(pid) })) => {
            Ok(format!("/proc/{pid}/fd/{descriptor}"))
        }
        (Some(_), Some(Peer { pid: None })) => Err(Refusal::for_good(
            code::CANNOT_ENROL,
            "the plugin runs outside the agent's PID namespace",
            "run the agent with hostPID: true",
        )),
        _ => Ok(netns),
    }
}

/// Bounds the handler's time.
async fn within<T>(
    time: Duration,
    work: impl Future<Output = Result<T, Refusal>>,
) -> Result<T, Refused> {
    match tokio::time::timeout(time, work).await {
        Ok(result) => result.map_err(Refused::from),
        Err(_elapsed) => Err(too_late(time)),
    }
}

fn too_late(time: Duration) -> Refused {
    Refused(
        StatusCode::GATEWAY_TIMEOUT,
        Refusal::later(
            format!("the agent was not done within {} ms", time.as_millis()),
            "its log says what it waits for; `culvert status` shows whether ztunnel is connected",
        ),
    )
}

/// `{}`.
fn empty((): ()) -> serde_json::Map<String, serde_json::Value> {
    serde_json::Map::new()
}

/// The plugin's words in the agent's log. They come from outside: one line each, and no control characters.
fn log(record: &LogRecord) {
    let pod = record.pod.as_ref().map(ToString::to_string);
    let pod = pod.unwrap_or_default();
    let (pod, message) = (pod.escape_debug(), record.message.escape_debug());
    let (command, container) = (
        record.command.escape_debug(),
        record.container_id.escape_debug(),
    );
    let took_us = record.took_us;
    match record.level {
        Level::Info => tracing::info!(%command, %pod, %container, took_us, "plugin: {message}"),
        Level::Warn => tracing::warn!(%command, %pod, %container, took_us, "plugin: {message}"),
        Level::Error => tracing::error!(%command, %pod, %container, took_us, "plugin: {message}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_is_looked_for_at_whoever_asks() {
        let seen = |netns: &str, pid| as_seen_from_here(netns.to_owned(), Some(Peer { pid }));
        assert_eq!(seen("/proc/7/fd/3", Some(42)).unwrap(), "/proc/42/fd/3");
        for other in ["/proc/7/ns/net", "/proc/self/fd/3", "/run/netns/x", ""] {
            assert_eq!(seen(other, Some(42)).unwrap(), other);
            assert_eq!(seen(other, None).unwrap(), other);
        }
        assert!(
            seen("/proc/7/fd/3", None)
                .unwrap_err()
                .cure
                .contains("hostPID")
        );
        let unknown = as_seen_from_here("/proc/7/fd/3".to_owned(), None);
        assert_eq!(unknown.unwrap(), "/proc/7/fd/3");
    }
}
