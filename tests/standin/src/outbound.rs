//! What leaves a pod: through HBONE where the peer speaks it, else as it is.
//!
//! Owns the choice and the connection to the upstream. It must not know how the connection got here.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::TcpStream;

use crate::identity::SpiffeId;
use crate::pod::Pod;
use crate::sockets::{self, Source};
use crate::{ILLEGAL_PORTS, copy};

/// Serves one connection accepted on 15001. A failure closes it, which is all a TCP client can be told.
pub async fn serve(pod: Arc<Pod>, stream: TcpStream, client: SocketAddr) {
    let Ok(to) = sockets::original_dst(&stream) else {
        return;
    };
    if ILLEGAL_PORTS.contains(&to.port()) {
        pod.counters.refused.one();
        tracing::warn!(pod = %pod.name(), %client, %to, "outbound: refused, the destination is a port of the proxy itself");
        return;
    }
    let carried = match pod.config.workloads.hbone_peer(to.ip()) {
        Some(peer) => tunnel(&pod, stream, client, &peer.identity, to).await,
        None => pass_through(&pod, stream, client, to).await,
    };
    if let Err(error) = carried {
        pod.counters.connect_failures.one();
        tracing::info!(pod = %pod.name(), %client, %to, error = format!("{error:#}"), "outbound: cannot reach the destination");
    }
}

async fn tunnel(
    pod: &Arc<Pod>,
    stream: TcpStream,
    client: SocketAddr,
    peer: &SpiffeId,
    to: SocketAddr,
) -> anyhow::Result<()> {
    let tunnel = pod.pool.open(pod, client.ip(), peer, to).await?;
    pod.counters.hbone_out.one();
    tracing::debug!(pod = %pod.name(), %client, %to, %peer, "outbound: in HBONE");
    if let Err(error) = tunnel.carry(stream, &pod.counters.bytes).await {
        tracing::debug!(pod = %pod.name(), %client, %to, %error, "outbound: tunnel ended");
    }
    Ok(())
}

async fn pass_through(
    pod: &Pod,
    stream: TcpStream,
    client: SocketAddr,
    to: SocketAddr,
) -> anyhow::Result<()> {
    let upstream = sockets::connect(&pod.netns, Source::Own(client.ip()), to).await?;
    pod.counters.passthrough_out.one();
    tracing::debug!(pod = %pod.name(), %client, %to, "outbound: passed through");
    if let Err(error) = copy::both_ways(stream, upstream, &pod.counters.bytes).await {
        tracing::debug!(pod = %pod.name(), %client, %to, %error, "outbound: ended");
    }
    Ok(())
}
