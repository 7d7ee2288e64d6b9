//! DNS as tests need it: questions and answers by hand, and a resolver that remembers who asked. Knows nothing of capture.

use std::collections::BTreeMap;
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use culvert_lab::Ns;

/// How long a client waits for one answer.
pub const PATIENCE: Duration = Duration::from_secs(5);
const A: u16 = 1;
const AAAA: u16 = 28;
const HEADER: usize = 12;

/// A question for the IPv4 addresses of a name.
pub fn question(id: u16, name: &str) -> Vec<u8> {
    let mut message = id.to_be_bytes().to_vec();
    // Recursion desired, one question.
    message.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.trim_end_matches('.').split('.') {
        message.push(u8::try_from(label.len()).unwrap_or(0));
        message.extend(label.bytes());
    }
    message.push(0);
    message.extend([0, 1, 0, 1]);
    message
}

/// Where the question section ends.
fn end_of_question(message: &[u8]) -> Option<usize> {
    let mut at = HEADER;
    loop {
        let length = usize::from(*message.get(at)?);
        at += 1 + length;
        if length == 0 {
            return Some(at + 4);
        }
    }
}

/// The answer to any question with these addresses; of a family there is none for, empty.
fn answer(question: &[u8], v4: Ipv4Addr, v6: Ipv6Addr) -> Option<Vec<u8>> {
    let end = end_of_question(question)?;
    let kind = u16::from_be_bytes([*question.get(end - 4)?, *question.get(end - 3)?]);
    let data = match kind {
        A => v4.octets().to_vec(),
        AAAA => v6.octets().to_vec(),
        _ => Vec::new(),
    };
    let mut message = question.get(..end)?.to_vec();
    // An answer, recursion available; no additional records.
    message[2] = 0x81;
    message[3] = 0x80;
    message[8..12].fill(0);
    message[7] = u8::from(!data.is_empty());
    if !data.is_empty() {
        message.extend([0xc0, 12]);
        message.extend(kind.to_be_bytes());
        // Class, time to live, length.
        message.extend([0, 1, 0, 0, 0, 5]);
        message.extend(u16::try_from(data.len()).ok()?.to_be_bytes());
        message.extend(data);
    }
    Some(message)
}

/// Identifier and last IPv4 address of an answer.
pub fn parse(message: &[u8]) -> Result<(u16, Ipv4Addr)> {
    ensure!(message.len() > HEADER, "no DNS message: {message:?}");
    ensure!(message[2] & 0x80 != 0, "no answer: {message:?}");
    ensure!(message[3] & 0xf == 0, "refused: {message:?}");
    ensure!(message[7] > 0, "an empty answer: {message:?}");
    let end = end_of_question(message).context("a cut answer")?;
    let data = message.get(end + 12..end + 16).context("a cut answer")?;
    let id = u16::from_be_bytes([message[0], message[1]]);
    Ok((id, Ipv4Addr::new(data[0], data[1], data[2], data[3])))
}

