//! The packet socket: listening at a path, one packet a message, a namespace descriptor beside some.
//!
//! Owns SOCK_SEQPACKET, SCM_RIGHTS, the peer's credentials and what the kernel says when it has no room. What a packet
//! means is `conversation`'s business.

use std::{
    fs, io,
    io::{IoSlice, IoSliceMut},
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
        unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::socket::{ControlMessage, MsgFlags, getsockopt, recvmsg, sendmsg, sockopt},
};
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::{
    io::Interest,
    net::{UnixListener, UnixStream},
    time::Instant,
};

use super::{messages::MAX_PACKET, terms::Reason};

/// Only the owner: our own user, which uid 0 of ztunnel's container is as well. It needs no capability for that.
const MODE: u32 = 0o600;
/// ztunnels that connect at the same moment.
const BACKLOG: i32 = 16;
/// Between two tries when the kernel has no room: first, and at most.
const PAUSES: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(200));

/// Why the server cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another server answers at the path.
    #[error("{path} is in use: process {pid} answers there; end it, or give another path (another node agent serves the same ztunnel?)", path = path.display())]
    InUse {
        /// Where.
        path: PathBuf,
        /// Who, 0 when that cannot be seen from here.
        pid: i32,
    },
    /// What is at the path is not ours to take away.
    #[error("{path} is there and is no socket: move it away, or give another path", path = path.display())]
    NotASocket {
        /// Where.
        path: PathBuf,
    },
    /// A system call failed.
    #[error("cannot {operation} {path}: {cause}; the directory must be writable by the agent and shared with ztunnel", path = path.display())]
    System {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel said.
        cause: io::Error,
    },
}

/// A socket that listens, and its file.
#[derive(Debug)]
pub(super) struct Listener {
    // The runtime has no type for packet sockets, but accepting is the same for all.
    socket: UnixListener,
    path: PathBuf,
    /// Device and inode: the file may be somebody else's by the time we end.
    file: (u64, u64),
}

/// Who connected.
#[derive(Debug)]
pub(super) struct Credentials {
    pub(super) pid: i32,
    pub(super) uid: u32,
    /// Stands for the process itself, whatever becomes of its number. `None` before Linux 6.5.
    pub(super) pidfd: Option<OwnedFd>,
}

impl Listener {
    /// Takes the place of a stale socket, never of one that answers. Needs a tokio runtime.
    pub(super) fn bind(path: &Path) -> Result<Self, Error> {
        let failed = |operation| {
            move |cause| Error::System {
                operation,
                path: path.to_path_buf(),
                cause,
            }
        };
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).map_err(failed("make the directory of"))?;
        }
        let addr = SockAddr::unix(path).map_err(failed("use"))?;
        clear(path, &addr)?;
        let socket = packet_socket().map_err(failed("open a socket for"))?;
        socket.bind(&addr).map_err(failed("listen at"))?;
        // Before it listens, so that nobody gets in under the mode that the umask left.
        fs::set_permissions(path, fs::Permissions::from_mode(MODE))
            .map_err(failed("set the mode of"))?;
        let meta = fs::symlink_metadata(path).map_err(failed("look at"))?;
        socket.listen(BACKLOG).map_err(failed("listen at"))?;
        Ok(Self {
            socket: UnixListener::from_std(OwnedFd::from(socket).into())
                .map_err(failed("listen at"))?,
            path: path.to_path_buf(),
            file: (meta.dev(), meta.ino()),
        })
    }

    /// The next connection. Safe to cancel.
    pub(super) async fn accept(&self) -> io::Result<(Connection, Credentials)> {
        let (stream, _) = self.socket.accept().await?;
        let credentials = credentials(&stream)?;
        Ok((Connection { stream }, credentials))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let ours = |meta: &fs::Metadata| (meta.dev(), meta.ino()) == self.file;
        if fs::symlink_metadata(&self.path).is_ok_and(|meta| ours(&meta)) {
            // A file that stays is stale, and the next server takes it away.
            let _stale = fs::remove_file(&self.path);
        }
    }
}

