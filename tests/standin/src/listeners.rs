//! The listeners inside a pod, from opening to the last accepted connection.
//!
//! Owns addresses, accept loops and their end. What happens to an accepted connection is said elsewhere.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use anyhow::Context as _;
use tokio::net::{TcpListener, TcpStream};

use crate::config::DnsListen;
use crate::pod::Pod;
use crate::{
    DNS_PORT, INBOUND_HBONE_PORT, INBOUND_PLAINTEXT_PORT, OUTBOUND_PORT, dns, hbone, inbound,
    outbound, sockets,
};

/// A pod's listeners, open but not served yet.
#[derive(Debug)]
pub struct Listeners {
    outbound: std::net::TcpListener,
    inbound: std::net::TcpListener,
    hbone: std::net::TcpListener,
    dns: Vec<(std::net::TcpListener, std::net::UdpSocket)>,
}

/// Opens all of them in the namespace of the calling thread: all or none.
///
/// # Errors
/// When one of the ports is taken or a socket cannot be marked (CAP_NET_ADMIN).
pub fn open(dns_listen: DnsListen) -> anyhow::Result<Listeners> {
    let ipv6 = sockets::ipv6_enabled();
    let listen = |addr: SocketAddr| {
        sockets::listen(addr).with_context(|| format!("cannot listen on {addr} in the pod"))
    };
    let mut loopback = vec![];
    if dns_listen != DnsListen::None {
        loopback.push(IpAddr::from(Ipv4Addr::LOCALHOST));
    }
    if dns_listen == DnsListen::Both && ipv6 {
        loopback.push(Ipv6Addr::LOCALHOST.into());
    }
    let dns = |ip: IpAddr| {
        let addr = SocketAddr::new(ip, DNS_PORT);
        let udp =
            sockets::bind_udp(addr).with_context(|| format!("cannot bind UDP {addr} in the pod"));
        anyhow::Ok((listen(addr)?, udp?))
    };
    Ok(Listeners {
        outbound: listen(sockets::wildcard(ipv6, OUTBOUND_PORT))?,
        inbound: listen(sockets::wildcard(ipv6, INBOUND_PLAINTEXT_PORT))?,
        hbone: listen(sockets::wildcard(ipv6, INBOUND_HBONE_PORT))?,
        dns: loopback
            .into_iter()
            .map(dns)
            .collect::<anyhow::Result<_>>()?,
    })
}

impl Listeners {
    /// Starts accepting.
    ///
    /// # Errors
    /// When a listener cannot be handed to the runtime.
    pub fn serve(self, pod: &Arc<Pod>) -> io::Result<()> {
        let out = sockets::watch_tcp(self.outbound)?;
        let plain = sockets::watch_tcp(self.inbound)?;
        pod.spawn(accept(pod.clone(), out, |pod, stream, client| {
            pod.counters.outbound_accepts.one();
            pod.clone().spawn(outbound::serve(pod, stream, client));
        }));
        pod.spawn(accept(pod.clone(), plain, |pod, stream, client| {
            pod.counters.inbound_accepts.one();
            pod.clone().spawn(inbound::serve(pod, stream, client));
        }));
        let tunnels = sockets::watch_tcp(self.hbone)?;
        pod.spawn(accept(pod.clone(), tunnels, |pod, stream, client| {
            pod.counters.hbone_accepts.one();
            pod.clone().spawn(hbone::server::serve(pod, stream, client));
        }));
        for (tcp, udp) in self.dns {
            pod.spawn(dns::serve_udp(pod.clone(), sockets::watch_udp(udp)?));
            pod.spawn(accept(
                pod.clone(),
                sockets::watch_tcp(tcp)?,
                |pod, stream, client| {
                    pod.clone().spawn(dns::serve_tcp(pod, stream, client));
                },
            ));
        }
        Ok(())
    }
}

/// Accepts until the pod drains, and then what is still queued: closing a listener resets the connections that wait in it.
async fn accept(
    pod: Arc<Pod>,
    listener: TcpListener,
    handle: impl Fn(Arc<Pod>, TcpStream, SocketAddr),
) {
    let handle = |stream: TcpStream, client| {
        // Failing means that the connection is dead already; whoever reads next finds out.
        let _ = stream.set_nodelay(true);
        handle(pod.clone(), stream, sockets::canonical(client));
    };
    loop {
        let accepted = tokio::select! {
            () = pod.draining() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, client)) => handle(stream, client),
            Err(error) => pause_after(&error).await,
        }
    }
    // The runtime may not have noticed the latest arrivals yet, so the kernel is asked directly.
    let Ok(listener) = listener.into_std() else {
        return;
    };
    while let Ok((stream, client)) = listener.accept() {
        if let Ok(stream) = stream
            .set_nonblocking(true)
            .and_then(|()| TcpStream::from_std(stream))
        {
            handle(stream, client);
        }
    }
}

/// Out of descriptors or memory: without a pause the loop would spin until somebody gives some back.
async fn pause_after(error: &io::Error) {
    tracing::warn!(%error, "cannot accept a connection");
    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
}
