//! The sockets of a pod's proxy: how they are made, marked and bound, and how the original destination is read from one.
//!
//! Everything here is synchronous and acts on the namespace the thread is in; `netns` says which. It must not decide where a
//! connection goes.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::IpBindAddressNoPort;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};

use crate::MARK;
use crate::netns::Netns;

/// ztunnel's own limit for reaching an upstream.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const BACKLOG: i32 = 1024;

/// Whether IPv6 is switched on in the namespace of the calling thread.
#[must_use]
pub fn ipv6_enabled() -> bool {
    // /proc/sys/net shows the namespace of the thread that opens it.
    std::fs::read_to_string("/proc/sys/net/ipv6/conf/lo/disable_ipv6")
        .is_ok_and(|v| v.trim() != "1")
}

/// The address that catches every family the namespace has.
#[must_use]
pub fn wildcard(ipv6: bool, port: u16) -> SocketAddr {
    let ip = if ipv6 {
        IpAddr::from(Ipv6Addr::UNSPECIFIED)
    } else {
        IpAddr::from(Ipv4Addr::UNSPECIFIED)
    };
    SocketAddr::new(ip, port)
}

/// A listener in the namespace of the calling thread.
///
/// # Errors
/// When the port is taken or the socket cannot be marked.
pub fn listen(addr: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = marked(addr, Type::STREAM, Protocol::TCP)?;
    // What an earlier listener left in TIME_WAIT must not keep the port.
    socket.set_reuse_address(true)?;
    prepare_listener(&socket, addr)?;
    socket.bind(&addr.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// A bound datagram socket in the namespace of the calling thread.
///
/// # Errors
/// When the port is taken or the socket cannot be marked.
pub fn bind_udp(addr: SocketAddr) -> io::Result<std::net::UdpSocket> {
    let socket = marked(addr, Type::DGRAM, Protocol::UDP)?;
    prepare_listener(&socket, addr)?;
    socket.bind(&addr.into())?;
    Ok(socket.into())
}

/// The mark comes first: who watches `listen` must see it, and SO_REUSEPORT lets two proxies overlap during a roll-out.
fn marked(addr: SocketAddr, kind: Type, protocol: Protocol) -> io::Result<Socket> {
    let socket = Socket::new(
        Domain::for_address(addr),
        kind.nonblocking().cloexec(),
        Some(protocol),
    )?;
    socket.set_mark(MARK)?;
    Ok(socket)
}

fn prepare_listener(socket: &Socket, addr: SocketAddr) -> io::Result<()> {
    socket.set_reuse_port(true)?;
    if addr.is_ipv6() {
        socket.set_only_v6(!addr.ip().is_unspecified())?;
    }
    // Tried, not demanded, as ztunnel does: without CAP_NET_ADMIN it still serves traffic that was redirected by NAT.
    if let Err(error) = set_transparent(socket, addr.is_ipv6()) {
        tracing::warn!(%addr, %error, "listener is not transparent: it cannot answer from addresses that are not local");
    }
    Ok(())
}

fn set_transparent(socket: &Socket, ipv6: bool) -> io::Result<()> {
    // A dual-stack socket carries IPv4 as well, and both options end in the same bit.
    socket.set_ip_transparent_v4(true)?;
    if ipv6 {
        socket.set_ip_transparent_v6(true)
    } else {
        Ok(())
    }
}

/// Hands a listener to the runtime.
///
/// # Errors
/// When it cannot be watched.
pub fn watch_tcp(listener: std::net::TcpListener) -> io::Result<TcpListener> {
    TcpListener::from_std(listener)
}

/// Hands a datagram socket to the runtime.
///
/// # Errors
/// When it cannot be watched.
pub fn watch_udp(socket: std::net::UdpSocket) -> io::Result<UdpSocket> {
    UdpSocket::from_std(socket)
}

/// With which source address a connection is made.
#[derive(Clone, Copy, Debug)]
pub enum Source {
    /// The given address if it is one of the pod's, else what the routes say: traffic of the pod itself.
    Own(IpAddr),
    /// What the routes say.
    Any,
    /// The given address, whoever it belongs to: delivery to the app, which must see its client.
    Client(IpAddr),
}

/// Connects to `to` from inside the namespace, with the proxy's mark.
///
/// # Errors
/// What `connect()` says, and `TimedOut` after ten seconds.
pub async fn connect(netns: &Netns, source: Source, to: SocketAddr) -> io::Result<TcpStream> {
    let socket = netns.run(|| outgoing(source, to))??;
    let stream = tokio::time::timeout(CONNECT_TIMEOUT, socket.connect(to))
        .await
        .map_err(|_| {
            io::Error::new(
                io::ErrorKind::TimedOut,
                format!("no answer from {to} within {} s", CONNECT_TIMEOUT.as_secs()),
            )
        })??;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// A datagram socket inside the namespace that talks to `to` alone, with the proxy's mark.
///
/// # Errors
/// When the namespace has no route there.
pub fn udp_to(netns: &Netns, to: SocketAddr) -> io::Result<UdpSocket> {
    let socket = netns.run(|| {
        let socket = marked(to, Type::DGRAM, Protocol::UDP)?;
        socket.connect(&to.into())?;
        Ok::<_, io::Error>(socket)
    })??;
    UdpSocket::from_std(socket.into())
}

fn outgoing(source: Source, to: SocketAddr) -> io::Result<TcpSocket> {
    let socket = marked(to, Type::STREAM, Protocol::TCP)?;
    match source {
        Source::Own(ip) if ip.is_ipv4() == to.is_ipv4() => {
            // The port is chosen at connect(), by the whole four-tuple: else a pod has 28,000 connections at most.
            setsockopt(&socket, IpBindAddressNoPort, &true)?;
            if let Err(error) = socket.bind(&SocketAddr::new(ip, 0).into()) {
                tracing::debug!(%ip, %error, "source is not the pod's own, leaving it to the routes");
            }
        }
        // The app would talk to itself from its own address; ztunnel leaves the source open here too.
        Source::Client(ip) if ip != to.ip() && ip.is_ipv4() == to.is_ipv4() => {
            bind_to_client(&socket, ip)?
        }
        Source::Any | Source::Own(_) | Source::Client(_) => {}
    }
    Ok(TcpSocket::from_std_stream(socket.into()))
}

fn bind_to_client(socket: &Socket, ip: IpAddr) -> io::Result<()> {
    if let Err(error) = set_transparent(socket, ip.is_ipv6()) {
        tracing::warn!(%ip, %error, "cannot deliver from the client's address, CAP_NET_ADMIN is missing in the pod's namespace");
        return Ok(());
    }
    let client = SocketAddr::new(ip, 0).into();
    match socket.bind(&client) {
        // All ports of this client are in use or in TIME_WAIT: choose by the whole four-tuple instead.
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            setsockopt(socket, IpBindAddressNoPort, &true)?;
            socket.bind(&client)
        }
        Err(error) => {
            tracing::warn!(%ip, %error, "cannot bind the client's address, delivering from the pod's own");
            Ok(())
        }
        Ok(()) => Ok(()),
    }
}

/// Where the client wanted to go: what NAT remembers, else the address the socket was accepted on.
///
/// # Errors
/// When the socket is already dead.
pub fn original_dst(stream: &TcpStream) -> io::Result<SocketAddr> {
    let socket = SockRef::from(stream);
    // A dual-stack listener accepts both families, and only one of the two can know.
    let remembered = socket
        .original_dst_v4()
        .or_else(|_| socket.original_dst_v6())
        .ok()
        .and_then(|a| a.as_socket());
    match remembered {
        Some(addr) => Ok(canonical(addr)),
        None => stream.local_addr().map(canonical),
    }
}

/// v4-mapped addresses as IPv4, scope and flow left out.
#[must_use]
pub fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}
