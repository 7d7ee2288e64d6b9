//! Datagram sockets that are still connected to ztunnel when their pod's DNS capture ends: once ztunnel closes its
//! listener, everything sent there fails. Each is connected to the resolver it asked for, as if it had never been
//! elsewhere.
//!
//! Connects sockets of others, and does nothing else to them.
#![expect(
    unsafe_code,
    reason = "connect(2) with AF_UNSPEC, which nix has no address for"
)]

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
};

use culvert_ebpf::abi::{mark, port};
use socket2::SockRef;

use super::{
    error::{Error, Result},
    netns::Guard,
    process::Process,
    procfs,
    sockdiag::{self, InetSocket},
};

/// Connects them, and returns how many there were. Capture must be off for the namespace by now.
pub(super) fn reconnect(guard: &Guard<'_>) -> Result<usize> {
    let stray = |s: &InetSocket| {
        s.peer_port == port::DNS
            && s.peer.to_canonical().is_loopback()
            && s.mark & mark::MASK != mark::ZTUNNEL
    };
    let mut wanted = sockdiag::datagram(guard)?;
    wanted.retain(stray);
    if wanted.is_empty() {
        return Ok(0);
    }
    let mut done = 0;
    // Rare, so a look through all processes is no matter of time.
    for pid in procfs::processes(Path::new(procfs::PROC))? {
        if wanted.is_empty() {
            break;
        }
        // Processes and their sockets come and go while we look.
        let Ok(process) = Process::open(pid) else {
            continue;
        };
        wanted.retain(|socket| match process.socket(socket.inode) {
            Ok(Some(fd)) => match send_home(&fd, socket) {
                Ok(was) => {
                    done += usize::from(was);
                    false
                }
                Err(error) => {
                    tracing::warn!(%error, pid, "a socket stays connected to ztunnel: its next lookup may fail once");
                    false
                }
            },
            _ => true,
        });
    }
    Ok(done)
}

/// False for a socket that was connected to ztunnel by its own process.
fn send_home(fd: &OwnedFd, socket: &InetSocket) -> Result<bool> {
    let fail = |e| Error::system("connect to its resolver", "a socket", e);
    let ours = SockRef::from(fd);
    // The programs answer, as they answer the application.
    let resolver = ours.peer_addr().map_err(fail)?;
    if resolver.as_socket().map(|a| a.port()) != Some(port::DOMAIN) {
        return Ok(false);
    }
    if socket.local.to_canonical().is_loopback() {
        disconnect(fd).map_err(fail)?;
    }
    ours.connect(&resolver).map_err(fail)?;
    Ok(true)
}

/// Lets go of the peer and of the source that came with it, which leads nowhere but to loopback.
fn disconnect(fd: &OwnedFd) -> io::Result<()> {
    // SAFETY: plain data, for which all zeros (AF_UNSPEC) is valid.
    let nobody: libc::sockaddr = unsafe { std::mem::zeroed() };
    let length = libc::socklen_t::try_from(size_of_val(&nobody)).map_err(io::Error::other)?;
    // SAFETY: the address is ours and as long as said.
    if unsafe { libc::connect(fd.as_raw_fd(), &raw const nobody, length) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
