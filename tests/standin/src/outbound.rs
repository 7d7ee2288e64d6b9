//! What leaves a pod: through HBONE where the peer speaks it, else as it is.
//!
//! Owns the choice and the connection to the upstream. It must not know how the connection got here.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::TcpStream;

use crate::hbone::tunnel::Tunnel;
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
    let upstream = match reach(&pod, client, to).await {
        Ok(upstream) => upstream,
        Err(error) => {
            // Counted before the client hears of it, by the end of its connection.
            pod.counters.connect_failures.one();
            tracing::info!(pod = %pod.name(), %client, %to, error = format!("{error:#}"), "outbound: cannot reach the destination");
            return;
        }
    };
    let carried = match upstream {
        Upstream::Hbone(tunnel) => tunnel.carry(stream, &pod.counters.bytes).await,
        Upstream::Plain(upstream) => copy::both_ways(stream, upstream, &pod.counters.bytes).await,
    };
    if let Err(error) = carried {
        tracing::debug!(pod = %pod.name(), %client, %to, %error, "outbound: ended");
    }
}

enum Upstream {
    Hbone(Tunnel),
    Plain(TcpStream),
}

async fn reach(pod: &Arc<Pod>, client: SocketAddr, to: SocketAddr) -> anyhow::Result<Upstream> {
    if let Some(peer) = pod.config.workloads.hbone_peer(to.ip()) {
        let tunnel = pod.pool.open(pod, client.ip(), &peer.identity, to).await?;
        pod.counters.hbone_out.one();
        tracing::debug!(pod = %pod.name(), %client, %to, peer = %peer.identity, "outbound: in HBONE");
        return Ok(Upstream::Hbone(tunnel));
    }
    let upstream = sockets::connect(&pod.netns, Source::Own(client.ip()), to).await?;
    pod.counters.passthrough_out.one();
    tracing::debug!(pod = %pod.name(), %client, %to, "outbound: passed through");
    Ok(Upstream::Plain(upstream))
}
