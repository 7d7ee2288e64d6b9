//! rtnetlink, spoken synchronously by the thread that is in the namespace concerned.
//!
//! One socket, one request at a time or one batch: a pod's rules and routes go to the kernel in a single
//! system call. Nothing of ours ever runs `ip`.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::sys::{
    socket::{setsockopt, sockopt::ReceiveTimeout},
    time::{TimeVal, TimeValLike},
};

use super::error::{Error, Result};

/// What a batch asks for: adding or deleting, and the message.
#[derive(Clone, Debug)]
pub(super) enum Change {
    /// Must be new; already there counts as done.
    Add(RouteNetlinkMessage),
    /// New or replaced.
    Replace(RouteNetlinkMessage),
    /// Gone already counts as done.
    Delete(RouteNetlinkMessage),
}

/// What a subscription told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Heard {
    /// Links or addresses changed, not only routes or rules.
    pub(super) interfaces: bool,
}

/// An rtnetlink socket of the namespace it was opened in.
pub(super) struct Rtnetlink {
    socket: Socket,
    port: u32,
    sequence: u32,
}

impl std::fmt::Debug for Rtnetlink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rtnetlink")
            .field("fd", &self.socket.as_fd())
            .finish()
    }
}

fn fail(operation: &'static str) -> impl Fn(io::Error) -> Error {
    move |e| Error::system(operation, "rtnetlink", e)
}

