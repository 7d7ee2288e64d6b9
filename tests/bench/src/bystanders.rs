//! What datagrams pay that nobody captures: of a pod that is not enrolled, to port 53 and to another, with Culvert's DNS
//! programs attached, with empty ones in their place, and with none. The empty ones are the floor: the kernel's own price
//! of a hook, which no program can go below.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::Result;
use culvert::kernel::{
    Netns, node,
    pod::{self, Dns, Policy},
};
use culvert_lab::{Hooks, Lab};
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
    Empty,
    Culvert,
}

const ATTACHED: [Attached; 3] = [Attached::Nothing, Attached::Empty, Attached::Culvert];
const CASES: [(u16, Client); 4] = [
    (53, Client::Kept),
    (OTHER, Client::Kept),
    (53, Client::Peer),
    (OTHER, Client::Peer),
];

/// Measures and prints; returns the results and how many targets were missed.
pub(crate) fn measure(rounds: usize) -> Result<(Value, usize)> {
    let lab = Lab::new("bench-dns-by")?;
    let (bystander, other) = (lab.pod("bystander")?, lab.pod("other")?);
    let place = |port| SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
    let client = Worker::start(&bystander)?;
    let answerers = [
        Answerer::start(&bystander, place(53), 0)?,
        Answerer::start(&bystander, place(OTHER), 0)?,
    ];
    let cpus = worker::cpus()?;
    let mut shuffle = Shuffle::new();
    let mut ours = CASES.map(|_| Vec::new());
    let mut floor = CASES.map(|_| Vec::new());
    for round in 0..rounds {
        let cpu = cpus.get(round % cpus.len()).copied().unwrap_or(0);
        client.thread().pin(cpu)?;
        for answerer in &answerers {
            answerer.thread.pin(cpu)?;
        }
        let mut order = ATTACHED;
        shuffle.shuffle(&mut order);
        let mut rates = [[0.0; CASES.len()]; ATTACHED.len()];
        for attached in order {
            let mut empty = None;
            match attached {
                Attached::Nothing => {}
                Attached::Empty => empty = Some(Hooks::empty(lab.cgroup())?),
                Attached::Culvert => {
                    let node = ways::load(&lab)?;
                    let policy = Policy {
                        dns: Dns::All,
                        ..Policy::default()
                    };
                    let netns = Netns::open(other.path())?;
                    lab.node().run(|| pod::attach(&node, &netns, &policy))?;
                }
            }
            std::thread::sleep(SETTLED);
            for (rate, (port, kind)) in rates[attached as usize].iter_mut().zip(CASES) {
                *rate = client.call(move || slice(place(port), kind))??.0;
            }
            drop(empty);
            if attached == Attached::Culvert {
                lab.node().run(|| node::unload(lab.bpffs(), true))?;
            }
        }
        let [nothing, empty, culvert] = rates;
        for case in 0..CASES.len() {
            ours[case].push(culvert[case] / nothing[case]);
            floor[case].push(empty[case] / nothing[case]);
        }
    }
    let mut missed = 0;
    let mut rows = Vec::new();
    println!("Datagrams of a pod that is not enrolled, as a share of those with nothing attached");
    for ((port, kind), (ours, floor)) in CASES.into_iter().zip(ours.into_iter().zip(floor)) {
        let (ours, floor) = (Summary::of(ours), Summary::of(floor));
        let short = ours.median < TARGET;
        missed += usize::from(short);
        println!(
            "  port {port:<5} {:<22} {:.3} ({:.3} to {:.3})  floor, an empty program: {:.3}{}",
            kind.name(),
            ours.median,
            ours.p10,
            ours.p90,
            floor.median,
            if short { "  MISSED: 0.99" } else { "" },
        );
        rows.push(json!({
            "port": port, "client": kind.name(), "ratio": ours.json(), "floor": floor.json(),
        }));
    }
    Ok((Value::from(rows), missed))
}
