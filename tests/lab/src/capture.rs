//! Records what passes an interface, so that a test can say what was seen and, harder, what was not. A capture that may
//! have missed a frame never answers: every question fails when the kernel dropped one.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::Ns;
use crate::packet::{self, Packet};
use crate::packet_socket::PacketSocket;

/// What one capture may hold; a bulk transfer needs another tool.
const MEMORY: usize = 256 * 1024 * 1024;
/// How often the reader looks whether it is to stop.
const TICK: u16 = 20;

/// A running capture. It ends when dropped.
#[derive(Debug)]
pub struct Capture {
    what: String,
    tape: Arc<Mutex<Tape>>,
    stop: Arc<AtomicBool>,
    reader: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Tape {
    /// `None` once stopped.
    socket: Option<PacketSocket>,
    packets: Vec<Packet>,
    bytes: usize,
    drops: u64,
    /// Why the tape can no longer be trusted.
    broken: Option<String>,
}

impl Capture {
    /// Starts recording an interface of a namespace, both directions. Every frame after the return is recorded.
    pub fn start(ns: &Ns, ifname: &str) -> Result<Self> {
        let what = format!("{ifname} in {}", ns.name());
        let index = ns.ifindex(ifname)?;
        let socket = ns
            .inside(|| PacketSocket::open(index))?
            .with_context(|| format!("capturing {what}: needs CAP_NET_RAW and CONFIG_PACKET"))?;
        let waiting = socket
            .as_fd()
            .try_clone_to_owned()
            .context("sharing a capture socket")?;
        let tape = Tape {
            socket: Some(socket),
            packets: Vec::new(),
            bytes: 0,
            drops: 0,
            broken: None,
        };
        let tape = Arc::new(Mutex::new(tape));
        let stop = Arc::new(AtomicBool::new(false));
        let (to_fill, to_stop) = (Arc::clone(&tape), Arc::clone(&stop));
        let reader = std::thread::Builder::new()
            .name(format!("capture {what}"))
            .spawn(move || {
                while !to_stop.load(Ordering::Relaxed) {
                    // A failing poll only means looking more often.
                    let _ready = poll(
                        &mut [PollFd::new(waiting.as_fd(), PollFlags::POLLIN)],
                        PollTimeout::from(TICK),
                    );
                    to_fill
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .fill();
                }
            });
        Ok(Self {
            what,
            tape,
            stop,
            reader: Some(reader.context("starting a capture thread")?),
        })
    }

    /// Starts recording the interface that joins a namespace to the lab, on the node's side: what is seen there did leave
    /// the pod.
    pub fn outside(node: &Ns, pod: &Ns) -> Result<Self> {
        Self::start(node, pod.host_ifname())
    }

    /// Everything seen until now. Fails if any frame was lost.
    pub fn packets(&self) -> Result<Vec<Packet>> {
        self.look(<[Packet]>::to_vec)
    }

    /// Whether a packet was seen. Fails if any frame was lost.
    pub fn any(&self, matches: impl Fn(&Packet) -> bool) -> Result<bool> {
        self.look(|packets| packets.iter().any(&matches))
    }

    /// How many such packets were seen. Fails if any frame was lost.
    pub fn count(&self, matches: impl Fn(&Packet) -> bool) -> Result<usize> {
        self.look(|packets| packets.iter().filter(|packet| matches(packet)).count())
    }

    /// Fails, showing the first such packet, if one was seen or any frame was lost.
    pub fn none(&self, matches: impl Fn(&Packet) -> bool) -> Result<()> {
        let found = self.look(|packets| packets.iter().find(|packet| matches(packet)).cloned())?;
        match found {
            None => Ok(()),
            Some(packet) => bail!("seen on {}: {}", self.what, brief(&packet)),
        }
    }