impl Rtnetlink {
    /// Opens one in the calling thread's namespace.
    pub(super) fn open() -> Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE).map_err(fail("open"))?;
        let port = socket.bind_auto().map_err(fail("bind"))?.port_number();
        socket
            .connect(&SocketAddr::new(0, 0))
            .map_err(fail("connect"))?;
        // The kernel answers within the call; an answer we fail to understand must not hang an enrolment.
        setsockopt(&socket, ReceiveTimeout, &TimeVal::seconds(5))
            .map_err(|e| fail("configure")(e.into()))?;
        Ok(Self {
            socket,
            port,
            sequence: 0,
        })
    }

    /// Opens one that hears of changes of links, addresses, routes and rules; non-blocking.
    pub(super) fn subscribe() -> Result<Self> {
        const LINK: u32 = 1;
        const IPV4_ADDRESS: u32 = 5;
        const IPV4_ROUTE: u32 = 7;
        const IPV4_RULE: u32 = 8;
        const IPV6_ADDRESS: u32 = 9;
        const IPV6_ROUTE: u32 = 11;
        const IPV6_RULE: u32 = 19;
        let mut socket = Socket::new(NETLINK_ROUTE).map_err(fail("open"))?;
        let port = socket.bind_auto().map_err(fail("bind"))?.port_number();
        for group in [
            LINK,
            IPV4_ADDRESS,
            IPV4_ROUTE,
            IPV4_RULE,
            IPV6_ADDRESS,
            IPV6_ROUTE,
            IPV6_RULE,
        ] {
            socket.add_membership(group).map_err(fail("subscribe to"))?;
        }
        socket.set_non_blocking(true).map_err(fail("configure"))?;
        Ok(Self {
            socket,
            port,
            sequence: 0,
        })
    }

    /// The kernel's number for it: changes made through it are told with this.
    pub(super) fn port(&self) -> u32 {
        self.port
    }

    /// Reads away what a subscription brought; none when there was nothing, or nothing but what was done through the
    /// socket of port `own`.
    pub(super) fn drain(&self, own: Option<u32>) -> Option<Heard> {
        let mut heard: Option<Heard> = None;
        let mut buffer = Vec::with_capacity(8192);
        loop {
            buffer.clear();
            match self.socket.recv(&mut buffer, 0) {
                Ok(_) if own.is_some() && author(&buffer) == own => {}
                Ok(_) => {
                    heard.get_or_insert_default().interfaces |= concerns_interfaces(&buffer);
                }
                // Something was lost: it may have been anything.
                Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => {
                    heard.get_or_insert_default().interfaces = true;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return heard,
            }
        }
    }

    /// Its descriptor, to wait on.
    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn message(
        &mut self,
        payload: RouteNetlinkMessage,
        flags: u16,
    ) -> NetlinkMessage<RouteNetlinkMessage> {
        let mut message = NetlinkMessage::from(payload);
        self.sequence += 1;
        message.header.sequence_number = self.sequence;
        message.header.flags = NLM_F_REQUEST | flags;
        message.finalize();
        message
    }

    /// Everything the kernel lists for `request`.
    pub(super) fn dump(
        &mut self,
        request: RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>> {
        // A dump that changed under our eyes is asked for again, a few times.
        for _ in 0..8 {
            let message = self.message(request.clone(), NLM_F_DUMP);
            let mut out = vec![0; message.buffer_len()];
            message.serialize(&mut out);
            self.socket.send(&out, 0).map_err(fail("send to"))?;
            let mut replies = Vec::new();
            if self.collect(message.header.sequence_number, &mut replies)? {
                return Ok(replies);
            }
        }
        let error = Error::wrong(
            "list",
            "rtnetlink",
            "the tables keep changing while they are read",
            "try again",
        );
        Err(error.for_now())
    }

    /// Reads to the end of a dump; false when it was interrupted by a change.
    fn collect(&mut self, sequence: u32, replies: &mut Vec<RouteNetlinkMessage>) -> Result<bool> {
        const NLM_F_DUMP_INTR: u16 = 0x10;
        let mut whole = true;
        loop {
            let buffer = self.receive()?;
            for message in messages(&buffer)? {
                if message.header.sequence_number != sequence {
                    continue;
                }
                whole &= message.header.flags & NLM_F_DUMP_INTR == 0;
                match message.payload {
                    NetlinkPayload::Done(_) => return Ok(whole),
                    NetlinkPayload::InnerMessage(inner) => replies.push(inner),
                    NetlinkPayload::Error(e) if e.code.is_some() => {
                        return Err(fail("list")(e.to_io()));
                    }
                    _ => {}
                }
            }
        }
    }

    fn receive(&self) -> Result<Vec<u8>> {
        loop {
            // Dumps come in packets of up to 32 KiB.
            let mut buffer = Vec::with_capacity(32 * 1024);
            match self.socket.recv(&mut buffer, 0) {
                Ok(_) => return Ok(buffer),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(fail("read from")(e)),
            }
        }
    }

    /// Applies changes in order, in one system call; all are tried, the first failure is returned.
    pub(super) fn apply(&mut self, changes: &[Change]) -> Result<()> {
        // Acks are queued on our side: stay far below the default receive buffer.
        for chunk in changes.chunks(64) {
            self.apply_chunk(chunk)?;
        }
        Ok(())
    }

    fn apply_chunk(&mut self, changes: &[Change]) -> Result<()> {
        let mut out = Vec::new();
        let before = self.sequence;
        for (left, change) in changes
            .iter()
            .enumerate()
            .map(|(i, c)| (changes.len() - i, c))
        {
            let (payload, flags) = match change {
                Change::Add(m) => (m, NLM_F_CREATE | NLM_F_EXCL),
                Change::Replace(m) => (m, NLM_F_CREATE | NLM_F_REPLACE),
                Change::Delete(m) => (m, 0),
            };
            // What fails is told anyway; the last one's answer tells that all have been tried.
            let ack = if left == 1 { NLM_F_ACK } else { 0 };
            let message = self.message(payload.clone(), flags | ack);
            let start = out.len();
            out.resize(start + message.buffer_len().next_multiple_of(4), 0);
            message.serialize(&mut out[start..]);
        }
        if out.is_empty() {
            return Ok(());
        }
        self.socket.send(&out, 0).map_err(fail("send to"))?;
        let mut first = None;
        loop {
            let buffer = self.receive()?;
            for message in messages(&buffer)? {
                let sequence = message.header.sequence_number;
                let NetlinkPayload::Error(ack) = message.payload else {
                    continue;
                };
                let number = sequence.checked_sub(before + 1).map(|n| n as usize);
                let Some(change) = number.and_then(|n| changes.get(n)) else {
                    continue;
                };
                if ack.code.is_some() && !done_already(change, &ack.to_io()) && first.is_none() {
                    first = Some(Error::system("change", describe(change), ack.to_io()));
                }
                if sequence == self.sequence {
                    return first.map_or(Ok(()), Err);
                }
            }
        }
    }
}

/// Whether a change failed because things are as it would have them.
fn done_already(change: &Change, cause: &io::Error) -> bool {
    let code = cause.raw_os_error().unwrap_or(0);
    match change {
        Change::Add(_) => code == libc::EEXIST,
        Change::Replace(_) => false,
        // Routes that are gone answer ESRCH.
        Change::Delete(_) => matches!(code, libc::ENOENT | libc::ESRCH | libc::ENODEV),
    }
}

fn describe(change: &Change) -> String {
    let (verb, message) = match change {
        Change::Add(m) => ("add", m),
        Change::Replace(m) => ("replace", m),
        Change::Delete(m) => ("delete", m),
    };
    match message {
        RouteNetlinkMessage::NewRule(r) | RouteNetlinkMessage::DelRule(r) => {
            format!("rule ({verb} {:?})", r.attributes)
        }
        RouteNetlinkMessage::NewRoute(r) | RouteNetlinkMessage::DelRoute(r) => {
            format!("route ({verb} {:?})", r.attributes)
        }
        other => format!("{other:?}"),
    }
}

/// Whose change a message tells of; each comes by itself.
fn author(message: &[u8]) -> Option<u32> {
    let port = message.get(12..16)?;
    port.try_into().ok().map(u32::from_ne_bytes)
}

/// Is any message of these about a link or an address?
fn concerns_interfaces(mut buffer: &[u8]) -> bool {
    const LINKS_AND_ADDRESSES: std::ops::RangeInclusive<u16> = 16..=23;
    while let [a, b, c, d, e, f, ..] = *buffer {
        if LINKS_AND_ADDRESSES.contains(&u16::from_ne_bytes([e, f])) {
            return true;
        }
        let length = u32::from_ne_bytes([a, b, c, d]) as usize;
        let next = length.max(16).next_multiple_of(4).min(buffer.len());
        buffer = &buffer[next..];
    }
    false
}

fn messages(buffer: &[u8]) -> Result<Vec<NetlinkMessage<RouteNetlinkMessage>>> {
    let mut found = Vec::new();
    let mut rest = buffer;
    while rest.len() >= 16 {
        let length = u32::from_ne_bytes([rest[0], rest[1], rest[2], rest[3]]) as usize;
        if length < 16 || length > rest.len() {
            break;
        }
        // A kind this library does not know is no reason to lose the others.
        match NetlinkMessage::<RouteNetlinkMessage>::deserialize(&rest[..length]) {
            Ok(message) => found.push(message),
            Err(error) => tracing::debug!(%error, "netlink message not understood"),
        }
        rest = &rest[length.next_multiple_of(4).min(rest.len())..];
    }
    Ok(found)
}
