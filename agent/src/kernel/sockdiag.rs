//! Asking the kernel for sockets of a namespace: their mark, cookie and whether they are transparent.
//!
//! One inet_diag dump per family over NETLINK_SOCK_DIAG. Used to know when no marked socket is left, to
//! tell whose the registered listeners are, and to find the datagram sockets that DNS capture concerns.

use std::{io, net::IpAddr};

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_SOCK_DIAG};

use super::{
    error::{Error, Result},
    netns::Guard,
};

/// A TCP or UDP socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InetSocket {
    /// Kernel's state number; 10 = LISTEN.
    pub state: u8,
    /// Local port.
    pub port: u16,
    /// Local address.
    pub local: IpAddr,
    /// Port of the peer; 0 = none.
    pub peer_port: u16,
    /// Address of the peer.
    pub peer: IpAddr,
    /// Device it is bound to; 0 = none.
    pub device: u32,
    /// SO_MARK.
    pub mark: u32,
    /// Socket cookie, what a sockhash answers with.
    pub cookie: u64,
    /// Inode on sockfs, what /proc/PID/fd points at.
    pub inode: u32,
    /// IP_TRANSPARENT, where the kernel tells.
    pub transparent: Option<bool>,
}

/// LISTEN in [`InetSocket::state`].
pub const LISTEN: u8 = 10;
const TIME_WAIT: u8 = 6;

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const INET_DIAG_MARK: u16 = 15;
const INET_DIAG_SOCKOPT: u16 = 22;
const MESSAGE: usize = 72;

fn fail(e: io::Error) -> Error {
    Error::system("list", "sockets (inet_diag)", e)
        .cured_by("load the kernel modules tcp_diag and udp_diag")
}

fn request(family: u8, protocol: u8, states: u32) -> Vec<u8> {
    let mut out = vec![0; 16 + 56];
    let length = u32::try_from(out.len()).unwrap_or(0);
    out[0..4].copy_from_slice(&length.to_ne_bytes());
    out[4..6].copy_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    // NLM_F_REQUEST | NLM_F_DUMP
    out[6..8].copy_from_slice(&0x301_u16.to_ne_bytes());
    out[8..12].copy_from_slice(&1_u32.to_ne_bytes());
    out[16] = family;
    out[17] = protocol;
    out[20..24].copy_from_slice(&states.to_ne_bytes());
    out
}

/// All sockets of the guard's namespace in one of `states` (bit per state number).
fn dump(family: u8, protocol: u8, states: u32) -> Result<Vec<InetSocket>> {
    let mut socket = Socket::new(NETLINK_SOCK_DIAG).map_err(fail)?;
    socket.bind_auto().map_err(fail)?;
    socket.connect(&SocketAddr::new(0, 0)).map_err(fail)?;
    socket
        .send(&request(family, protocol, states), 0)
        .map_err(fail)?;
    let mut sockets = Vec::new();
    loop {
        let mut buffer = Vec::with_capacity(32 * 1024);
        socket.recv(&mut buffer, 0).map_err(fail)?;
        let mut rest = buffer.as_slice();
        while rest.len() >= 16 {
            let length = u32_at(rest, 0) as usize;
            if length < 16 || length > rest.len() {
                break;
            }
            match u16_at(rest, 4) {
                NLMSG_DONE => return Ok(sockets),
                NLMSG_ERROR => {
                    let code = i32::from_ne_bytes([rest[16], rest[17], rest[18], rest[19]]);
                    return Err(fail(io::Error::from_raw_os_error(-code)));
                }
                SOCK_DIAG_BY_FAMILY if length >= 16 + MESSAGE => {
                    sockets.push(parse(&rest[16..length]))
                }
                _ => {}
            }
            rest = &rest[length.next_multiple_of(4).min(rest.len())..];
        }
    }
}

fn u16_at(b: &[u8], at: usize) -> u16 {
    u16::from_ne_bytes([b[at], b[at + 1]])
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

fn parse(message: &[u8]) -> InetSocket {
    let v4 = message[0] == 2;
    let address = |at: usize| {
        let mut octets = [0; 16];
        octets.copy_from_slice(&message[at..at + 16]);
        let [a, b, c, d, ..] = octets;
        if v4 {
            IpAddr::from([a, b, c, d])
        } else {
            IpAddr::from(octets)
        }
    };
    let mut socket = InetSocket {
        state: message[1],
        port: u16::from_be_bytes([message[4], message[5]]),
        local: address(8),
        peer_port: u16::from_be_bytes([message[6], message[7]]),
        peer: address(24),
        device: u32_at(message, 40),
        mark: 0,
        cookie: u64::from(u32_at(message, 44)) | u64::from(u32_at(message, 48)) << 32,
        inode: u32_at(message, 68),
        transparent: None,
    };
    let mut rest = &message[MESSAGE..];
    while rest.len() >= 4 {
        let length = usize::from(u16_at(rest, 0));
        if length < 4 || length > rest.len() {
            break;
        }
        match u16_at(rest, 2) {
            INET_DIAG_MARK if length >= 8 => socket.mark = u32_at(rest, 4),
            // struct inet_diag_sockopt: transparent is the seventh bit.
            INET_DIAG_SOCKOPT if length >= 5 => socket.transparent = Some(rest[4] & 0x40 != 0),
            _ => {}
        }
        rest = &rest[length.next_multiple_of(4).min(rest.len())..];
    }
    socket
}

const TCP: u8 = 6;
const UDP: u8 = 17;

fn families(protocol: u8, states: u32) -> Result<Vec<InetSocket>> {
    let mut all = dump(2, protocol, states)?;
    if super::sysctl::ipv6_present() {
        all.extend(dump(10, protocol, states)?);
    }
    Ok(all)
}

/// Datagram sockets, with a peer or without.
pub fn datagram(_guard: &Guard<'_>) -> Result<Vec<InetSocket>> {
    families(UDP, u32::MAX)
}

fn both(states: u32) -> Result<Vec<InetSocket>> {
    families(TCP, states)
}

/// Listening sockets.
pub fn listeners(_guard: &Guard<'_>) -> Result<Vec<InetSocket>> {
    both(1 << LISTEN)
}

/// Connections whose mark, under `mask`, is `value`. TIME_WAIT does not count: it sends nothing by itself.
pub fn marked(_guard: &Guard<'_>, value: u32, mask: u32) -> Result<usize> {
    const ALL: u32 = 0xfff;
    let sockets = both(ALL & !(1 << LISTEN) & !(1 << TIME_WAIT))?;
    Ok(sockets
        .into_iter()
        .filter(|s| s.mark & mask == value)
        .count())
}
