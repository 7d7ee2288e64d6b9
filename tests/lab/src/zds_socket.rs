//! One ZDS conversation on its packet socket: requests with their answers, in order. Which requests is up to `zds`.

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, MsgFlags, getsockopt, recv, sendmsg, sockopt};
use prost::Message;

use crate::zds_messages::{Request, WorkloadRequest, WorkloadResponse, ZdsHello};

/// The longest packet either side reads.
const PACKET: usize = 1024;
/// How long a ztunnel may take to say hello, and to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// The server's end of a conversation.
#[derive(Debug)]
pub(crate) struct ZdsSocket {
    fd: OwnedFd,
}

impl ZdsSocket {
    /// Takes a connection over and reads its hello.
    pub(crate) fn greet(fd: OwnedFd) -> Result<Self> {
        let socket = Self { fd };
        let hello = ZdsHello::decode(socket.receive()?.as_slice()).context("reading a hello")?;
        ensure!(
            hello.version == 1,
            "a hello of version {}, not 1",
            hello.version
        );
        Ok(socket)
    }

    /// The process at the other end.
    pub(crate) fn peer_pid(&self) -> Result<u32> {
        let peer =
            getsockopt(&self.fd, sockopt::PeerCredentials).context("asking who connected")?;
        Ok(peer.pid().unsigned_abs())
    }

    /// Sends a request, with a namespace beside it, and waits for the answer: `Ok(Err(..))` is a refusal.
    pub(crate) fn ask(
        &self,
        request: Request,
        netns: Option<BorrowedFd<'_>>,
    ) -> Result<Result<(), String>> {
        let packet = WorkloadRequest {
            payload: Some(request),
        }
        .encode_to_vec();
        ensure!(
            packet.len() <= PACKET,
            "a request of {} bytes: ztunnel reads {PACKET}",
            packet.len()
        );
        let fds: Vec<i32> = netns.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let control = if fds.is_empty() {
            &[]
        } else {
            rights.as_slice()
        };
        sendmsg::<()>(
            self.fd.as_raw_fd(),
            &[IoSlice::new(&packet)],
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        )
        .context("sending to ztunnel")?;
        let answer =
            WorkloadResponse::decode(self.receive()?.as_slice()).context("reading an answer")?;
        let ack = answer.ack.context("an answer that is no acknowledgement")?;
        Ok(if ack.error.is_empty() {
            Ok(())
        } else {
            Err(ack.error)
        })
    }

    /// Whether the other end has hung up. Nothing comes unasked.
    pub(crate) fn hung_up(&self) -> bool {
        let mut byte = [0];
        match recv(
            self.fd.as_raw_fd(),
            &mut byte,
            MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT,
        ) {
            Ok(length) => length == 0,
            Err(error) => error != Errno::EAGAIN && error != Errno::EINTR,
        }
    }

    fn receive(&self) -> Result<Vec<u8>> {
        let started = Instant::now();
        let mut packet = vec![0; PACKET];
        loop {
            let left = PATIENCE.saturating_sub(started.elapsed());
            ensure!(
                !left.is_zero(),
                "ztunnel has not answered within {PATIENCE:?}"
            );
            let millis = u16::try_from(left.as_millis()).unwrap_or(u16::MAX);
            let mut fds = [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::from(millis)) {
                Ok(0) | Err(Errno::EINTR) => continue,
                Ok(_) => {}
                Err(error) => return Err(error).context("waiting for ztunnel"),
            }
            let length = recv(self.fd.as_raw_fd(), &mut packet, MsgFlags::empty())
                .context("hearing ztunnel")?;
            if length == 0 {
                bail!("ztunnel has hung up");
            }
            packet.truncate(length);
            return Ok(packet);
        }
    }
}
