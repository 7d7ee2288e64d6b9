//! The client's end of ZDS: one packet socket, one message a packet, a namespace descriptor beside each `Add`.
//!
//! Owns connecting, framing and descriptors. What the messages mean, and in which order they may come, is `manager`'s business.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::path::Path;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, connect, recvmsg,
    sendmsg, socket,
};
use prost::Message as _;
use tokio::io::Interest;
use tokio::net::UnixStream;

use crate::messages::{
    Ack, Request, Response, Version, WorkloadRequest, WorkloadResponse, ZdsHello,
};

/// The longest packet either side reads.
pub const MAX_PACKET: usize = 1024;

/// Why a conversation ended.
#[derive(Debug, thiserror::Error)]
pub enum ZdsError {
    /// The connection is gone; a new one may work.
    #[error("ZDS connection failed: {0}")]
    Io(#[from] io::Error),
    /// The node agent broke the protocol; ztunnel exits on that.
    #[error("ZDS protocol error: {0}; this is a fault of the node agent")]
    Protocol(String),
}

/// One message from the node agent, with the descriptor that came beside it.
#[derive(Debug)]
pub struct Incoming {
    /// The message.
    pub request: Request,
    /// The pod's network namespace, with an `Add` and only then.
    pub netns: Option<OwnedFd>,
}

/// A connection to the node agent.
#[derive(Debug)]
pub struct Connection {
    // A stream in name only: the runtime has no type for packet sockets, and nothing here reads or writes as on a stream.
    socket: UnixStream,
}

impl Connection {
    /// Connects and says hello.
    ///
    /// # Errors
    /// When nobody listens at `path`.
    pub async fn open(path: &Path) -> Result<Self, ZdsError> {
        let fd = socket(
            AddressFamily::Unix,
            SockType::SeqPacket,
            SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC,
            None,
        )
        .map_err(io::Error::from)?;
        let addr = UnixAddr::new(path).map_err(io::Error::from)?;
        // On AF_UNIX this succeeds or fails at once; EAGAIN means that the backlog is full, and the caller tries again.
        connect(fd.as_raw_fd(), &addr).map_err(io::Error::from)?;
        let connection = Self {
            socket: UnixStream::from_std(fd.into())?,
        };
        connection
            .send(
                &ZdsHello {
                    version: Version::V1.into(),
                }
                .encode_to_vec(),
            )
            .await?;
        Ok(connection)
    }

    /// Answers the last request; an empty text says that it was carried out.
    ///
    /// # Errors
    /// When the agent is gone.
    pub async fn answer(&self, error: &str) -> Result<(), ZdsError> {
        // The agent reads one buffer of this size and no more.
        let error = truncated(error, MAX_PACKET - 64).to_owned();
        let response = WorkloadResponse {
            payload: Some(Response::Ack(Ack { error })),
        };
        Ok(self.send(&response.encode_to_vec()).await?)
    }

    /// The next message, or `None` when the agent has closed the connection. Safe to cancel.
    ///
    /// # Errors
    /// When the connection breaks or the packet is not a message of the protocol.
    pub async fn next(&self) -> Result<Option<Incoming>, ZdsError> {
        let (packet, fds, truncated) = self
            .socket
            .async_io(Interest::READABLE, || receive(self.socket.as_raw_fd()))
            .await?;
        if packet.is_empty() {
            return Ok(None);
        }
        if truncated {
            return Err(ZdsError::Protocol(format!(
                "a packet or its control message exceeds {MAX_PACKET} bytes"
            )));
        }
        parse(&packet, fds).map(Some)
    }

