//! Opening the listeners of one address: both families where no IP address is named, the same port for both.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, listen, setsockopt, socket,
    sockopt,
};

use crate::config::Listen;

/// Opens what `at` asks for. A node without IPv6 gets IPv4 alone.
pub(super) fn open(at: Listen) -> io::Result<Vec<std::net::TcpListener>> {
    let Some(ip) = at.ip else {
        let v4 = one(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), at.port))?;
        let port = v4.local_addr()?.port();
        return match one(SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port)) {
            Ok(v6) => Ok(vec![v4, v6]),
            Err(e) if absent(&e) => Ok(vec![v4]),
            Err(e) => Err(e),
        };
    };
    Ok(vec![one(SocketAddr::new(ip, at.port))?])
}

/// The node has no such family, or it is switched off.
fn absent(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL | libc::EPROTONOSUPPORT)
    )
}

fn one(at: SocketAddr) -> io::Result<std::net::TcpListener> {
    let family = match at.ip() {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(family, SockType::Stream, flags, None)?;
    // The last agent's connections may still be in TIME_WAIT.
    setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    if at.is_ipv6() {
        setsockopt(&fd, sockopt::Ipv6V6Only, &true)?;
    }
    bind(
        std::os::fd::AsRawFd::as_raw_fd(&fd),
        &SockaddrStorage::from(at),
    )?;
    listen(&fd, Backlog::new(128)?)?;
    Ok(fd.into())
}
