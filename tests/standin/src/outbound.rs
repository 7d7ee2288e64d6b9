//! What leaves a pod: through HBONE where the peer speaks it, else as it is.
//!
//! Owns the choice and the connection to the upstream. It must not know how the connection got here.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::TcpStream;

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
    match sockets::connect(&pod.netns, Source::Own(client.ip()), to).await {
        Ok(upstream) => {
            pod.counters.passthrough_out.one();
            tracing::debug!(pod = %pod.name(), %client, %to, "outbound: passed through");
            if let Err(error) = copy::both_ways(stream, upstream, &pod.counters.bytes).await {
                tracing::debug!(pod = %pod.name(), %client, %to, %error, "outbound: ended");
            }
        }
        Err(error) => {
            pod.counters.connect_failures.one();
            tracing::info!(pod = %pod.name(), %client, %to, %error, "outbound: cannot reach the destination");
        }
    }
}
