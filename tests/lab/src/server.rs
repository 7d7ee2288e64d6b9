//! TCP servers in a namespace that remember who came and what they said. They know nothing of meshes.

use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use socket2::{Domain, Protocol, Socket, Type};

use crate::ns::Place;
use crate::serving::{Log, Service, accept_all};
use crate::{Connection, Creds, Ns};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 1024;

type Hook = Box<dyn Fn(&Socket) -> std::io::Result<()> + Send + Sync>;

/// Options of a server: `Server::builder(&ns, addr).mark(0x7).start()`.
pub struct ServerBuilder {
    ns: Ns,
    addr: SocketAddr,
    service: Service,
    creds: Creds,
    mptcp: bool,
    backlog: i32,
    hooks: Vec<Hook>,
}

impl std::fmt::Debug for ServerBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ServerBuilder({} in {})", self.addr, self.ns.name())
    }
}

impl ServerBuilder {
    /// Reads and never answers.
    pub fn sink(mut self) -> Self {
        self.service = Service::Sink;
        self
    }

    /// Speaks first.
    pub fn greet(mut self, words: &[u8]) -> Self {
        self.service = Service::Greet(words.to_vec());
        self
    }

    /// Listens and accepts nothing.
    pub fn deaf(mut self) -> Self {
        self.service = Service::Deaf;
        self
    }

    /// Listens as somebody.
    pub fn creds(mut self, creds: Creds) -> Self {
        self.creds = creds;
        self
    }

    /// How many connections may wait to be accepted.
    pub fn backlog(mut self, backlog: i32) -> Self {
        self.backlog = backlog;
        self
    }

    /// An MPTCP listener.
    pub fn mptcp(mut self) -> Self {
        self.mptcp = true;
        self
    }

    /// With this `SO_MARK`.
    pub fn mark(self, mark: u32) -> Self {
        self.before_bind(move |socket| socket.set_mark(mark))
    }

    /// Bound to this interface (`SO_BINDTODEVICE`).
    pub fn device(self, ifname: &str) -> Self {
        let ifname = ifname.to_owned();
        self.before_bind(move |socket| socket.bind_device(Some(ifname.as_bytes())))
    }

    /// With `IPV6_V6ONLY` on or off; on is how a server starts, unless its address is v4-mapped.
    pub fn v6only(self, only: bool) -> Self {
        self.before_bind(move |socket| socket.set_only_v6(only))
    }

    /// Sharing its port (`SO_REUSEPORT`).
    pub fn reuse_port(self) -> Self {
        self.before_bind(|socket| socket.set_reuse_port(true))
    }

    /// With TCP fast open for up to 64 waiting connections. The namespace's `tcp_fastopen` sysctl must allow servers (2).
    pub fn fast_open(self) -> Self {
        self.before_bind(|socket| {
            crate::sockopt::set_int(socket.as_fd(), libc::IPPROTO_TCP, libc::TCP_FASTOPEN, 64)
        })
    }

    /// With anything done to the socket before it is bound; the last word is the test's.
    pub fn before_bind(
        mut self,
        hook: impl Fn(&Socket) -> std::io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        self.hooks.push(Box::new(hook));
        self
    }

    /// Listens from the return on.
    pub fn start(self) -> Result<Server> {
        let what = format!("{} in {}", self.addr, self.ns.name());
        let listener = self.ns.run_as(self.creds, || self.listen());
        let listener = listener.with_context(|| format!("listening on {what}"))?;
        let addr = listener
            .local_addr()?
            .as_socket()
            .context("a listener without address")?;
        let log = Arc::new(Log::default());
        let deaf = matches!(self.service, Service::Deaf);
        let listener = Arc::new(listener);
        let thread = if deaf {
            None
        } else {
            Some(self.serve(&listener, &log)?)
        };
        Ok(Server {
            addr,
            what,
            log,
            listener,
            thread,
        })
    }

