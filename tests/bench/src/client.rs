//! The client, the same for every way: one slice of one measurement, timed, and refused if the listener did not see it.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use crate::proxy::{CHUNK, Proxy, SINK};
use crate::worker::Worker;

/// Untimed connections before a slice, so that each finds warm caches.
const WARM: u64 = 40;
/// Bytes of a request and of a response.
const MESSAGE: usize = 100;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Measure {
    /// Connect, one byte there, one back, close.
    Connect,
    /// Requests and responses on one connection.
    Request,
    /// Bytes one way on one connection.
    Bulk,
}

impl Measure {
    pub(crate) const ALL: [Self; 3] = [Self::Connect, Self::Request, Self::Bulk];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Request => "request/response",
            Self::Bulk => "bulk",
        }
    }

    pub(crate) fn unit(self) -> &'static str {
        match self {
            Self::Connect => "connections/s",
            Self::Request => "requests/s",
            Self::Bulk => "MB/s",
        }
    }

    /// Operations in a slice: some tens of milliseconds, so that a round is over before the machine's mood changes.
    pub(crate) fn slice(self) -> u64 {
        match self {
            Self::Connect => 800,
            Self::Request => 2500,
            Self::Bulk => 96,
        }
    }
}

/// One slice.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slice {
    pub(crate) ops: f64,
    pub(crate) wall: Duration,
    /// Processor time of client and listener together, the kernel's work for them included.
    pub(crate) cpu: Duration,
}

impl Slice {
    pub(crate) fn rate(&self) -> f64 {
        self.ops / self.wall.as_secs_f64()
    }

    /// Microseconds an operation.
    pub(crate) fn cpu_each(&self) -> f64 {
        self.cpu.as_secs_f64() * 1e6 / self.ops
    }
}

/// Runs a slice from a worker towards an address, and fails unless just that many connections, meant for that address,
/// arrived at the listener.
pub(crate) fn slice(
    worker: &Worker,
    proxy: &Proxy,
    to: SocketAddr,
    measure: Measure,
    ops: u64,
) -> Result<Slice> {
    proxy.expect(to);
    let before = proxy.settled()?;
    let cpu = || Ok::<_, anyhow::Error>(worker.thread().cpu()? + proxy.thread().cpu()?);
    worker
        .call(move || connections(to, WARM))?
        .with_context(|| format!("connecting to {to}"))?;
    proxy.settled()?;
    let cpu_before = cpu()?;
    let wall = worker
        .call(move || timed(to, measure, ops))?
        .with_context(|| format!("{} with {to}", measure.name()))?;
    let after = proxy.settled()?;
    let used = cpu()?.saturating_sub(cpu_before);
    let made = WARM + if measure == Measure::Connect { ops } else { 1 };
    let (accepted, right) = (after.accepted - before.accepted, after.right - before.right);
    ensure!(
        accepted == made && right == made,
        "the proxy was not in the path: the client made {made} connections to {to}, the listener accepted {accepted}, \
         {right} of them meant for {to}; no figure is given"
    );
    if measure == Measure::Bulk {
        let (sunk, sent) = (after.sunk - before.sunk, ops << 20);
        ensure!(
            sunk == sent,
            "the client sent {sent} bytes, the listener took {sunk}; no figure is given"
        );
    }
    Ok(Slice {
        ops: f64::from(u32::try_from(ops).context("a slice is short")?),
        wall,
        cpu: used,
    })
}

fn timed(to: SocketAddr, measure: Measure, ops: u64) -> io::Result<Duration> {
    match measure {
        Measure::Connect => {
            let started = Instant::now();
            connections(to, ops)?;
            Ok(started.elapsed())
        }
        Measure::Request => requests(to, ops),
        Measure::Bulk => bulk(&mut sink(to)?, ops),
    }
}

fn connections(to: SocketAddr, count: u64) -> io::Result<()> {
    for _ in 0..count {
        let mut stream = TcpStream::connect(to)?;
        let mut byte = [b'x'];
        stream.write_all(&byte)?;
        stream.read_exact(&mut byte)?;
    }
    Ok(())
}

fn requests(to: SocketAddr, count: u64) -> io::Result<Duration> {
    let mut stream = TcpStream::connect(to)?;
    stream.set_nodelay(true)?;
    let mut message = [b'r'; MESSAGE];
    let started = Instant::now();
    for _ in 0..count {
        stream.write_all(&message)?;
        stream.read_exact(&mut message)?;
    }
    Ok(started.elapsed())
}

/// A connection whose further bytes are swallowed.
pub(crate) fn sink(to: SocketAddr) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect(to)?;
    let mut byte = [SINK];
    stream.write_all(&byte)?;
    stream.read_exact(&mut byte)?;
    Ok(stream)
}

/// Sends megabytes and waits until the listener has them all.
fn bulk(stream: &mut TcpStream, megabytes: u64) -> io::Result<Duration> {
    let started = Instant::now();
    send(stream, megabytes)?;
    stream.shutdown(Shutdown::Write)?;
    stream.read_exact(&mut [0])?;
    Ok(started.elapsed())
}

/// Sends megabytes.
pub(crate) fn send(stream: &mut TcpStream, megabytes: u64) -> io::Result<()> {
    let chunk = vec![0; CHUNK];
    for _ in 0..megabytes * (1024 * 1024 / CHUNK as u64) {
        stream.write_all(&chunk)?;
    }
    Ok(())
}