/// Makes room at the path.
fn clear(path: &Path, addr: &SockAddr) -> Result<(), Error> {
    let failed = |operation, cause| Error::System {
        operation,
        path: path.to_path_buf(),
        cause,
    };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("look at", error)),
        Ok(meta) if !meta.file_type().is_socket() => {
            return Err(Error::NotASocket {
                path: path.to_path_buf(),
            });
        }
        Ok(_) => {}
    }
    let probe = packet_socket().map_err(|e| failed("open a socket for", e))?;
    let in_use = |pid| Error::InUse {
        path: path.to_path_buf(),
        pid,
    };
    match probe.connect(addr) {
        Ok(()) => Err(in_use(credentials(&probe).map_or(0, |peer| peer.pid))),
        Err(error) => match error.raw_os_error() {
            // Its server is gone.
            Some(libc::ECONNREFUSED) => {
                fs::remove_file(path).map_err(|e| failed("take away the stale socket", e))
            }
            Some(libc::ENOENT) => Ok(()),
            // Alive, with a full backlog or of another type.
            Some(libc::EAGAIN | libc::EPROTOTYPE) => Err(in_use(0)),
            _ => Err(failed("ask who listens at", error)),
        },
    }
}

fn packet_socket() -> io::Result<Socket> {
    let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn credentials(socket: &impl AsFd) -> io::Result<Credentials> {
    let peer = getsockopt(socket, sockopt::PeerCredentials)?;
    let pidfd = getsockopt(socket, sockopt::PeerPidfd).ok();
    Ok(Credentials {
        pid: peer.pid(),
        uid: peer.uid(),
        pidfd,
    })
}

/// A connection to one ztunnel.
#[derive(Debug)]
pub(super) struct Connection {
    // A stream in name only: nothing here reads or writes as on a stream.
    stream: UnixStream,
}

impl Connection {
    /// Sends one packet, whole or not at all. While the kernel has no room it tries again until the time given. Returns how
    /// often it had to.
    pub(super) async fn send(
        &self,
        packet: &[u8],
        fd: Option<BorrowedFd<'_>>,
        until: Instant,
    ) -> Result<u32, Reason> {
        let full = AtomicU32::new(0);
        let attempt = || {
            self.stream.async_io(Interest::WRITABLE, || {
                send_packet(self.stream.as_fd(), packet, fd).inspect_err(|error| {
                    if *error == Errno::EAGAIN {
                        // It does not read. The runtime says when it does.
                        full.fetch_add(1, Ordering::Relaxed);
                    }
                })?;
                Ok(())
            })
        };
        let tries = persist(attempt, until).await?;
        Ok(tries + full.into_inner())
    }

    /// The next packet, or `None` when ztunnel has hung up. Safe to cancel.
    pub(super) async fn receive(&self) -> Result<Option<Vec<u8>>, Reason> {
        loop {
            let received = self
                .stream
                .async_io(Interest::READABLE, || receive_packet(self.stream.as_fd()));
            match received.await {
                Ok(received) => return received.whole(),
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    // It ended with words of ours unread.
                    Some(libc::ECONNRESET) => return Ok(None),
                    _ => return Err(Reason::Receive(error.to_string())),
                },
            }
        }
    }
}

/// Tries until it works, fails for good, or the time is over; returns how often there was no room.
async fn persist<T: Future<Output = io::Result<()>>>(
    mut attempt: impl FnMut() -> T,
    until: Instant,
) -> Result<u32, Reason> {
    let started = Instant::now();
    // What never gets an answer from the runtime waits for the peer to read.
    let mut last = Errno::EAGAIN;
    let mut tries = 0;
    let (mut pause, longest) = PAUSES;
    loop {
        let error = match tokio::time::timeout_at(until, attempt()).await {
            Ok(Ok(())) => return Ok(tries),
            Ok(Err(error)) => error,
            Err(_) => return Err(Reason::Send(no_room(last, started.elapsed()))),
        };
        match error.raw_os_error() {
            Some(libc::EINTR) => {}
            // Nothing says when there is room again.
            Some(no @ (libc::ENOBUFS | libc::ENOMEM | libc::ETOOMANYREFS)) => {
                last = Errno::from_raw(no);
                if tries == 0 {
                    tracing::warn!(%error, "no room for a message to ztunnel; trying again");
                }
                tries += 1;
                if Instant::now() + pause >= until {
                    return Err(Reason::Send(no_room(last, started.elapsed())));
                }
                tokio::time::sleep(pause).await;
                pause = longest.min(pause * 2);
            }
            _ => return Err(Reason::Send(error.to_string())),
        }
    }
}

struct Received {
    packet: Vec<u8>,
    flags: MsgFlags,
}

