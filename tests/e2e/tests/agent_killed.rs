//! `kill -9`, again and again, under a stream of new connections: of the agent, of ztunnel, of both. No plaintext byte on
//! the wire; with the agent alone no connection lost; and afterwards everything is whole by itself.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use culvert_e2e::{LONG, eventually, governed::Governed};
use culvert_lab::{Capture, Family, Ns, Server, Ztunnel};

/// New connections a second, all workers together.
const RATE: u32 = 500;
/// Connections are made in parallel by this many.
const WORKERS: u32 = 4;
/// What is said on each of them, and must not be seen on the wire.
const SECRET: &[u8] = b"in plain sight";
/// Pause between two kills.
const PAUSE: Duration = Duration::from_millis(200);

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
fn under_load(
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

fn whole(node: &Governed, pods: [&Ns; 2]) -> Result<()> {
    for pod in pods {
        node.expect_state(pod, "enrolled")?;
        eventually("the pod is whole", || Ok(node.show(pod)?["whole"] == true))?;
    }
    Ok(())
}

fn kill_agent(node: &mut Governed) -> Result<()> {
    node.agent()?.kill()?;
    node.agent = Some(node.options.launch(&node.lab)?);
    std::thread::sleep(PAUSE);
    Ok(())
}

fn kill_ztunnel(node: &mut Governed) -> Result<()> {
    node.ztunnel()?.kill()?;
    node.ztunnel = Some(Ztunnel::launch_at(
        &node.lab,
        &node.options.zds(),
        &node.peers,
    )?);
    // Time to be told of the pods and to carry something, else nothing is ever there to be killed.
    std::thread::sleep(5 * PAUSE);
    Ok(())
}

#[test]
fn an_agent_that_is_killed_costs_no_connection() -> Result<()> {
    let (mut node, [a, b]) = Governed::meshed("agent-kill", ["a", "b"])?;
    let (_, lost) = under_load(&mut node, [&a, &b], Duration::from_secs(60), kill_agent)?;
    ensure!(lost == 0, "{lost} connections were lost");
    node.agent()?.kill()?;
    node.start_agent()?;
    whole(&node, [&a, &b])
}

#[test]
fn a_ztunnel_that_is_killed_lets_no_plaintext_out() -> Result<()> {
    let (mut node, [a, b]) = Governed::meshed("ztunnel-kill", ["a", "b"])?;
    under_load(&mut node, [&a, &b], Duration::from_secs(20), kill_ztunnel)?;
    whole(&node, [&a, &b])?;
    under_load(&mut node, [&a, &b], Duration::from_secs(1), |_| {
        std::thread::sleep(PAUSE);
        Ok(())
    })
    .map(drop)
}

#[test]
fn both_killed_together_let_no_plaintext_out() -> Result<()> {
    let (mut node, [a, b]) = Governed::meshed("both-kill", ["a", "b"])?;
    under_load(&mut node, [&a, &b], Duration::from_secs(20), |node| {
        kill_agent(node)?;
        kill_ztunnel(node)
    })?;
    node.agent()?.kill()?;
    node.start_agent()?;
    whole(&node, [&a, &b])
}
