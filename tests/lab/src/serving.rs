//! What a server does with those who come: answers them and writes down who they were. How it listens is in `server`.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::Socket;

/// What of one connection is remembered; more is counted only.
const REMEMBERED: usize = 64 * 1024;
/// How often the listener looks whether it is to stop.
const TICK: u16 = 50;
/// What a server does with a connection.
#[derive(Debug, Clone)]
pub(crate) enum Service {
    /// Send everything back.
    Echo,
    /// Read and be silent.
    Sink,
    /// Say this first, then send everything back.
    Greet(Vec<u8>),
    /// Accept nothing: connections wait in the queue.
    Deaf,
}

/// What is known of one connection.
#[derive(Debug, Clone)]
pub struct Connection {
    /// Who came.
    pub peer: SocketAddr,
    /// The address they came to.
    pub local: SocketAddr,
    /// The first 64 KiB of what they said.
    pub received: Vec<u8>,
    /// How many bytes they said.
    pub bytes: u64,
    /// Whether it has ended.
    pub closed: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Log {
    pub(crate) connections: Mutex<Vec<Connection>>,
    streams: Mutex<Vec<Arc<TcpStream>>>,
    pub(crate) changed: Condvar,
    pub(crate) stop: AtomicBool,
}

pub(crate) fn accept_all(listener: &Socket, log: &Arc<Log>, service: &Service) {
    let mut threads: Vec<JoinHandle<()>> = Vec::new();
    // Waiting is done by poll, so that stopping does not depend on somebody coming.
    let _poll_tells = listener.set_nonblocking(true);
    while !log.stop.load(Ordering::SeqCst) {
        let mut ready = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        let _ready = poll(&mut ready, PollTimeout::from(TICK));
        while let Ok((socket, peer)) = listener.accept() {
            let stream: TcpStream = socket.into();
            let _blocking = stream.set_nonblocking(false);
            let (Some(peer), Ok(local)) = (peer.as_socket(), stream.local_addr()) else {
                continue;
            };
            let stream = Arc::new(stream);
            let number = log.begin(&stream, peer, local);
            let (log, service) = (Arc::clone(log), service.clone());
            let talk = move || {
                // An error ends the conversation, which is what the log then says.
                let _cut = converse(&stream, &log, number, &service);
                // The log still holds the socket: without this the other side would wait for our end of it.
                let _gone = stream.shutdown(Shutdown::Both);
                log.update(number, |connection| connection.closed = true);
            };
            threads.extend(
                std::thread::Builder::new()
                    .name("connection".into())
                    .spawn(talk)
                    .ok(),
            );
            threads.retain(|thread| !thread.is_finished());
        }
    }
    for stream in log
        .streams
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .drain(..)
    {
        let _gone = stream.shutdown(Shutdown::Both);
    }
    for thread in threads {
        let _ended = thread.join();
    }
}

fn converse(
    mut stream: &TcpStream,
    log: &Log,
    number: usize,
    service: &Service,
) -> std::io::Result<()> {
    if let Service::Greet(words) = service {
        stream.write_all(words)?;
    }
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let length = stream.read(&mut buffer)?;
        let Some(bytes) = buffer.get(..length).filter(|bytes| !bytes.is_empty()) else {
            return Ok(());
        };
        log.update(number, |connection| {
            let room = REMEMBERED
                .saturating_sub(connection.received.len())
                .min(length);
            connection
                .received
                .extend_from_slice(bytes.get(..room).unwrap_or_default());
            connection.bytes += length as u64;
        });
        if !matches!(service, Service::Sink) {
            stream.write_all(bytes)?;
        }
    }
}

impl Log {
    fn begin(&self, stream: &Arc<TcpStream>, peer: SocketAddr, local: SocketAddr) -> usize {
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        // Those that only the log still holds have ended; they must not hold their sockets open.
        streams.retain(|stream| Arc::strong_count(stream) > 1);
        streams.push(Arc::clone(stream));
        let mut connections = self
            .connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        connections.push(Connection {
            peer,
            local,
            received: Vec::new(),
            bytes: 0,
            closed: false,
        });
        self.changed.notify_all();
        connections.len() - 1
    }

    fn update(&self, number: usize, change: impl FnOnce(&mut Connection)) {
        let mut connections = self
            .connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(connection) = connections.get_mut(number) {
            change(connection);
        }
        self.changed.notify_all();
    }
}