    /// Waits for a packet. Fails after the timeout, with what was seen instead.
    pub fn wait_for(&self, matches: impl Fn(&Packet) -> bool, timeout: Duration) -> Result<Packet> {
        let started = Instant::now();
        loop {
            if let Some(packet) =
                self.look(|packets| packets.iter().find(|packet| matches(packet)).cloned())?
            {
                return Ok(packet);
            }
            ensure!(
                started.elapsed() < timeout,
                "no such packet on {} within {timeout:?}:\n{}",
                self.what,
                self.describe()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Whether some bytes were carried, in one packet of any protocol or put together from the segments of a TCP stream.
    /// Fails if any frame was lost.
    pub fn contains(&self, needle: &[u8]) -> Result<bool> {
        self.look(|packets| {
            packets.iter().any(|packet| holds(&packet.frame, needle))
                || packet::streams(packets)
                    .iter()
                    .any(|stream| holds(stream, needle))
        })
    }

    /// Whether some bytes were carried by TCP. Fails if any frame was lost.
    pub fn tcp_payload_contains(&self, needle: &[u8]) -> Result<bool> {
        self.look(|packets| {
            packets
                .iter()
                .any(|packet| packet.is_tcp() && holds(&packet.payload, needle))
                || packet::streams(packets)
                    .iter()
                    .any(|stream| holds(stream, needle))
        })
    }

    /// The TCP ports that connections were opened to. Fails if any frame was lost.
    pub fn ports(&self) -> Result<BTreeSet<u16>> {
        self.look(|packets| {
            packets
                .iter()
                .filter(|packet| packet.is_syn())
                .map(|packet| packet.dst.port())
                .collect()
        })
    }

    /// The ends of all TCP connections that were opened. Fails if any frame was lost.
    pub fn connections(&self) -> Result<BTreeSet<(SocketAddr, SocketAddr)>> {
        self.look(|packets| {
            packets
                .iter()
                .filter(|p| p.is_syn())
                .map(|p| (p.src, p.dst))
                .collect()
        })
    }

    /// Forgets what was seen until now. Frames that were lost stay lost.
    pub fn clear(&self) {
        let mut tape = self.lock();
        tape.fill();
        tape.packets.clear();
        tape.bytes = 0;
    }

    /// Stops recording; what was seen can still be asked for.
    pub fn stop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(reader) = self.reader.take() {
            // It ends by itself and holds nothing that could fail.
            let _ended = reader.join();
        }
        let mut tape = self.lock();
        tape.fill();
        tape.socket = None;
    }

    /// Writes what was seen as a pcap file.
    pub fn write_pcap(&self, path: &Path) -> Result<()> {
        self.look(|packets| write_pcap(path, packets))?
            .with_context(|| format!("writing {}", path.display()))
    }

    /// One line for each packet, for messages.
    pub fn describe(&self) -> String {
        match self.packets() {
            Ok(packets) => packets.iter().map(|packet| brief(packet) + "\n").collect(),
            Err(error) => format!("{error:#}\n"),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Tape> {
        self.tape.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads what waits in the socket, then asks: no frame that has passed is left out because the reader was slow.
    fn look<T>(&self, ask: impl FnOnce(&[Packet]) -> T) -> Result<T> {
        let mut tape = self.lock();
        tape.fill();
        if let Some(why) = &tape.broken {
            bail!("the capture of {} is of no use: {why}", self.what);
        }
        ensure!(
            tape.drops == 0,
            "the capture of {} is of no use: the kernel dropped {} frames",
            self.what,
            tape.drops
        );
        Ok(ask(&tape.packets))
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Tape {
    fn fill(&mut self) {
        while self.broken.is_none() {
            let Some(socket) = &mut self.socket else {
                return;
            };
            match socket.next() {
                Ok(Some((outgoing, frame))) => {
                    self.bytes += frame.len();
                    self.packets
                        .push(Packet::parse(SystemTime::now(), outgoing, frame));
                    if self.bytes > MEMORY {
                        self.broken = Some(format!("more than {MEMORY} bytes were captured"));
                    }
                }
                Ok(None) => break,
                Err(error) => self.broken = Some(format!("reading frames: {error}")),
            }
        }
        match self.socket.as_ref().map(PacketSocket::drops) {
            Some(Ok(drops)) => self.drops += u64::from(drops),
            Some(Err(error)) => self.broken = Some(format!("asking for dropped frames: {error}")),
            None => {}
        }
    }
}

fn holds(bytes: &[u8], needle: &[u8]) -> bool {
    !needle.is_empty() && bytes.windows(needle.len()).any(|window| window == needle)
}

fn brief(packet: &Packet) -> String {
    let way = if packet.outgoing { "out" } else { "in" };
    let text: String = String::from_utf8_lossy(
        packet
            .payload
            .get(..packet.payload.len().min(40))
            .unwrap_or_default(),
    )
    .escape_debug()
    .collect();
    let (protocol, flags, length) = (packet.protocol, packet.flags.0, packet.payload.len());
    format!(
        "{way} {protocol:?} {} -> {} flags {flags:#04x} {length} bytes {text:?}",
        packet.src, packet.dst
    )
}

fn write_pcap(path: &Path, packets: &[Packet]) -> Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    // Magic for microseconds, version 2.4, zone, accuracy, longest frame, Ethernet.
    for word in [0xa1b2_c3d4u32, 4 << 16 | 2, 0, 0, u32::MAX, 1] {
        file.write_all(&word.to_ne_bytes())?;
    }
    for packet in packets {
        let time = packet.time.duration_since(SystemTime::UNIX_EPOCH)?;
        let length = u32::try_from(packet.frame.len())?;
        for word in [
            u32::try_from(time.as_secs())?,
            time.subsec_micros(),
            length,
            length,
        ] {
            file.write_all(&word.to_ne_bytes())?;
        }
        file.write_all(&packet.frame)?;
    }
    Ok(file.flush()?)
}
