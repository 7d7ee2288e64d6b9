//! A stream of new connections between two governed pods while something is done to the node, and what came of them. No
//! plaintext byte of theirs may be seen on the wire; whether one may be lost is for the test to say.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use culvert_lab::{Capture, Family, Ns, Server, Stop};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::{LONG, governed::Governed};

/// New connections a second, whatever has become of those before.
const RATE: u32 = 500;
/// Of these, how many there have to be on average. Two processors on which a dozen other programs want to run reach
/// three quarters.
const SHARE: f64 = 0.5;
/// How many may wait for an answer where each is to get one: no more than a slow machine answers before they give up.
pub const ANSWERED: usize = 256;
/// How many may wait where nobody may be there to answer: each until the kernel asks again, after one second, three, seven.
pub const CUT: usize = 4000;
/// What is said on each of them, and must not be seen on the wire.
pub const SECRET: &[u8] = b"in plain sight";
/// How many of those that are lost are told of.
const TOLD: usize = 5;

#[derive(Default)]
struct Counts {
    begun: AtomicU64,
    made: AtomicU64,
    lost: AtomicU64,
    errors: Mutex<Vec<String>>,
}

impl Counts {
    fn note(&self, result: std::io::Result<()>) {
        let Err(error) = result else {
            self.made.fetch_add(1, Ordering::Relaxed);
            return;
        };
        self.lost.fetch_add(1, Ordering::Relaxed);
        let mut errors = self.errors.lock().unwrap_or_else(PoisonError::into_inner);
        if errors.len() < TOLD {
            errors.push(error.to_string());
        }
    }
}

async fn once(to: SocketAddr) -> std::io::Result<()> {
    let mut stream = timeout(LONG, TcpStream::connect(to)).await??;
    let talk = async {
        stream.write_all(SECRET).await?;
        let mut answer = vec![0; SECRET.len()];
        stream.read_exact(&mut answer).await
    };
    timeout(LONG, talk).await??;
    Ok(())
}

/// Connects from a pod to servers in another, at [`RATE`] as long as no more than so many are waiting, until told to stop.
/// Waits for the last ones.
fn stream_of_connections(
    from: &Ns,
    to: &[SocketAddr],
    waiting: usize,
    counts: &Arc<Counts>,
    stop: &AtomicBool,
) -> Result<()> {
    let connect = async {
        let waiting = Arc::new(Semaphore::new(waiting));
        let mut tick = interval(Duration::from_secs(1) / RATE);
        // A moment without a processor is made up for.
        tick.set_missed_tick_behavior(MissedTickBehavior::Burst);
        let mut running = JoinSet::new();
        for to in to.iter().copied().cycle() {
            tick.tick().await;
            let permit = Arc::clone(&waiting).acquire_owned().await;
            if stop.load(Ordering::SeqCst) {
                break;
            }
            let counts = Arc::clone(counts);
            counts.begun.fetch_add(1, Ordering::Relaxed);
            running.spawn(async move {
                let _permit = permit;
                counts.note(once(to).await);
            });
            while running.try_join_next().is_some() {}
        }
        while running.join_next().await.is_some() {}
    };
    // The thread is the pod's for good, and all sockets are made in it.
    from.run(|| {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("starting a runtime")
            .map(|runtime| runtime.block_on(connect))
    })
}

/// What came of the connections.
#[derive(Debug)]
pub struct Came {
    /// All of them.
    pub begun: u64,
    /// Those whose words came back.
    pub made: u64,
    /// Those that were refused, cut or not answered in time.
    pub lost: u64,
    /// What became of the first of those.
    pub errors: Vec<String>,
}

/// Lets `disturb` do its worst again and again while connections are made, of which so many may wait ([`ANSWERED`], [`CUT`]);
/// no plaintext may leave.
pub fn under_load(
    node: &mut Governed,
    [a, b]: [&Ns; 2],
    waiting: usize,
    time: Duration,
    mut disturb: impl FnMut(&mut Governed) -> Result<()>,
) -> Result<Came> {
    let servers = [
        Server::echo(b, b.at(Family::V4, 0)?)?,
        Server::echo(b, b.at(Family::V6, 0)?)?,
    ];
    let to: Vec<SocketAddr> = servers.iter().map(Server::addr).collect();
    let wire = Capture::start(node.lab.node(), a.host_ifname())?;
    let (counts, stop) = (Arc::<Counts>::default(), AtomicBool::new(false));
    let began = Instant::now();
    let (disturbed, took) = std::thread::scope(|scope| {
        let at_the_end = Stop::at_the_end(&stop);
        let load = scope.spawn(|| stream_of_connections(a, &to, waiting, &counts, &stop));
        let mut disturbed = Ok(());
        while disturbed.is_ok() && began.elapsed() < time {
            disturbed = disturb(node);
        }
        let took = began.elapsed();
        drop(at_the_end);
        let loaded = load
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        (disturbed.and(loaded), took)
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
    let [begun, made, lost] =
        [&counts.begun, &counts.made, &counts.lost].map(|count| count.load(Ordering::Relaxed));
    let errors = counts.errors.lock().unwrap_or_else(PoisonError::into_inner);
    let came = Came {
        begun,
        made,
        lost,
        errors: errors.clone(),
    };
    eprintln!("in {took:?}: {came:?}");
    let wanted = f64::from(RATE) * took.as_secs_f64() * SHARE;
    ensure!(
        begun as f64 >= wanted,
        "{begun} connections were begun in {took:?}, not {wanted:.0}: that is no load"
    );
    Ok(came)
}