/// A resolver on one address, over UDP and TCP, that answers every question alike.
#[derive(Debug)]
pub struct Resolver {
    addr: SocketAddr,
    state: Arc<State>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct State {
    stop: AtomicBool,
    asked: Mutex<BTreeMap<(&'static str, IpAddr), usize>>,
}

impl State {
    fn note(&self, via: &'static str, from: IpAddr) {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        *asked.entry((via, from.to_canonical())).or_default() += 1;
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }
}

impl Resolver {
    /// Answers with `v4` (and an IPv6 address that says the same) from the return on.
    pub fn start(ns: &Ns, ip: IpAddr, v4: Ipv4Addr) -> Result<Self> {
        let addr = SocketAddr::new(ip, 53);
        let v6 = v4.to_ipv6_compatible();
        let state = Arc::new(State::default());
        let mut threads = Vec::new();
        ns.run(|| -> Result<()> {
            let udp = UdpSocket::bind(addr).with_context(|| format!("binding {addr}"))?;
            udp.set_read_timeout(Some(Duration::from_millis(50)))?;
            let tcp = TcpListener::bind(addr).with_context(|| format!("listening on {addr}"))?;
            tcp.set_nonblocking(true)?;
            let (one, two) = (state.clone(), state.clone());
            let spawn = std::thread::Builder::new;
            threads.push(spawn().spawn(move || serve_udp(&udp, &one, v4, v6))?);
            threads.push(spawn().spawn(move || serve_tcp(&tcp, &two, v4, v6))?);
            Ok(())
        })?;
        Ok(Self {
            addr,
            state,
            threads,
        })
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// How many questions came from an address, over "udp" or "tcp".
    pub fn asked(&self, via: &'static str, from: IpAddr) -> usize {
        let asked = self
            .state
            .asked
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        asked.get(&(via, from)).copied().unwrap_or(0)
    }

    /// All questions.
    pub fn total(&self) -> usize {
        let asked = self
            .state
            .asked
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        asked.values().sum()
    }
}

impl Drop for Resolver {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            let _ended = thread.join();
        }
    }
}

fn serve_udp(socket: &UdpSocket, state: &State, v4: Ipv4Addr, v6: Ipv6Addr) {
    let mut buffer = [0; 4096];
    while !state.stopped() {
        let Ok((n, from)) = socket.recv_from(&mut buffer) else {
            continue;
        };
        state.note("udp", from.ip());
        if let Some(message) = answer(&buffer[..n], v4, v6) {
            // A client that is gone asks no more.
            let _sent = socket.send_to(&message, from);
        }
    }
}

fn serve_tcp(listener: &TcpListener, state: &State, v4: Ipv4Addr, v6: Ipv6Addr) {
    while !state.stopped() {
        let Ok((mut stream, from)) = listener.accept() else {
            std::thread::sleep(Duration::from_millis(5));
            continue;
        };
        let mut serve = || -> io::Result<()> {
            stream.set_nonblocking(false)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            let mut length = [0; 2];
            while stream.read_exact(&mut length).is_ok() {
                let mut query = vec![0; u16::from_be_bytes(length).into()];
                stream.read_exact(&mut query)?;
                state.note("tcp", from.ip());
                let message = answer(&query, v4, v6).unwrap_or_default();
                let length = u16::try_from(message.len()).unwrap_or(0).to_be_bytes();
                stream.write_all(&[&length, message.as_slice()].concat())?;
            }
            Ok(())
        };
        // What one client meets is no matter of the next.
        let _ended = serve();
    }
}

/// Asks over a connected socket, and checks that the answer's source and the peer are the resolver that was asked.
pub fn ask_connected(ns: &Ns, resolver: SocketAddr, name: &str) -> Result<Ipv4Addr> {
    ns.run(|| ask_connected_here(resolver, name))
}

/// As `ask_connected`, in the calling thread's namespace.
pub fn ask_connected_here(resolver: SocketAddr, name: &str) -> Result<Ipv4Addr> {
    let socket = bound(resolver)?;
    socket.connect(resolver)?;
    let peer = socket.peer_addr()?;
    ensure!(same(peer, resolver), "the peer is {peer}, not {resolver}");
    socket.send(&question(7, name))?;
    let (from, answer) = receive(&socket)?;
    ensure!(same(from, resolver), "{from} answered, not {resolver}");
    Ok(answer.1)
}

/// Asks over an unconnected socket, and checks the answer's source.
pub fn ask(ns: &Ns, resolver: SocketAddr, name: &str) -> Result<Ipv4Addr> {
    ns.run(|| ask_here(resolver, name))
}

/// As `ask`, in the calling thread's namespace.
pub fn ask_here(resolver: SocketAddr, name: &str) -> Result<Ipv4Addr> {
    let socket = bound(resolver)?;
    socket.send_to(&question(8, name), resolver)?;
    let (from, answer) = receive(&socket)?;
    ensure!(same(from, resolver), "{from} answered, not {resolver}");
    Ok(answer.1)
}

/// Asks over TCP.
pub fn ask_tcp(ns: &Ns, resolver: SocketAddr, name: &str) -> Result<Ipv4Addr> {
    let mut stream = culvert_lab::connect(ns, resolver, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let query = question(9, name);
    let length = u16::try_from(query.len())?.to_be_bytes();
    stream.write_all(&[&length, query.as_slice()].concat())?;
    let mut length = [0; 2];
    stream.read_exact(&mut length).context("no answer")?;
    let mut answer = vec![0; u16::from_be_bytes(length).into()];
    stream.read_exact(&mut answer).context("a cut answer")?;
    Ok(parse(&answer)?.1)
}

/// A socket of the resolver's family, bound to no address.
pub fn bound(resolver: SocketAddr) -> Result<UdpSocket> {
    let any: IpAddr = if resolver.is_ipv4() {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    let socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

/// One answer and who it is from.
pub fn receive(socket: &UdpSocket) -> Result<(SocketAddr, (u16, Ipv4Addr))> {
    let mut buffer = [0; 4096];
    let (n, from) = socket.recv_from(&mut buffer).context("no answer")?;
    Ok((from, parse(&buffer[..n])?))
}

/// The same address and port, however written.
pub fn same(one: SocketAddr, other: SocketAddr) -> bool {
    one.ip().to_canonical() == other.ip().to_canonical() && one.port() == other.port()
}
