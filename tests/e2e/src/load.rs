//! A stream of new connections between two governed pods while something is done to the node, and what came of them. No
//! plaintext byte of theirs may be seen on the wire; whether one may be lost is for the test to say.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use culvert_lab::{Capture, Family, Ns, Server};

use crate::{LONG, governed::Governed};

/// New connections a second, all workers together.
const RATE: u32 = 500;
/// Connections are made in parallel by this many.
const WORKERS: u32 = 4;
/// What is said on each of them, and must not be seen on the wire.
pub const SECRET: &[u8] = b"in plain sight";
/// What came of the connections.
#[derive(Default)]
struct Counts {
    made: AtomicU64,
    lost: AtomicU64,
}

fn once(to: SocketAddr) -> std::io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&to, LONG)?;
    stream.set_read_timeout(Some(LONG))?;
    stream.write_all(SECRET)?;
    let mut answer = vec![0; SECRET.len()];
    stream.read_exact(&mut answer)
}

/// Connects from a pod to a server in another, at [`RATE`], until told to stop.
fn stream_of_connections(from: &Ns, to: &[SocketAddr], counts: &Counts, stop: &AtomicBool) {
    std::thread::scope(|scope| {
        for worker in 0..WORKERS {
            let to = to[worker as usize % to.len()];
            scope.spawn(move || {
                from.run(|| {
                    let mut next = Instant::now();
                    while !stop.load(Ordering::Relaxed) {
                        match once(to) {
                            Ok(()) => counts.made.fetch_add(1, Ordering::Relaxed),
                            Err(error) => {
                                eprintln!("lost: {error}");
                                counts.lost.fetch_add(1, Ordering::Relaxed)
                            }
                        };
                        next += Duration::from_secs(1) * WORKERS / RATE;
                        std::thread::sleep(next.saturating_duration_since(Instant::now()));
                    }
                });
            });
        }
    });
}

/// Lets `disturb` do its worst again and again while connections are made; no plaintext may leave. Returns connections
/// made and lost.
pub fn under_load(
    node: &mut Governed,
    [a, b]: [&Ns; 2],
    time: Duration,
    mut disturb: impl FnMut(&mut Governed) -> Result<()>,
) -> Result<(u64, u64)> {
    let servers = [
        Server::echo(b, b.at(Family::V4, 0)?)?,
        Server::echo(b, b.at(Family::V6, 0)?)?,
    ];
    let to: Vec<SocketAddr> = servers.iter().map(Server::addr).collect();
    let wire = Capture::start(node.lab.node(), a.host_ifname())?;
    let (counts, stop) = (Counts::default(), AtomicBool::new(false));
    let disturbed = std::thread::scope(|scope| {
        scope.spawn(|| stream_of_connections(a, &to, &counts, &stop));
        let end = Instant::now() + time;
        let mut disturbed = Ok(());
        while disturbed.is_ok() && Instant::now() < end {
            disturbed = disturb(node);
        }
        stop.store(true, Ordering::Relaxed);
        disturbed
    });
    disturbed?;
    if wire.contains(SECRET)? {
        let told = wire.packets()?.into_iter().filter(|p| {
            p.payload
                .windows(SECRET.len())
                .any(|window| window == SECRET)
        });
        let told: Vec<String> = told
            .take(5)
            .map(|p| {
                format!(
                    "{:?}: {} -> {}, outgoing {}",
                    p.time, p.src, p.dst, p.outgoing
                )
            })
            .collect();
        anyhow::bail!("plaintext on the wire: {}", told.join("; "));
    }
    let (made, lost) = (
        counts.made.load(Ordering::Relaxed),
        counts.lost.load(Ordering::Relaxed),
    );
    eprintln!("{made} connections, {lost} lost, in {time:?}");
    ensure!(made > 0, "no connection was made");
    Ok((made, lost))
}