impl Received {
    fn whole(self) -> Result<Option<Vec<u8>>, Reason> {
        let broken = |what: &str| Err(Reason::Protocol(what.into()));
        if self.flags.contains(MsgFlags::MSG_TRUNC) {
            return broken("a packet of more than 1024 bytes");
        }
        // There was no room for any, so the kernel has closed it.
        if self.flags.contains(MsgFlags::MSG_CTRUNC) {
            return broken("a descriptor beside a message that carries none");
        }
        Ok(Some(self.packet).filter(|packet| !packet.is_empty()))
    }
}

fn receive_packet(socket: BorrowedFd<'_>) -> io::Result<Received> {
    let mut packet = vec![0; MAX_PACKET];
    let mut iov = [IoSliceMut::new(&mut packet)];
    // No room for descriptors: none belongs to what ztunnel says, and so none is ever installed here.
    let message = recvmsg::<()>(
        socket.as_raw_fd(),
        &mut iov,
        None,
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let (length, flags) = (message.bytes, message.flags);
    packet.truncate(length);
    Ok(Received { packet, flags })
}

fn send_packet(
    socket: BorrowedFd<'_>,
    packet: &[u8],
    fd: Option<BorrowedFd<'_>>,
) -> nix::Result<()> {
    let fds: Vec<i32> = fd.iter().map(|fd| fd.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let control = if fds.is_empty() { &[] } else { &rights[..] };
    let iov = [IoSlice::new(packet)];
    sendmsg::<()>(
        socket.as_raw_fd(),
        &iov,
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    Ok(())
}

/// Why a message stayed here, and what to do about it.
fn no_room(last: Errno, waited: Duration) -> String {
    let cure = match last {
        Errno::EAGAIN => "it does not read; look whether ztunnel is stuck or starved of CPU",
        Errno::ETOOMANYREFS => {
            "too many descriptors are on their way; raise the limit of open files (LimitNOFILE) of the agent"
        }
        _ => "the kernel has no memory for it; look at the node's memory and at net.core.wmem_max",
    };
    format!("{last} for {waited:.1?}: {cure}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Connection, Connection) {
        let (one, other) = Socket::pair(Domain::UNIX, Type::SEQPACKET, None).unwrap();
        let connection = |socket: Socket| {
            socket.set_nonblocking(true).unwrap();
            let stream = UnixStream::from_std(OwnedFd::from(socket).into()).unwrap();
            Connection { stream }
        };
        (connection(one), connection(other))
    }

    fn soon(millis: u64) -> Instant {
        Instant::now() + Duration::from_millis(millis)
    }

    #[tokio::test]
    async fn a_peer_that_does_not_read_is_waited_for_and_then_named() {
        let (server, ztunnel) = pair();
        let packet = [7; MAX_PACKET];
        let mut sent = 0;
        let error = loop {
            match server.send(&packet, None, soon(100)).await {
                Ok(_) => sent += 1,
                Err(error) => break error.to_string(),
            }
            assert!(sent < 100_000, "the kernel takes no end of packets");
        };
        assert!(error.contains("it does not read"), "{error}");
        // It begins to read: what waited goes out, whole.
        let read = async {
            for _ in 0..=sent {
                assert_eq!(ztunnel.receive().await.unwrap().unwrap(), packet);
            }
        };
        let (tries, ()) = tokio::join!(server.send(&packet, None, soon(10_000)), read);
        tries.unwrap();
    }

    #[tokio::test]
    async fn no_room_in_the_kernel_is_waited_out() {
        let mut left = 3;
        let attempt = || {
            left -= 1;
            let full = left >= 0;
            async move {
                if full {
                    return Err(Errno::ENOBUFS.into());
                }
                Ok(())
            }
        };
        assert_eq!(persist(attempt, soon(10_000)).await, Ok(3));
    }

    #[tokio::test]
    async fn no_room_for_too_long_says_what_to_look_at() {
        for (errno, cure) in [
            (Errno::ENOBUFS, "net.core.wmem_max"),
            (Errno::ETOOMANYREFS, "LimitNOFILE"),
        ] {
            let error = persist(|| async move { Err(errno.into()) }, soon(50)).await;
            let error = error.unwrap_err().to_string();
            assert!(error.contains(cure), "{error}");
        }
    }

    #[tokio::test]
    async fn a_peer_that_is_gone_is_no_reason_to_wait() {
        let (server, ztunnel) = pair();
        drop(ztunnel);
        let error = server.send(b"x", None, soon(10_000)).await.unwrap_err();
        assert!(error.to_string().contains("Broken pipe"), "{error}");
        assert_eq!(server.receive().await, Ok(None));
    }
}
