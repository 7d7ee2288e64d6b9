//! What sockets nobody captures pay: the connect rate of the node's own and of a pod that is not enrolled, with the node
//! programs attached and without, by turns.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use culvert::kernel::node::unload;
use culvert_lab::{Lab, Ns};

use crate::client::{self, Measure};
use crate::proxy::Proxy;
use crate::runs;
use crate::stats::{Shuffle, Summary};
use crate::ways;
use crate::worker::{self, Worker};

const PORT: u16 = 18080;

/// Rates with the programs as a share of those without.
#[derive(Debug)]
pub(crate) struct Unenrolled {
    /// Of the node's own sockets.
    pub(crate) node: Summary,
    /// Of sockets in a pod that is not enrolled.
    pub(crate) pod: Summary,
    /// Connections a second of the node's, without.
    pub(crate) rate: Summary,
}

struct Place {
    client: Worker,
    listener: Proxy,
}

impl Place {
    fn new(ns: &Ns) -> Result<Self> {
        ways::steady(ns)?;
        Ok(Self {
            client: Worker::start(ns)?,
            listener: Proxy::plain(ns, PORT)?,
        })
    }

    fn rate(&self) -> Result<f64> {
        let to = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), PORT);
        let ops = Measure::Connect.slice();
        Ok(client::slice(&self.client, &self.listener, to, Measure::Connect, ops)?.rate())
    }
}

/// Runs the rounds.
pub(crate) fn measure(rounds: usize) -> Result<Unenrolled> {
    let lab = Lab::new("bench-node")?;
    let places = [Place::new(lab.node())?, Place::new(&lab.pod("bystander")?)?];
    let cpus = worker::cpus()?;
    let mut shuffle = Shuffle::new();
    let mut ratios = [Vec::new(), Vec::new()];
    let mut rates = Vec::new();
    for round in 0..rounds {
        let cpu = cpus.get(round % cpus.len()).copied().unwrap_or(0);
        for place in &places {
            place.client.thread().pin(cpu)?;
            place.listener.thread().pin(cpu)?;
        }
        let mut order = [true, false];
        shuffle.shuffle(&mut order);
        let (mut with, mut without) = ([0.0; 2], [0.0; 2]);
        for attached in order {
            switch(&lab, attached)?;
            let taken = if attached { &mut with } else { &mut without };
            for (place, rate) in places.iter().zip(taken) {
                *rate = place.rate()?;
            }
        }
        for ((ratios, with), without) in ratios.iter_mut().zip(with).zip(without) {
            ratios.push(with / without);
        }
        rates.push(without[0]);
    }
    switch(&lab, false)?;
    let [node, pod] = ratios;
    Ok(Unenrolled {
        node: Summary::of(node),
        pod: Summary::of(pod),
        rate: Summary::of(rates),
    })
}

/// Attaches or removes the programs and makes sure that it is so: links go a moment after their pins.
fn switch(lab: &Lab, attached: bool) -> Result<()> {
    if attached {
        drop(ways::load(lab)?);
    } else {
        lab.node().run(|| unload(lab.bpffs(), false))?;
    }
    let started = Instant::now();
    while (runs::attached(lab.cgroup())? > 0) != attached {
        ensure!(
            started.elapsed() < Duration::from_secs(5),
            "the node programs are not {} after 5 s",
            if attached { "attached" } else { "gone" }
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}
