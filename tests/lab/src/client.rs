//! TCP clients in a namespace, with every knob a test may want to turn before `connect()`.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{Creds, Ns};

/// How long a conversation may pause before it counts as broken.
const PATIENCE: Duration = Duration::from_secs(10);
/// What is sent before the answer is read; fits into any socket's buffers.
const CHUNK: usize = 16 * 1024;

type Hook<'a> = Box<dyn FnOnce(&Socket) -> io::Result<()> + Send + 'a>;

/// A connection to be made: `Connect::to(addr).from(local).creds(Creds::Nobody).run(&ns)`.
pub struct Connect<'a> {
    to: SocketAddr,
    from: Option<SocketAddr>,
    creds: Creds,
    timeout: Duration,
    mptcp: bool,
    domain: Domain,
    before: Vec<Hook<'a>>,
}

impl std::fmt::Debug for Connect<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Connect({})", self.to)
    }
}

impl<'a> Connect<'a> {
    /// To this address; one of IPv6 with a scope works as well.
    pub fn to(to: SocketAddr) -> Self {
        let domain = Domain::for_address(to);
        Self {
            to,
            from: None,
            creds: Creds::Root,
            timeout: PATIENCE,
            mptcp: false,
            domain,
            before: Vec::new(),
        }
    }

    /// From this address; port 0 leaves the choice to the kernel.
    pub fn from(mut self, from: SocketAddr) -> Self {
        self.from = Some(from);
        self
    }

    /// As somebody.
    pub fn creds(mut self, creds: Creds) -> Self {
        self.creds = creds;
        self
    }

    /// Gives up after this time with `TimedOut`.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// With MPTCP.
    pub fn mptcp(mut self) -> Self {
        self.mptcp = true;
        self
    }

    /// With this `SO_MARK`.
    pub fn mark(self, mark: u32) -> Self {
        self.before(move |socket| socket.set_mark(mark))
    }

    /// Bound to this interface by name (`SO_BINDTODEVICE`).
    pub fn device(self, ifname: &'a str) -> Self {
        self.before(|socket| socket.bind_device(Some(ifname.as_bytes())))
    }

    /// With anything done to the socket after it is bound and before it connects.
    pub fn before(mut self, hook: impl FnOnce(&Socket) -> io::Result<()> + Send + 'a) -> Self {
        self.before.push(Box::new(hook));
        self
    }

    /// Connects and waits until that is done. The error is the kernel's.
    pub fn run(self, ns: &Ns) -> io::Result<TcpStream> {
        let timeout = self.timeout;
        self.start(ns)?.wait(timeout)
    }

    /// Sends the SYN and does not wait.
    pub fn start(self, ns: &Ns) -> io::Result<Connecting> {
        ns.run_as(self.creds, || {
            let to = self.to;
            let socket = self.prepare()?;
            match socket.connect(&to.into()) {
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
                Err(error) => return Err(error),
            }
            Ok(Connecting { socket })
        })
    }

    /// TCP fast open: connects and sends in one call. The first time towards a server fetches a cookie, the second
    /// carries data in the SYN.
    pub fn fast_open(self, ns: &Ns, data: &[u8]) -> io::Result<TcpStream> {
        let timeout = self.timeout;
        let (connecting, sent) = ns.run_as(self.creds, || -> io::Result<_> {
            let to = self.to.into();
            let socket = self.prepare()?;
            let sent = match socket.send_to_with_flags(data, &to, libc::MSG_FASTOPEN) {
                Ok(sent) => sent,
                // No cookie yet: nothing was sent, the SYN asks for one.
                Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => 0,
                Err(error) => return Err(error),
            };
            Ok((Connecting { socket }, sent))
        })?;
        let mut stream = connecting.wait(timeout)?;
        stream.write_all(data.get(sent..).unwrap_or_default())?;
        Ok(stream)
    }

    fn prepare(self) -> io::Result<Socket> {
        let protocol = if self.mptcp {
            Protocol::MPTCP
        } else {
            Protocol::TCP
        };
        let socket = Socket::new(self.domain, Type::STREAM, Some(protocol))?;
        if let Some(from) = self.from {
            socket.set_reuse_address(true)?;
            socket.bind(&from.into())?;
        }
        for hook in self.before {
            hook(&socket)?;
        }
        socket.set_nonblocking(true)?;
        Ok(socket)
    }
}

/// A connection whose SYN is under way.
#[derive(Debug)]
pub struct Connecting {
    socket: Socket,
}

impl Connecting {
    /// The socket, to change its options while the SYN waits.
    pub fn socket(&self) -> &Socket {
        &self.socket
    }

    /// Whether it is settled, one way or the other, within this time.
    pub fn settled(&self, timeout: Duration) -> io::Result<bool> {
        let started = Instant::now();
        loop {
            let left = timeout.saturating_sub(started.elapsed());
            let millis = u16::try_from(left.as_micros().div_ceil(1000)).unwrap_or(u16::MAX);
            let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLOUT)];
            match poll(&mut fds, PollTimeout::from(millis)) {
                Ok(0) if left.is_zero() => return Ok(false),
                Ok(0) | Err(nix::errno::Errno::EINTR) => {}
                Ok(_) => return Ok(true),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Waits for the end of it: a stream in blocking mode that gives up reading after ten seconds, the kernel's error, or
    /// `TimedOut` (without error number, unlike the kernel's).
    pub fn wait(self, timeout: Duration) -> io::Result<TcpStream> {
        if !self.settled(timeout)? {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("not connected within {timeout:?}"),
            ));
        }
        if let Some(error) = self.socket.take_error()? {
            return Err(error);
        }
        self.socket.set_nonblocking(false)?;
        let stream: TcpStream = self.socket.into();
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }
}

/// Connects from a namespace.
pub fn connect(ns: &Ns, to: SocketAddr, timeout: Duration) -> io::Result<TcpStream> {
    Connect::to(to).timeout(timeout).run(ns)
}

/// Sends something to an echo server and reads as much back.
pub fn roundtrip(mut stream: &TcpStream, payload: &[u8]) -> io::Result<Vec<u8>> {
    let mut answer = Vec::with_capacity(payload.len());
    for chunk in payload.chunks(CHUNK) {
        stream.write_all(chunk)?;
        let at = answer.len();
        answer.resize(at + chunk.len(), 0);
        stream.read_exact(answer.get_mut(at..).unwrap_or_default())?;
    }
    Ok(answer)
}
