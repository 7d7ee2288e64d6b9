//! Plaintext that enters a pod, and delivery to the app from the client's own address.
//!
//! Owns what is accepted on 15006; `hbone` delivers through the same door.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::TcpStream;

use crate::pod::Pod;
use crate::sockets::{self, Source};
use crate::{ILLEGAL_PORTS, copy};

/// Serves one connection accepted on 15006. When the app does not answer, the client's connection ends too.
pub async fn serve(pod: Arc<Pod>, stream: TcpStream, client: SocketAddr) {
    let Ok(to) = sockets::original_dst(&stream) else {
        return;
    };
    if ILLEGAL_PORTS.contains(&to.port()) {
        pod.counters.refused.one();
        tracing::warn!(pod = %pod.name(), %client, %to, "inbound: refused, the destination is a port of the proxy itself");
        return;
    }
    if pod.config.workloads.strict(to.ip()) {
        pod.counters.refused.one();
        tracing::info!(pod = %pod.name(), %client, %to, "inbound: refused, this pod is spoken to in the mesh alone");
        return;
    }
    match deliver(&pod, client, to).await {
        Ok(app) => {
            tracing::debug!(pod = %pod.name(), %client, %to, "inbound: plaintext delivered");
            if let Err(error) = copy::both_ways(stream, app, &pod.counters.bytes).await {
                tracing::debug!(pod = %pod.name(), %client, %to, %error, "inbound: ended");
            }
        }
        Err(error) => {
            tracing::info!(pod = %pod.name(), %client, %to, %error, "inbound: the app does not answer")
        }
    }
}

/// Connects to the app as the client.
///
/// # Errors
/// What the app's side says.
pub async fn deliver(pod: &Pod, client: SocketAddr, app: SocketAddr) -> io::Result<TcpStream> {
    let connected = sockets::connect(&pod.netns, Source::Client(client.ip()), app).await;
    if connected.is_err() {
        pod.counters.connect_failures.one();
    }
    connected
}
