//! The agent's two HTTP addresses: listeners, connections and their limits.
//!
//! Every step of a connection has a deadline, and the number of connections an end; see `connections` for who goes.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use axum::{Router, extract::ConnectInfo};
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tower::Service as _;

use super::{
    connections::{Connections, Ticket},
    listen,
    logging::LogControl,
    metrics::Metrics,
    readiness::{Liveness, Readiness},
    routes,
};
use crate::config::Listen;

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// For a request's head, and between two requests.
    pub(super) head: Duration,
    /// For a whole connection: Prometheus and the kubelet open another without fuss.
    pub(super) life: Duration,
    /// For the answer that is under way when that is over, or when the agent ends.
    pub(super) last_answer: Duration,
}

const LIMITS: Limits = Limits {
    head: Duration::from_secs(10),
    life: Duration::from_secs(120),
    last_answer: Duration::from_secs(5),
};

/// Requests here have short heads and no bodies.
const MAX_HEAD: usize = 16 * 1024;

/// What the addresses show.
#[derive(Clone, Debug)]
pub struct Admin {
    /// For /readyz.
    pub readiness: Readiness,
    /// For /healthz.
    pub liveness: Liveness,
    /// For /metrics.
    pub metrics: Arc<Metrics>,
    /// For /loglevel.
    pub log: LogControl,
}

/// Why an address could not be listened on.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {at} for {purpose}: {cause}; {cure}")]
pub struct AdminError {
    /// The address.
    pub at: Listen,
    /// What for.
    pub purpose: &'static str,
    /// What the kernel said.
    #[source]
    pub cause: io::Error,
    /// What to do.
    pub cure: String,
}

/// Listeners that are open and not served yet.
#[derive(Debug)]
pub struct Bound {
    admin: Admin,
    metrics: Vec<std::net::TcpListener>,
    health: Vec<std::net::TcpListener>,
}

impl Admin {
    /// Opens the listeners, before anything else is begun: a port that is taken ends the agent at once.
    pub fn bind(self, metrics: Listen, health: Listen) -> Result<Bound, AdminError> {
        Ok(Bound {
            metrics: open(metrics, "/metrics", "metrics-address")?,
            health: open(health, "/healthz and /readyz", "health-address")?,
            admin: self,
        })
    }
}

fn open(
    at: Listen,
    purpose: &'static str,
    key: &str,
) -> Result<Vec<std::net::TcpListener>, AdminError> {
    listen::open(at).map_err(|cause| {
        let cure = match cause.raw_os_error() {
            Some(libc::EADDRINUSE) => format!(
                "port {port} is taken by another program on this node (`ss -ltnp sport = :{port}` names it): end that, or \
                 give another port with --{key}",
                port = at.port
            ),
            Some(libc::EADDRNOTAVAIL) => format!("no interface of this node has that address: give another with --{key}"),
            Some(libc::EACCES) => format!("ports below 1024 take CAP_NET_BIND_SERVICE: give a higher one with --{key}"),
            _ => format!("give another address with --{key}"),
        };
        AdminError { at, purpose, cause, cure }
    })
}

impl Bound {
    /// Where metrics and health are served: the port, where 0 was asked for, is known now.
    pub fn addresses(&self) -> io::Result<(Vec<SocketAddr>, Vec<SocketAddr>)> {
        let of = |all: &[std::net::TcpListener]| {
            let addresses = all.iter().map(std::net::TcpListener::local_addr);
            addresses.collect::<io::Result<Vec<_>>>()
        };
        Ok((of(&self.metrics)?, of(&self.health)?))
    }

    /// Serves until `stop`, then lets answers that are under way be finished. Call it inside a tokio runtime.
    pub async fn serve(self, stop: CancellationToken) -> io::Result<()> {
        self.serve_within(LIMITS, stop).await
    }

    pub(super) async fn serve_within(
        self,
        limits: Limits,
        stop: CancellationToken,
    ) -> io::Result<()> {
        let groups = [
            (self.metrics, routes::metrics(self.admin.clone())),
            (self.health, routes::health(self.admin)),
        ];
        let mut loops = tokio::task::JoinSet::new();
        let serving = Serving { limits, stop };
        for (listeners, router) in groups {
            let connections = Connections::default();
            for listener in listeners {
                let listener = TcpListener::from_std(listener)?;
                loops.spawn(
                    serving
                        .clone()
                        .accept(listener, router.clone(), connections.clone()),
                );
            }
        }
        while let Some(ended) = loops.join_next().await {
            if !serving.stop.is_cancelled() {
                let how = ended.err().map(|error| error.to_string());
                let how = how.unwrap_or_else(|| "it ended".to_owned());
                return Err(io::Error::other(format!(
                    "an address is not served any more: {how}"
                )));
            }
        }
        Ok(())
    }
}

/// What every connection is served with.
#[derive(Clone, Debug)]
struct Serving {
    limits: Limits,
    stop: CancellationToken,
}

impl Serving {
    async fn accept(self, listener: TcpListener, router: Router, connections: Connections) {
        let mut open = tokio::task::JoinSet::new();
        loop {
            let accepted = tokio::select! {
                () = self.stop.cancelled() => break,
                Some(_) = open.join_next() => continue,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, peer)) => {
                    let ticket = connections.ticket();
                    let id = ticket.id();
                    let served = self.clone().serve(stream, peer, router.clone(), ticket);
                    let task = open.spawn(served);
                    connections.enter(id, peer.ip(), task);
                }
                // Out of descriptors, most likely: trying again at once would spin.
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
        drop(listener);
        while open.join_next().await.is_some() {}
    }

    async fn serve(self, stream: TcpStream, peer: SocketAddr, router: Router, _ticket: Ticket) {
        let service = hyper::service::service_fn(move |mut request: hyper::Request<Incoming>| {
            request.extensions_mut().insert(ConnectInfo(peer));
            router.clone().call(request)
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.limits.head)
            .max_header_size(MAX_HEAD)
            .max_headers(64)
            .serve_connection(TokioIo::new(stream), service);
        tokio::pin!(connection);
        tokio::select! {
            _ = connection.as_mut() => return,
            () = tokio::time::sleep(self.limits.life) => {}
            () = self.stop.cancelled() => {}
        }
        connection.as_mut().graceful_shutdown();
        // A peer that does not read its answer loses it.
        if tokio::time::timeout(self.limits.last_answer, connection)
            .await
            .is_err()
        {
            tracing::debug!("a connection was cut: its peer does not read the answer");
        }
    }
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
