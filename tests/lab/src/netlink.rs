//! A blocking rtnetlink socket: requests with their acknowledgement, and dumps. It belongs to the namespace it was opened
//! in for good, so its users need not enter that namespace. Says nothing about what is asked.

use std::fmt::Debug;
use std::sync::Mutex;

use anyhow::{Context, Result, bail};
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkMessage,
    NetlinkPayload, NetlinkSerializable,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

/// One rtnetlink socket; requests from several threads take turns.
#[derive(Debug)]
pub(crate) struct Netlink {
    socket: Mutex<Socket>,
}

impl Netlink {
    /// Opens a socket in the calling thread's network namespace.
    pub(crate) fn open() -> Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE).context("opening an rtnetlink socket")?;
        socket.bind_auto().context("binding an rtnetlink socket")?;
        socket
            .connect(&SocketAddr::new(0, 0))
            .context("connecting an rtnetlink socket")?;
        Ok(Self {
            socket: Mutex::new(socket),
        })
    }

    /// Sends a request and waits for its acknowledgement.
    pub(crate) fn request(&self, message: RouteNetlinkMessage, flags: u16) -> Result<()> {
        self.exchange(message, flags | NLM_F_ACK, |_| {})
    }

    /// Asks for one object.
    pub(crate) fn get<T>(
        &self,
        message: RouteNetlinkMessage,
        mut keep: impl FnMut(RouteNetlinkMessage) -> Option<T>,
    ) -> Result<Option<T>> {
        let mut found = None;
        // With an acknowledgement, so that the end of the answer is seen.
        self.exchange(message, NLM_F_ACK, |answer| found = keep(answer))?;
        Ok(found)
    }

    /// Dumps what `message` asks for.
    pub(crate) fn dump<T>(
        &self,
        message: RouteNetlinkMessage,
        mut keep: impl FnMut(RouteNetlinkMessage) -> Option<T>,
    ) -> Result<Vec<T>> {
        let mut found = Vec::new();
        self.exchange(message, NLM_F_DUMP, |answer| found.extend(keep(answer)))?;
        Ok(found)
    }

    fn exchange(
        &self,
        message: RouteNetlinkMessage,
        flags: u16,
        mut each: impl FnMut(RouteNetlinkMessage),
    ) -> Result<()> {
        let socket = self
            .socket
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        send(&socket, message, flags | NLM_F_REQUEST)?;
        loop {
            let (buffer, _) = socket
                .recv_from_full()
                .context("receiving from rtnetlink")?;
            let mut rest = buffer.as_slice();
            while !rest.is_empty() {
                let answer: NetlinkMessage<RouteNetlinkMessage> = parse(rest)?;
                let length = usize::try_from(answer.header.length)
                    .unwrap_or(usize::MAX)
                    .next_multiple_of(4);
                rest = rest.get(length..).unwrap_or_default();
                match answer.payload {
                    NetlinkPayload::InnerMessage(inner) => each(inner),
                    NetlinkPayload::Error(error) if error.code.is_some() => {
                        return Err(error.to_io().into());
                    }
                    NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => return Ok(()),
                    NetlinkPayload::Noop => {}
                    other => bail!("rtnetlink answered with {other:?}"),
                }
            }
        }
    }
}

fn send(socket: &Socket, message: RouteNetlinkMessage, flags: u16) -> Result<()> {
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    header.sequence_number = 1;
    let mut packet = NetlinkMessage::new(header, NetlinkPayload::from(message));
    packet.finalize();
    socket
        .send(&serialise(&packet), 0)
        .context("sending to rtnetlink")?;
    Ok(())
}

fn serialise<T: NetlinkSerializable + Debug>(packet: &NetlinkMessage<T>) -> Vec<u8> {
    let mut buffer = vec![0; packet.buffer_len()];
    packet.serialize(&mut buffer);
    buffer
}

fn parse<T: NetlinkDeserializable>(bytes: &[u8]) -> Result<NetlinkMessage<T>> {
    NetlinkMessage::deserialize(bytes).context("reading an rtnetlink answer")
}
