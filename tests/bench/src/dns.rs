//! What a lookup costs through capture: the same client asking ztunnel's port itself, through Culvert, and through
//! istio-cni's iptables. It measures and says what has to be reached.

use std::fmt::Write as _;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use culvert::kernel::{
    Netns, Node,
    pod::{self, Dns, Policy},
};
use culvert_lab::{Family, Lab, Ns};
use serde_json::{Value, json};
use socket2::{Domain, Socket, Type};

use crate::bystanders;
use crate::netfilter::Tool;
use crate::stats::{Shuffle, Summary};
use crate::ways;
use crate::worker::{self, Thread, Worker};

/// ztunnel's port for lookups, and where its sockets' mark is told by.
const LISTENER: u16 = 15053;
const MARK: u32 = 0x539;
/// As long as a question for a name of a cluster.
const QUESTION: [u8; 48] = [7; 48];
/// Lookups of one slice: some twenty milliseconds.
const SLICE: usize = 1500;
const TIMEOUT: Duration = Duration::from_secs(5);
/// What has to be reached, as shares.
const CAPTURED: f64 = 0.97;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Straight,
    /// Straight to ztunnel's port in a pod that is enrolled: what its rules and the hooks cost by being there.
    Enrolled,
    Culvert,
    Iptables,
}

const WAYS: [Way; 4] = [Way::Straight, Way::Enrolled, Way::Culvert, Way::Iptables];

impl Way {
    const fn name(self) -> &'static str {
        match self {
            Self::Straight => "straight, from a pod not enrolled",
            Self::Enrolled => "straight, from an enrolled pod",
            Self::Culvert => "captured",
            Self::Iptables => "captured by iptables",
        }
    }
}

/// How a client asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Client {
    /// A socket for each lookup, connected: glibc, Go.
    Fresh,
    /// One socket, which says whom it asks each time and who answered: musl, forwarders.
    Kept,
    /// One connected socket: no look-up is like that, other traffic is.
    Peer,
}

impl Client {
    /// Those that look names up.
    const ALL: [Self; 2] = [Self::Fresh, Self::Kept];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Fresh => "a connected socket a lookup",
            Self::Kept => "one unconnected socket",
            Self::Peer => "one connected socket",
        }
    }
}

/// Answers with what it gets, until dropped.
#[derive(Debug)]
pub(crate) struct Answerer {
    stop: Arc<AtomicBool>,
    pub(crate) thread: Thread,
}

impl Answerer {
    pub(crate) fn start(ns: &Ns, addr: SocketAddr, mark: u32) -> Result<Self> {
        let socket = ns.run(|| -> io::Result<UdpSocket> {
            let socket = Socket::new(Domain::for_address(addr), Type::DGRAM, None)?;
            // As ztunnel does: the mark tells whose socket it is.
            socket.set_mark(mark)?;
            socket.bind(&addr.into())?;
            Ok(socket.into())
        });
        let socket = socket.with_context(|| format!("binding {addr}"))?;
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = Thread::spawn(ns, move || {
            let mut buffer = [0; 512];
            while !stopped.load(Ordering::Relaxed) {
                if let Ok((n, from)) = socket.recv_from(&mut buffer) {
                    // A client that is gone does not wait.
                    let _sent = socket.send_to(&buffer[..n], from);
                }
            }
        })?;
        Ok(Self { stop, thread })
    }
}

impl Drop for Answerer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn any(to: SocketAddr) -> SocketAddr {
    let ip: IpAddr = if to.is_ipv4() {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    SocketAddr::new(ip, 0)
}

fn fresh(to: SocketAddr) -> Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(to), Type::DGRAM, None)?;
    socket.set_read_timeout(Some(TIMEOUT))?;
    Ok(socket.into())
}

/// Lookups a second, and how long each took in µs.
pub(crate) fn slice(to: SocketAddr, client: Client) -> Result<(f64, Vec<f64>)> {
    let mut took = Vec::with_capacity(SLICE);
    let mut answer = [0; 512];
    let kept = UdpSocket::bind(any(to))?;
    kept.set_read_timeout(Some(TIMEOUT))?;
    if client == Client::Peer {
        kept.connect(to)?;
    }
    let began = Instant::now();
    for _ in 0..SLICE {
        let asked = Instant::now();
        let n = match client {
            Client::Fresh => {
                let socket = fresh(to)?;
                socket.connect(to)?;
                socket.send(&QUESTION)?;
                socket.recv(&mut answer)?
            }
            Client::Kept => {
                kept.send_to(&QUESTION, to)?;
                let (n, from) = kept.recv_from(&mut answer)?;
                ensure!(from == to, "{from} answered, not {to}");
                n
            }
            Client::Peer => {
                kept.send(&QUESTION)?;
                kept.recv(&mut answer)?
            }
        };
        ensure!(n == QUESTION.len(), "another answer");
        took.push(asked.elapsed().as_secs_f64() * 1e6);
    }
    let rate = took.len() as f64 / began.elapsed().as_secs_f64();
    Ok((rate, took))
}

struct Path {
    way: Way,
    client: Worker,
    listeners: Vec<Answerer>,
}

