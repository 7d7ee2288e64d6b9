//! An AF_PACKET socket bound to one interface. Only the system calls; what frames mean is in `packet`.
#![expect(
    unsafe_code,
    reason = "neither nix nor socket2 can build a link-layer address to bind to"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::sockopt;

/// Room for the largest segment that offloading hands over at once (BIG TCP).
const FRAME: usize = 512 * 1024;
/// What the kernel may hold for us before it drops.
const QUEUE: i32 = 256 * 1024 * 1024;

#[expect(clippy::cast_possible_truncation, reason = "17")]
const FAMILY: u16 = libc::AF_PACKET as u16;
#[expect(clippy::cast_possible_truncation, reason = "3")]
const EVERYTHING: u16 = libc::ETH_P_ALL as u16;
#[expect(clippy::cast_possible_truncation, reason = "20")]
const ADDRESS: libc::socklen_t = size_of::<libc::sockaddr_ll>() as libc::socklen_t;

/// Frames as they pass an interface, both ways.
#[derive(Debug)]
pub(crate) struct PacketSocket {
    fd: OwnedFd,
    buffer: Vec<u8>,
}

impl PacketSocket {
    /// Opens it in the calling thread's namespace. From here on every frame counts.
    pub(crate) fn open(ifindex: u32) -> io::Result<Self> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // Protocol 0: nothing is queued before the socket is bound to its one interface.
        // SAFETY: no pointers are passed.
        let raw = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: raw is a socket just made that nobody else knows.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        sockopt::set_int(fd.as_fd(), libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, QUEUE)?;
        // SAFETY: a link-layer address is plain numbers, for which all zeroes is a value.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = FAMILY;
        address.sll_protocol = EVERYTHING.to_be();
        address.sll_ifindex = i32::try_from(ifindex).map_err(io::Error::other)?;
        let length = ADDRESS;
        // SAFETY: address outlives the call, and length is its size.
        let code = unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), length) };
        if code < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            fd,
            buffer: vec![0; FRAME],
        })
    }

    /// The next frame that waits, and whether the interface sent it. `None` when none waits.
    pub(crate) fn next(&mut self) -> io::Result<Option<(bool, Vec<u8>)>> {
        // SAFETY: a link-layer address is plain numbers, for which all zeroes is a value.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        let mut length = ADDRESS;
        // SAFETY: buffer, address and length outlive the call and are as long as it is told.
        let code = unsafe {
            libc::recvfrom(
                self.fd.as_raw_fd(),
                self.buffer.as_mut_ptr().cast(),
                self.buffer.len(),
                libc::MSG_TRUNC,
                (&raw mut address).cast(),
                &raw mut length,
            )
        };
        let Ok(size) = usize::try_from(code) else {
            let error = io::Error::last_os_error();
            return match error.raw_os_error() {
                // ENETDOWN: the interface went down or away; whatever came before was read.
                Some(libc::EAGAIN | libc::EINTR | libc::ENETDOWN) => Ok(None),
                _ => Err(error),
            };
        };
        let frame = self
            .buffer
            .get(..size)
            .ok_or_else(|| io::Error::other("a frame longer than the buffer"))?;
        Ok(Some((
            address.sll_pkttype == libc::PACKET_OUTGOING,
            frame.to_vec(),
        )))
    }

    /// How many frames the kernel dropped since the last call.
    pub(crate) fn drops(&self) -> io::Result<u32> {
        // struct tpacket_stats: packets, drops.
        let both = sockopt::get_u64(self.fd.as_fd(), libc::SOL_PACKET, libc::PACKET_STATISTICS)?
            .to_ne_bytes();
        let [_, _, _, _, drops @ ..] = both;
        Ok(u32::from_ne_bytes(drops))
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
