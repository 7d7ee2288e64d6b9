//! What the agent asks of the API server and occupies on its node, with pods enrolled there.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::agent::Agent;
use super::audit::{self, Audit};
use super::fleet::Fleet;
use super::site::Site;
use crate::process::{self, Memory};
use crate::{interrupt, stats::Summary};

/// After the last change: events are gathered, idle threads end and freed memory goes back after 10 s.
const CALM: Duration = Duration::from_secs(15);

/// Requests for so many pods, by kind.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) pods: usize,
    pub(super) kinds: BTreeMap<String, usize>,
}

impl Asked {
    pub(super) fn each(&self) -> f64 {
        self.kinds.values().sum::<usize>() as f64 / self.pods as f64
    }

    pub(super) fn json(&self) -> Value {
        json!({"pods": self.pods, "requests": self.kinds, "each": self.each()})
    }
}

/// A time in which nothing changed.
#[derive(Debug)]
pub(super) struct Idle {
    pub(super) seconds: f64,
    /// Of one processor.
    pub(super) percent: f64,
    /// A minute, counted; watches are counted apart.
    pub(super) asked: f64,
    /// Watches a minute, each of which is asked for again when the time is over that it asked for.
    pub(super) renewed: f64,
    pub(super) memory: Memory,
}

impl Idle {
    /// Nothing changes for a while; the node's agent is looked at.
    pub(super) fn measure(site: &Site, fleet: &Fleet<'_>, time: Duration) -> Result<Self> {
        let mut audit = Audit::new(site.cluster.audit_log());
        pause(CALM.min(time))?;
        let agent = Agent::of(&fleet.node)?;
        audit.news()?;
        let (started, before) = (Instant::now(), process::cpu(agent.pid)?);
        pause(time)?;
        let used = process::cpu(agent.pid)? - before;
        let seconds = started.elapsed().as_secs_f64();
        let node = fleet.node.name();
        let asked = audit.news()?;
        let asked = asked
            .iter()
            .filter(|one| one.node == node && !one.is_watch());
        Ok(Self {
            seconds,
            percent: used.as_secs_f64() / seconds * 100.0,
            asked: asked.count() as f64 * 60.0 / seconds,
            renewed: audit.renewals(&node),
            memory: Memory::of(agent.pid)?,
        })
    }

    /// Requests a minute, all.
    pub(super) fn requests(&self) -> f64 {
        self.asked + self.renewed
    }

    pub(super) fn json(&self) -> Value {
        json!({
            "seconds": self.seconds, "percent_of_a_processor": self.percent, "memory": self.memory.json(),
            "requests_a_minute": {"counted": self.asked, "watches_renewed": self.renewed},
        })
    }
}

/// With pods enrolled on this node, and nobody elsewhere.
#[derive(Debug)]
pub(super) struct Cost {
    pub(super) enrolled: Asked,
    pub(super) idle: Idle,
}

/// Enrols the pods and looks on; they stay enrolled.
pub(super) fn measure(site: &Site, fleet: &Fleet<'_>, time: Duration) -> Result<Cost> {
    let mut audit = Audit::new(site.cluster.audit_log());
    audit.news()?;
    fleet.enrol()?;
    // Events about it are gathered for a while.
    pause(CALM.min(time))?;
    let mut asked = audit.news()?;
    asked.retain(|one| one.node == fleet.node.name());
    Ok(Cost {
        enrolled: Asked {
            pods: fleet.size,
            kinds: audit::by_kind(&asked),
        },
        idle: Idle::measure(site, fleet, time)?,
    })
}

/// Seconds from a new agent's process to its saying that it is ready, so often.
pub(super) fn restart(site: &Site, fleet: &Fleet<'_>, times: usize) -> Result<Summary> {
    let mut ready = vec![];
    for turn in 0..times {
        ready.push(replace_agent(site, fleet)?.1);
        eprint!("\r  {} of {times}", turn + 1);
    }
    eprintln!();
    Ok(Summary::of(ready))
}

/// Removes the agent's pod and waits for the next agent. It, and how many seconds it took to be ready.
pub(super) fn replace_agent(site: &Site, fleet: &Fleet<'_>) -> Result<(Agent, f64)> {
    let before = Agent::of(&fleet.node)?;
    let node = format!("spec.nodeName={}", fleet.node.name());
    let (name, namespace) = culvert_cluster::AGENT;
    let label = format!("app.kubernetes.io/name={name}");
    let args = [
        "delete",
        "pod",
        "-n",
        namespace,
        "-l",
        &label,
        "--field-selector",
        &node,
        "--wait=false",
    ];
    site.cluster.kubectl(&args)?;
    let agent = before.successor(&fleet.node)?;
    let ready = agent.ready()?;
    fleet
        .still_enrolled()
        .context("after the agent was replaced")?;
    Ok((agent, ready))
}

pub(super) fn pause(time: Duration) -> Result<()> {
    let started = Instant::now();
    while started.elapsed() < time {
        interrupt::check()?;
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

impl Cost {
    pub(super) fn json(&self) -> Value {
        json!({"enrolled": self.enrolled.json(), "idle": self.idle.json()})
    }
}
