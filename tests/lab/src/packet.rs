//! One captured frame, taken apart as far as tests ask: addresses, ports, TCP flags, payload. Pure: reads no socket.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::SystemTime;

const ETHERNET_HEADER: usize = 14;
const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;

/// What a packet carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP or ICMPv6.
    Icmp,
    /// Another protocol over IP, by number.
    Other(u8),
    /// No IP at all, such as ARP, or a frame too short for what it claims to be.
    NotIp,
}

/// The flags of a TCP segment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TcpFlags(pub u8);

impl TcpFlags {
    /// Whether FIN is set.
    pub fn fin(self) -> bool {
        self.0 & 0x01 != 0
    }
    /// Whether SYN is set.
    pub fn syn(self) -> bool {
        self.0 & 0x02 != 0
    }
    /// Whether RST is set.
    pub fn rst(self) -> bool {
        self.0 & 0x04 != 0
    }
    /// Whether ACK is set.
    pub fn ack(self) -> bool {
        self.0 & 0x10 != 0
    }
}

/// A captured frame.
#[derive(Debug, Clone)]
pub struct Packet {
    /// When it was read, a moment after it was sent or received.
    pub time: SystemTime,
    /// Whether the interface sent it (on `lo` each packet is seen twice, once each way).
    pub outgoing: bool,
    /// What it carries.
    pub protocol: Protocol,
    /// Sender; port 0 where the protocol has none, unspecified when it is not IP.
    pub src: SocketAddr,
    /// Receiver, likewise.
    pub dst: SocketAddr,
    /// TCP's flags.
    pub flags: TcpFlags,
    /// TCP's sequence number.
    pub seq: u32,
    /// TCP's acknowledgement number.
    pub ack: u32,
    /// Whether there is an IPv6 routing header.
    pub routing_header: bool,
    /// What TCP or UDP carries; else what follows the IP header.
    pub payload: Vec<u8>,
    /// The whole frame.
    pub frame: Vec<u8>,
}

impl Packet {
    /// Takes an Ethernet frame apart. Whatever is cut short or unknown is kept as `NotIp` or without ports.
    pub fn parse(time: SystemTime, outgoing: bool, frame: Vec<u8>) -> Self {
        let nowhere = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0);
        let mut packet = Self {
            time,
            outgoing,
            protocol: Protocol::NotIp,
            src: nowhere,
            dst: nowhere,
            flags: TcpFlags::default(),
            seq: 0,
            ack: 0,
            routing_header: false,
            payload: Vec::new(),
            frame,
        };
        let frame = std::mem::take(&mut packet.frame);
        // What could not be read in full stays as it is.
        let _cut_short = packet.read_ethernet(&frame);
        packet.frame = frame;
        packet
    }

    /// Whether it is a TCP segment.
    pub fn is_tcp(&self) -> bool {
        self.protocol == Protocol::Tcp
    }

    /// Whether it opens a TCP connection.
    pub fn is_syn(&self) -> bool {
        self.is_tcp() && self.flags.syn() && !self.flags.ack()
    }

    /// Whether either end has this port.
    pub fn has_port(&self, port: u16) -> bool {
        self.src.port() == port || self.dst.port() == port
    }

    fn read_ethernet(&mut self, frame: &[u8]) -> Option<()> {
        let rest = frame.get(ETHERNET_HEADER..)?;
        match be16(frame, 12)? {
            ETHERTYPE_IPV4 => self.read_ipv4(rest),
            ETHERTYPE_IPV6 => self.read_ipv6(rest),
            _ => None,
        }
    }

    fn read_ipv4(&mut self, ip: &[u8]) -> Option<()> {
        let header = usize::from(ip.first()? & 0x0f) * 4;
        let src: [u8; 4] = ip.get(12..16)?.try_into().ok()?;
        let dst: [u8; 4] = ip.get(16..20)?.try_into().ok()?;
        // The length in the header leaves out the padding of short frames; it is 0 in segments of 64 KiB and more.
        let total = match usize::from(be16(ip, 2)?) {
            0 => ip.len(),
            total => total.min(ip.len()),
        };
        let fragment = be16(ip, 6)? & 0x1fff != 0;
        self.set_ends(src.into(), dst.into());
        self.read_transport(*ip.get(9)?, fragment, ip.get(header..total)?)
    }

    fn read_ipv6(&mut self, ip: &[u8]) -> Option<()> {
        let src: [u8; 16] = ip.get(8..24)?.try_into().ok()?;
        let dst: [u8; 16] = ip.get(24..40)?.try_into().ok()?;
        let total = match usize::from(be16(ip, 4)?) {
            0 => ip.len(),
            payload => (payload + 40).min(ip.len()),
        };
        self.set_ends(Ipv6Addr::from(src).into(), Ipv6Addr::from(dst).into());
        let mut next = *ip.get(6)?;
        let mut rest = ip.get(40..total)?;
        let mut fragment = false;
        loop {
            let length = match next {
                // Hop-by-hop options, routing, destination options.
                0 | 43 | 60 => (usize::from(*rest.get(1)?) + 1) * 8,
                44 => {
                    fragment |= be16(rest, 2)? & 0xfff8 != 0;
                    8
                }
                _ => break,
            };
            self.routing_header |= next == 43;
            next = *rest.first()?;
            rest = rest.get(length..)?;
        }
        self.read_transport(next, fragment, rest)
    }

    fn set_ends(&mut self, src: IpAddr, dst: IpAddr) {
        self.src.set_ip(src);
        self.dst.set_ip(dst);
    }

    fn read_transport(&mut self, protocol: u8, fragment: bool, rest: &[u8]) -> Option<()> {
        self.protocol = match protocol {
            6 => Protocol::Tcp,
            17 => Protocol::Udp,
            1 | 58 => Protocol::Icmp,
            other => Protocol::Other(other),
        };
        self.payload = rest.to_vec();
        let header = match self.protocol {
            Protocol::Tcp | Protocol::Udp if fragment => return Some(()),
            Protocol::Tcp => {
                self.seq = be32(rest, 4)?;
                self.ack = be32(rest, 8)?;
                self.flags = TcpFlags(*rest.get(13)?);
                usize::from(rest.get(12)? >> 4) * 4
            }
            Protocol::Udp => 8,
            _ => return Some(()),
        };
        self.src.set_port(be16(rest, 0)?);
        self.dst.set_port(be16(rest, 2)?);
        self.payload = rest.get(header..)?.to_vec();
        Some(())
    }
}