    fn listen(&self) -> std::io::Result<Socket> {
        let protocol = if self.mptcp {
            Protocol::MPTCP
        } else {
            Protocol::TCP
        };
        let socket = Socket::new(Domain::for_address(self.addr), Type::STREAM, Some(protocol))?;
        socket.set_reuse_address(true)?;
        if let SocketAddr::V6(addr) = self.addr {
            socket.set_only_v6(addr.ip().to_ipv4_mapped().is_none())?;
        }
        for hook in &self.hooks {
            hook(&socket)?;
        }
        socket.bind(&self.addr.into())?;
        socket.listen(self.backlog)?;
        Ok(socket)
    }

    fn serve(self, listener: &Arc<Socket>, log: &Arc<Log>) -> Result<JoinHandle<()>> {
        let (listener, log) = (Arc::clone(listener), Arc::clone(log));
        let (tell, told) = std::sync::mpsc::channel();
        let serve = move || {
            // What is accepted belongs to the listener's namespace and cgroup; the threads are put there all the same.
            let entered = self.ns.enter(Place::Lab);
            let Self { service, ns, .. } = self;
            drop(ns);
            let failed = entered.is_err();
            if tell.send(entered).is_err() || failed {
                return;
            }
            accept_all(&listener, &log, &service);
        };
        let thread = std::thread::Builder::new()
            .name("server".into())
            .spawn(serve)
            .context("starting a thread")?;
        told.recv().context("the server's thread died")??;
        Ok(thread)
    }
}

/// A running server. It stops, and its connections end, when it is dropped.
#[derive(Debug)]
pub struct Server {
    addr: SocketAddr,
    what: String,
    log: Arc<Log>,
    listener: Arc<Socket>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// A server that sends back what it gets. Port 0 takes a free one, see `addr`.
    pub fn echo(ns: &Ns, addr: SocketAddr) -> Result<Self> {
        Self::builder(ns, addr).start()
    }

    /// An echo server with options.
    pub fn builder(ns: &Ns, addr: SocketAddr) -> ServerBuilder {
        let service = Service::Echo;
        let (creds, hooks) = (Creds::Root, Vec::new());
        ServerBuilder {
            ns: ns.clone(),
            addr,
            service,
            creds,
            mptcp: false,
            backlog: BACKLOG,
            hooks,
        }
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Its listening socket.
    pub fn socket(&self) -> &Socket {
        &self.listener
    }

    /// All connections so far, in the order they were accepted.
    pub fn connections(&self) -> Vec<Connection> {
        self.log
            .connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Who came so far.
    pub fn peers(&self) -> Vec<SocketAddr> {
        self.connections()
            .into_iter()
            .map(|connection| connection.peer)
            .collect()
    }

    /// How many came so far.
    pub fn count(&self) -> usize {
        self.log
            .connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .len()
    }

    /// Waits until `ready` says so of the connections, and returns them.
    pub fn wait(
        &self,
        ready: impl Fn(&[Connection]) -> bool,
        timeout: Duration,
    ) -> Result<Vec<Connection>> {
        let started = Instant::now();
        let mut connections = self
            .log
            .connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        while !ready(&connections) {
            let Some(left) = timeout.checked_sub(started.elapsed()) else {
                bail!(
                    "the server {} has not seen what was waited for within {timeout:?}: {connections:?}",
                    self.what
                );
            };
            (connections, _) = self
                .log
                .changed
                .wait_timeout(connections, left)
                .unwrap_or_else(PoisonError::into_inner);
        }
        Ok(connections.clone())
    }

    /// Waits for the first connection.
    pub fn wait_first(&self, timeout: Duration) -> Result<Connection> {
        self.wait(|connections| !connections.is_empty(), timeout)?
            .into_iter()
            .next()
            .context("no connection")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.log.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            // The threads hold nothing that could fail; what they met is in the log.
            let _ended = thread.join();
        }
    }
}
