//! The listener at the end of every way. In a pod it stands where ztunnel's would: port 15001, mark 0x539, port reuse,
//! answering for foreign addresses, asking for the original destination as ztunnel does. It has no way on: what is measured
//! is how traffic gets to it.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use culvert_lab::{Ns, sockopt};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use crate::worker::Thread;

/// ztunnel's port for what pods send.
pub(crate) const PORT: u16 = 15001;
/// ztunnel's mark.
const MARK: u32 = 0x539;
const IPV6_TRANSPARENT: i32 = 75;
/// How the first byte asks for the rest to be swallowed and counted, not echoed.
pub(crate) const SINK: u8 = b'S';
/// Large enough that system calls are not what bulk measures.
pub(crate) const CHUNK: usize = 64 * 1024;

/// What it has seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Seen {
    /// Connections accepted.
    pub(crate) accepted: u64,
    /// Those meant for where they were said to be meant for.
    pub(crate) right: u64,
    /// Those that are over.
    pub(crate) closed: u64,
    /// Bytes taken in sink mode.
    pub(crate) sunk: u64,
}

#[derive(Debug, Default)]
struct Shared {
    accepted: AtomicU64,
    right: AtomicU64,
    closed: AtomicU64,
    sunk: AtomicU64,
    stop: AtomicBool,
    expected: Mutex<Option<SocketAddr>>,
}

/// A running one.
#[derive(Debug)]
pub(crate) struct Proxy {
    shared: Arc<Shared>,
    thread: Thread,
    socket: Socket,
}

impl Proxy {
    /// ztunnel's, in a pod.
    pub(crate) fn ztunnel(ns: &Ns) -> Result<Self> {
        Self::start(ns, PORT, true)
    }

    /// One without mark or anything, for sockets nobody captures.
    pub(crate) fn plain(ns: &Ns, port: u16) -> Result<Self> {
        Self::start(ns, port, false)
    }

    fn start(ns: &Ns, port: u16, ztunnel: bool) -> Result<Self> {
        let socket = ns
            .run(|| listen(port, ztunnel))
            .with_context(|| format!("listening on port {port} in {}", ns.name()))?;
        let shared = Arc::new(Shared::default());
        let (served, accepting) = (Arc::clone(&shared), socket.try_clone()?);
        let thread = Thread::spawn(ns, move || serve(&accepting, &served))?;
        Ok(Self {
            shared,
            thread,
            socket,
        })
    }

    /// Connections from now on are meant for this address.
    pub(crate) fn expect(&self, to: SocketAddr) {
        *self
            .shared
            .expected
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(to);
    }

    pub(crate) fn thread(&self) -> Thread {
        self.thread
    }

    pub(crate) fn seen(&self) -> Seen {
        Seen {
            accepted: self.shared.accepted.load(SeqCst),
            right: self.shared.right.load(SeqCst),
            closed: self.shared.closed.load(SeqCst),
            sunk: self.shared.sunk.load(SeqCst),
        }
    }

    /// What it has seen once no connection is open any more.
    pub(crate) fn settled(&self) -> Result<Seen> {
        let started = Instant::now();
        loop {
            let seen = self.seen();
            if seen.accepted == seen.closed {
                return Ok(seen);
            }
            if started.elapsed() > Duration::from_secs(5) {
                bail!("the listener still has a connection open after 5 s: {seen:?}");
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        // Wakes the thread out of accept; when it has ended already there is nothing to wake.
        let _ended = self.socket.shutdown(std::net::Shutdown::Both);
    }
}

fn listen(port: u16, ztunnel: bool) -> io::Result<Socket> {
    let socket = Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP))?;
    socket.set_only_v6(false)?;
    socket.set_reuse_address(true)?;
    if ztunnel {
        socket.set_mark(MARK)?;
        socket.set_reuse_port(true)?;
        socket.set_ip_transparent_v4(true)?;
        sockopt::set_int(socket.as_fd(), libc::SOL_IPV6, IPV6_TRANSPARENT, 1)?;
    }
    socket.bind(&SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port).into())?;
    socket.listen(1024)?;
    Ok(socket)
}

fn serve(listener: &Socket, shared: &Shared) {
    let mut buffer = vec![0; CHUNK];
    while let Ok((socket, _)) = listener.accept() {
        let stream = TcpStream::from(socket);
        shared.accepted.fetch_add(1, SeqCst);
        let expected = *shared
            .expected
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if expected.is_some() && original(&stream) == expected {
            shared.right.fetch_add(1, SeqCst);
        }
        // A client that goes away in the middle shows in the client's own error.
        let _broken = converse(stream, &mut buffer, shared);
        shared.closed.fetch_add(1, SeqCst);
        if shared.stop.load(SeqCst) {
            break;
        }
    }
}

fn converse(mut stream: TcpStream, buffer: &mut [u8], shared: &Shared) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut first = true;
    loop {
        let length = stream.read(buffer)?;
        let Some(got) = buffer.get(..length).filter(|got| !got.is_empty()) else {
            return Ok(());
        };
        let sink = first && got == [SINK];
        first = false;
        stream.write_all(got)?;
        if sink {
            return swallow(stream, buffer, shared);
        }
    }
}

fn swallow(mut stream: TcpStream, buffer: &mut [u8], shared: &Shared) -> io::Result<()> {
    loop {
        let length = stream.read(buffer)?;
        if length == 0 {
            // The client has its time from the first byte to this one.
            return stream.write_all(&[SINK]);
        }
        shared
            .sunk
            .fetch_add(u64::try_from(length).unwrap_or(0), SeqCst);
    }
}

/// Where the client wanted to go: as NAT remembers it, in both families' ways, or else where the socket is.
fn original(stream: &TcpStream) -> Option<SocketAddr> {
    let socket = SockRef::from(stream);
    let found = socket
        .original_dst_v4()
        .or_else(|_| socket.original_dst_v6())
        .ok()
        .and_then(|addr| addr.as_socket());
    let at = found.or_else(|| stream.local_addr().ok())?;
    Some(SocketAddr::new(unmapped(at.ip()), at.port()))
}

fn unmapped(ip: IpAddr) -> IpAddr {
    ip.to_canonical()
}
