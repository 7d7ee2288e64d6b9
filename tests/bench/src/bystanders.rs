//! What datagrams pay that nobody captures: of a pod that is not enrolled, to port 53 and to another; and of one that is, to
//! another. With Culvert's DNS programs attached, with empty ones in their place, with empty ones in a cgroup beside that of
//! the pods, and with none. The empty ones are the floor: the kernel's own price of a hook, which no program can go below.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use culvert::kernel::{
    Netns, node,
    pod::{self, Dns, Policy},
};
use culvert_lab::{Family, Hooks, Lab, Ns};
use serde_json::{Value, json};

use crate::dns::{Answerer, Client, slice};
use crate::stats::{Shuffle, Summary};
use crate::ways;
use crate::worker::{self, Worker};

/// A port that concerns nobody.
const OTHER: u16 = 4000;
/// What has to be reached, as a share.
const TARGET: f64 = 0.99;
/// Links go a moment after their last descriptor.
const SETTLED: Duration = Duration::from_millis(30);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Attached {
    Nothing,
    /// Empty programs in a cgroup that none of the pods is in.
    Beside,
    Empty,
    Culvert,
}

const ATTACHED: [Attached; 4] = [
    Attached::Nothing,
    Attached::Beside,
    Attached::Empty,
    Attached::Culvert,
];