impl Path {
    fn new(lab: &Lab, node: &Node, way: Way) -> Result<Self> {
        let name = format!("{way:?}").to_lowercase();
        let pod = lab.pod(&name)?;
        match way {
            Way::Straight => {}
            Way::Enrolled | Way::Culvert => {
                let netns = Netns::open(pod.path())?;
                let policy = Policy {
                    named_ztunnel: true,
                    dns: Dns::All,
                    ..Policy::default()
                };
                lab.node().run(|| pod::attach(node, &netns, &policy))?;
            }
            Way::Iptables => pod.run(|| Tool::Iptables.apply(&pod))?,
        }
        let listen =
            |family: Family| Answerer::start(&pod, (family.loopback(), LISTENER).into(), MARK);
        Ok(Self {
            way,
            client: Worker::start(&pod)?,
            listeners: vec![listen(Family::V4)?, listen(Family::V6)?],
        })
    }

    fn target(&self, family: Family) -> SocketAddr {
        match self.way {
            Way::Straight | Way::Enrolled => SocketAddr::new(family.loopback(), LISTENER),
            // Where nobody is: only a captured lookup is answered.
            Way::Culvert | Way::Iptables => SocketAddr::new(ways::elsewhere(family).ip(), 53),
        }
    }
}

/// One way's figures.
struct Outcome {
    way: Way,
    /// Of [`Way::Straight`].
    ratio: Summary,
    /// Of [`Way::Enrolled`].
    of_enrolled: Summary,
    rate: Summary,
    micros: Summary,
}

fn compare(paths: &[Path], family: Family, client: Client, rounds: usize) -> Result<Vec<Outcome>> {
    let cpus = worker::cpus()?;
    let mut shuffle = Shuffle::new();
    let mut rates = vec![Vec::new(); paths.len()];
    let mut micros = vec![Vec::new(); paths.len()];
    for round in 0..rounds {
        // Both on one processor, so that nothing hides in waiting for each other.
        let cpu = cpus.get(round % cpus.len()).copied().unwrap_or(0);
        let mut order: Vec<usize> = (0..paths.len()).collect();
        shuffle.shuffle(&mut order);
        for at in order {
            let Some(path) = paths.get(at) else { continue };
            path.client.thread().pin(cpu)?;
            for listener in &path.listeners {
                listener.thread.pin(cpu)?;
            }
            let to = path.target(family);
            let done = path.client.call(move || slice(to, client))?;
            let (rate, took) = done.with_context(|| format!("{:?} to {to}", path.way))?;
            rates[at].push(rate);
            micros[at].extend(took);
        }
    }
    let of = |way: Way| paths.iter().position(|path| path.way == way).unwrap_or(0);
    let (straight, enrolled) = (
        rates[of(Way::Straight)].clone(),
        rates[of(Way::Enrolled)].clone(),
    );
    let ratios =
        |rates: &[f64], to: &[f64]| Summary::of(rates.iter().zip(to).map(|(a, b)| a / b).collect());
    let all = paths.iter().zip(rates).zip(micros);
    Ok(all
        .map(|((path, rates), micros)| Outcome {
            way: path.way,
            ratio: ratios(&rates, &straight),
            of_enrolled: ratios(&rates, &enrolled),
            rate: Summary::of(rates),
            micros: Summary::of(micros),
        })
        .collect())
}

/// Runs it all; prints, and returns the results and how many targets were missed.
pub(crate) fn measure(rounds: usize) -> Result<(Value, usize)> {
    let (bystanders, mut missed) = bystanders::measure(rounds)?;
    let lab = Lab::new("bench-dns")?;
    let node = ways::load(&lab)?;
    let paths = WAYS
        .into_iter()
        .map(|way| Path::new(&lab, &node, way))
        .collect::<Result<Vec<_>>>()?;
    let mut text = String::from(
        "Lookups. All pods are in the cgroup that the programs are attached to, as on a node: the straight ones pay for the \
         hooks as well\n",
    );
    let mut rows = Vec::new();
    for family in Family::BOTH {
        for client in Client::ALL {
            writeln!(text, "{family:?}, {}", client.name())?;
            for outcome in compare(&paths, family, client, rounds)? {
                let Outcome {
                    way,
                    ratio,
                    of_enrolled,
                    rate,
                    micros,
                } = &outcome;
                let short = *way == Way::Culvert && ratio.median < CAPTURED;
                missed += usize::from(short);
                writeln!(
                    text,
                    "  {:<33} {:>8.0} a second  {:.3} of straight ({:.3} to {:.3}), {:.3} of straight if enrolled  \
                     p50 {:>5.1} µs  p99 {:>6.1} µs{}",
                    way.name(),
                    rate.median,
                    ratio.median,
                    ratio.p10,
                    ratio.p90,
                    of_enrolled.median,
                    micros.median,
                    micros.p99,
                    if short { "  MISSED: 0.97" } else { "" },
                )?;
                rows.push(json!({
                    "family": format!("{family:?}"), "client": client.name(), "way": format!("{way:?}"),
                    "ratio": ratio.json(), "of_enrolled": of_enrolled.json(), "rate": rate.json(), "micros": micros.json(),
                }));
            }
        }
    }
    print!("{text}");
    Ok((
        json!({
            "lookups": rows,
            "bystanders": bystanders,
        }),
        missed,
    ))
}