    async fn send(&self, packet: &[u8]) -> io::Result<()> {
        self.socket
            .async_io(Interest::WRITABLE, || {
                Ok(sendmsg::<()>(
                    self.socket.as_raw_fd(),
                    &[IoSlice::new(packet)],
                    &[],
                    MsgFlags::MSG_NOSIGNAL,
                    None,
                )?)
            })
            .await?;
        Ok(())
    }
}

type Packet = (Vec<u8>, Vec<OwnedFd>, bool);

fn receive(fd: RawFd) -> io::Result<Packet> {
    let mut packet = vec![0; MAX_PACKET];
    let mut iov = [IoSliceMut::new(&mut packet)];
    // Room for more than one, so that a surplus is seen and closed instead of cut off.
    let mut control = nix::cmsg_space!([i32; 4]);
    let message = match recvmsg::<()>(
        fd.as_raw_fd(),
        &mut iov,
        Some(&mut control),
        MsgFlags::MSG_CMSG_CLOEXEC,
    ) {
        // A peer that died with our words unread: the end of the conversation, like an empty packet.
        Err(Errno::ECONNRESET) => return Ok((Vec::new(), Vec::new(), false)),
        other => other?,
    };
    let mut fds = Vec::new();
    for item in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = item {
            fds.extend(raw.into_iter().map(adopt));
        }
    }
    let truncated = message
        .flags
        .intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC);
    let length = message.bytes;
    packet.truncate(length);
    Ok((packet, fds, truncated))
}

#[expect(
    unsafe_code,
    reason = "the kernel hands received descriptors over as numbers"
)]
fn adopt(raw: i32) -> OwnedFd {
    // SAFETY: the kernel has just installed this descriptor for us by SCM_RIGHTS, and nothing else knows its number.
    unsafe { OwnedFd::from_raw_fd(raw) }
}

fn parse(packet: &[u8], mut fds: Vec<OwnedFd>) -> Result<Incoming, ZdsError> {
    let protocol = |what: &str| ZdsError::Protocol(what.to_owned());
    let request = WorkloadRequest::decode(packet)
        .map_err(|e| ZdsError::Protocol(format!("unreadable message: {e}")))?;
    let request = request
        .payload
        .ok_or_else(|| protocol("a request without a body"))?;
    if fds.len() > 1 {
        return Err(protocol("more than one descriptor in a message"));
    }
    let netns = fds.pop();
    match (&request, &netns) {
        (Request::Add(_), None) => Err(protocol("Add without a network namespace")),
        (Request::Add(add), Some(_)) if add.workload_info.is_none() => {
            Err(protocol("Add without workload_info"))
        }
        (Request::Del(_) | Request::Keep(_) | Request::SnapshotSent(_), Some(_)) => {
            Err(protocol("a descriptor beside a message that carries none"))
        }
        _ => Ok(Incoming { request, netns }),
    }
}

fn truncated(text: &str, limit: usize) -> &str {
    match text.char_indices().map(|(at, _)| at).find(|at| *at > limit) {
        Some(_) => &text[..text.floor_char_boundary(limit)],
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::messages::{AddWorkload, DelWorkload, KeepWorkload, SnapshotSent, WorkloadInfo};

    fn bytes(payload: Request) -> Vec<u8> {
        WorkloadRequest {
            payload: Some(payload),
        }
        .encode_to_vec()
    }

    fn fd() -> OwnedFd {
        std::fs::File::open("/dev/null").unwrap().into()
    }

    fn add(workload_info: Option<WorkloadInfo>) -> Vec<u8> {
        bytes(Request::Add(AddWorkload {
            uid: "u".into(),
            workload_info,
        }))
    }

    #[test]
    fn add_wants_exactly_one_descriptor_and_the_info() {
        let info = Some(WorkloadInfo::default());
        assert!(parse(&add(info.clone()), vec![fd()]).is_ok());
        assert!(parse(&add(info.clone()), vec![]).is_err());
        assert!(parse(&add(info), vec![fd(), fd()]).is_err());
        assert!(parse(&add(None), vec![fd()]).is_err());
    }

    #[test]
    fn others_want_none() {
        for request in [
            Request::Del(DelWorkload { uid: "u".into() }),
            Request::Keep(KeepWorkload { uid: "u".into() }),
            Request::SnapshotSent(SnapshotSent {}),
        ] {
            assert!(parse(&bytes(request.clone()), vec![]).is_ok());
            assert!(parse(&bytes(request), vec![fd()]).is_err());
        }
    }

    #[test]
    fn empty_and_garbled_packets_are_errors() {
        assert!(parse(b"", vec![]).is_err(), "a request without a body");
        assert!(parse(b"\xff\xff\xff", vec![]).is_err());
    }

    #[test]
    fn long_errors_are_cut_between_characters() {
        assert_eq!(truncated("ok", 10), "ok");
        assert_eq!(truncated("aäb", 2), "a");
        assert_eq!(truncated("0123456789ab", 10), "0123456789");
    }
}