/// Whose datagrams, to which port, from which kind of socket; over both families.
const CASES: [(Who, u16, Client); 6] = [
    (Who::Stranger, 53, Client::Kept),
    (Who::Stranger, OTHER, Client::Kept),
    (Who::Enrolled, OTHER, Client::Kept),
    (Who::Stranger, 53, Client::Peer),
    (Who::Stranger, OTHER, Client::Peer),
    (Who::Enrolled, OTHER, Client::Peer),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Who {
    /// Never enrolled.
    Stranger,
    /// Enrolled with capture of lookups, while Culvert's programs are attached.
    Enrolled,
}

/// A cgroup beside the lab's, removed when this is dropped.
struct Beside(PathBuf);

impl Beside {
    fn make(lab: &Lab) -> Result<Self> {
        let name = lab.cgroup().file_name().context("a cgroup with a name")?;
        let dir = format!("{}-beside", name.to_string_lossy());
        let dir = lab.cgroup().with_file_name(dir);
        std::fs::create_dir(&dir).with_context(|| format!("making {}", dir.display()))?;
        Ok(Self(dir))
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir(&self.0) {
            eprintln!("cannot remove {}: {error}", self.0.display());
        }
    }
}

/// A pod, who asks in it and who answers there.
struct Pod {
    client: Worker,
    answerers: Vec<Answerer>,
}

fn place(family: Family, port: u16) -> SocketAddr {
    SocketAddr::new(family.loopback(), port)
}

impl Pod {
    fn new(ns: &Ns) -> Result<Self> {
        let mut answerers = Vec::new();
        for family in Family::BOTH {
            for port in [53, OTHER] {
                answerers.push(Answerer::start(ns, place(family, port), 0)?);
            }
        }
        Ok(Self {
            client: Worker::start(ns)?,
            answerers,
        })
    }

    fn pin(&self, cpu: usize) -> Result<()> {
        self.client.thread().pin(cpu)?;
        self.answerers.iter().try_for_each(|a| a.thread.pin(cpu))
    }
}

/// What one case came to under one state of the hooks.
#[derive(Debug, Default, Clone)]
struct Taken {
    rates: Vec<f64>,
    micros: Vec<f64>,
}

/// One round of all cases with hooks in one state.
fn round(
    lab: &Lab,
    beside: &Path,
    attached: Attached,
    enrolled: &Ns,
    mut one: impl FnMut() -> Result<()>,
) -> Result<()> {
    let hooks = match attached {
        Attached::Nothing | Attached::Culvert => None,
        Attached::Beside => Some(Hooks::empty(beside)?),
        Attached::Empty => Some(Hooks::empty(lab.cgroup())?),
    };
    let netns = Netns::open(enrolled.path())?;
    if attached == Attached::Culvert {
        let node = ways::load(lab)?;
        let policy = Policy {
            dns: Dns::All,
            ..Policy::default()
        };
        lab.node().run(|| pod::attach(&node, &netns, &policy))?;
        std::thread::sleep(SETTLED);
        one()?;
        lab.node().run(|| pod::detach(&node, &netns))?;
        lab.node().run(|| node::unload(lab.bpffs(), true))?;
    } else {
        std::thread::sleep(SETTLED);
        one()?;
    }
    drop(hooks);
    Ok(())
}

/// Measures and prints; returns the results and how many targets were missed.
pub(crate) fn measure(rounds: usize) -> Result<(Value, usize)> {
    let lab = Lab::new("bench-dns-by")?;
    let beside = Beside::make(&lab)?;
    let (stranger, enrolled) = (lab.pod("stranger")?, lab.pod("enrolled")?);
    let pods = [Pod::new(&stranger)?, Pod::new(&enrolled)?];
    let cases: Vec<(Family, (Who, u16, Client))> = Family::BOTH
        .into_iter()
        .flat_map(|family| CASES.map(|case| (family, case)))
        .collect();
    let cpus = worker::cpus()?;
    let mut shuffle = Shuffle::new();
    let mut taken = vec![vec![Taken::default(); cases.len()]; ATTACHED.len()];
    for n in 0..rounds {
        let cpu = cpus.get(n % cpus.len()).copied().unwrap_or(0);
        pods.iter().try_for_each(|pod| pod.pin(cpu))?;
        let mut order = ATTACHED;
        shuffle.shuffle(&mut order);
        for attached in order {
            let taken = &mut taken[attached as usize];
            round(&lab, &beside.0, attached, &enrolled, || {
                for ((family, (who, port, kind)), taken) in cases.iter().copied().zip(&mut *taken) {
                    let to = place(family, port);
                    let client = &pods[who as usize].client;
                    let (rate, micros) = client.call(move || slice(to, kind))??;
                    taken.rates.push(rate);
                    taken.micros.extend(micros);
                }
                Ok(())
            })?;
        }
    }
    Ok(report(&cases, &taken))
}

fn report(cases: &[(Family, (Who, u16, Client))], taken: &[Vec<Taken>]) -> (Value, usize) {
    let mut missed = 0;
    let mut rows = Vec::new();
    println!(
        "Datagrams that nobody captures, as a share of those with nothing attached and no pod enrolled; p50 and p99 of a round \
         trip with Culvert, and without"
    );
    for (case, (family, (who, port, kind))) in cases.iter().enumerate() {
        let of = |attached: Attached| &taken[attached as usize][case];
        let share = |attached| {
            let (these, those) = (&of(attached).rates, &of(Attached::Nothing).rates);
            Summary::of(these.iter().zip(those).map(|(a, b)| a / b).collect())
        };
        let micros = |attached| Summary::of(of(attached).micros.clone());
        let [ours, floor, beside] =
            [Attached::Culvert, Attached::Empty, Attached::Beside].map(share);
        let [with, without] = [Attached::Culvert, Attached::Nothing].map(micros);
        let short = ours.median < TARGET;
        missed += usize::from(short);
        println!(
            "  {family:?} {:<8} port {port:<4} {:<22} {:.3} ({:.3} to {:.3})  empty programs {:.3}, beside {:.3}  \
             {:>5.1} and {:>5.1} µs, {:>5.1} and {:>5.1} µs{}",
            format!("{who:?}").to_lowercase(),
            kind.name(),
            ours.median,
            ours.p10,
            ours.p90,
            floor.median,
            beside.median,
            with.median,
            with.p99,
            without.median,
            without.p99,
            if short { "  MISSED: 0.99" } else { "" },
        );
        rows.push(json!({
            "family": format!("{family:?}"), "who": format!("{who:?}"), "port": port, "client": kind.name(),
            "ratio": ours.json(), "floor": floor.json(), "beside": beside.json(),
            "micros": with.json(), "micros_without": without.json(),
        }));
    }
    (Value::from(rows), missed)
}