/// The bytes of each TCP stream direction put together in order, whatever was repeated or overtaken; a gap starts a new
/// piece. So a needle is found although it was cut in two.
pub(crate) fn streams(packets: &[Packet]) -> Vec<Vec<u8>> {
    type Flow = (SocketAddr, SocketAddr);
    let mut flows: BTreeMap<Flow, (u32, BTreeMap<u32, &[u8]>)> = BTreeMap::new();
    for packet in packets.iter().filter(|packet| packet.is_tcp()) {
        let flow = flows
            .entry((packet.src, packet.dst))
            .or_insert((packet.seq, BTreeMap::new()));
        // A new SYN on the same four-tuple is another connection: it starts elsewhere in the number space, and is kept
        // apart by its distance.
        let offset = packet.seq.wrapping_sub(flow.0).wrapping_add(1 << 31);
        if !packet.payload.is_empty() {
            let longest = flow.1.entry(offset).or_insert(&packet.payload);
            if packet.payload.len() > longest.len() {
                *longest = &packet.payload;
            }
        }
    }
    flows
        .into_values()
        .flat_map(|(_, segments)| stitch(&segments))
        .collect()
}

fn stitch(segments: &BTreeMap<u32, &[u8]>) -> Vec<Vec<u8>> {
    let mut pieces: Vec<Vec<u8>> = Vec::new();
    let mut end = 0u64;
    for (&start, bytes) in segments {
        let start = u64::from(start);
        let stop = start + bytes.len() as u64;
        match pieces.last_mut() {
            Some(piece) if start <= end => {
                let known = usize::try_from(end - start).unwrap_or(usize::MAX);
                piece.extend_from_slice(bytes.get(known..).unwrap_or_default());
            }
            _ => pieces.push(bytes.to_vec()),
        }
        end = end.max(stop);
    }
    pieces
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(seq: u32, payload: &[u8]) -> Vec<u8> {
        let mut segment = vec![0x1f, 0x90, 0x00, 0x50];
        segment.extend(seq.to_be_bytes());
        segment.extend(7u32.to_be_bytes());
        segment.extend([0x50, 0x12, 0, 0, 0, 0, 0, 0]);
        segment.extend(payload);
        segment
    }

    fn ipv4(protocol: u8, rest: &[u8], padding: usize) -> Packet {
        let mut frame = vec![0; 12];
        frame.extend([0x08, 0x00, 0x45, 0]);
        frame.extend(u16::try_from(20 + rest.len()).unwrap().to_be_bytes());
        frame.extend([0, 0, 0, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        frame.extend(rest);
        frame.extend(vec![0; padding]);
        Packet::parse(SystemTime::UNIX_EPOCH, false, frame)
    }

    #[test]
    fn ipv4_tcp_is_read_without_padding() {
        let packet = ipv4(6, &tcp(5, b"hello"), 9);
        assert_eq!(packet.src, "10.0.0.1:8080".parse().unwrap());
        assert_eq!(packet.dst, "10.0.0.2:80".parse().unwrap());
        assert_eq!((packet.seq, packet.ack), (5, 7));
        assert!(packet.flags.syn() && packet.flags.ack() && !packet.is_syn());
        assert_eq!(packet.payload, b"hello");
    }

    #[test]
    fn ipv6_headers_are_skipped_up_to_tcp() {
        let segment = tcp(1, b"x");
        let mut frame = vec![0; 12];
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        frame.extend(u16::try_from(24 + segment.len()).unwrap().to_be_bytes());
        frame.extend([43, 64]);
        frame.extend(Ipv6Addr::LOCALHOST.octets());
        frame.extend(Ipv6Addr::LOCALHOST.octets());
        frame.extend([6, 2, 0, 1, 0, 0, 0, 0]);
        frame.extend([0; 16]);
        frame.extend(segment);
        let packet = Packet::parse(SystemTime::UNIX_EPOCH, true, frame);
        assert!(packet.is_tcp() && packet.routing_header && packet.outgoing);
        assert_eq!(packet.dst, "[::1]:80".parse().unwrap());
        assert_eq!(packet.payload, b"x");
    }

    #[test]
    fn cut_frames_are_no_error() {
        let whole = ipv4(6, &tcp(5, b"hello"), 0).frame;
        for length in 0..whole.len() {
            let _parsed = Packet::parse(SystemTime::UNIX_EPOCH, false, whole[..length].to_vec());
        }
    }

    #[test]
    fn streams_are_put_together_in_order() {
        let packets: Vec<_> = [(10, "cd"), (8, "ab"), (8, "ab"), (11, "def"), (20, "gap")]
            .iter()
            .map(|(seq, text)| ipv4(6, &tcp(*seq, text.as_bytes()), 0))
            .collect();
        assert_eq!(streams(&packets), [b"abcdef".to_vec(), b"gap".to_vec()]);
    }
}
