//! How long it takes to enrol and to un-enrol pods, by Culvert and by the rules it replaces. Both families, pods never
//! touched before.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use culvert::kernel::{
    Netns,
    pod::{self, Attached, Detached, Policy},
};
use culvert_lab::{Lab, Ns};

use crate::netfilter::Tool;
use crate::stats::Summary;
use crate::ways::{self, Way};

/// What one way took for the pods.
#[derive(Debug)]
pub(crate) struct Enrolment {
    pub(crate) way: Way,
    /// Milliseconds for the first pod.
    pub(crate) first: f64,
    /// Milliseconds a pod after the first.
    pub(crate) enrol: Summary,
    pub(crate) unenrol: Summary,
    /// Milliseconds for all, one after the other.
    pub(crate) enrol_all: f64,
    pub(crate) unenrol_all: f64,
    pub(crate) pods: usize,
}

/// Measures Culvert, iptables, nftables.
pub(crate) fn measure(pods: usize) -> Result<Vec<Enrolment>> {
    [Way::Culvert, Way::Iptables, Way::Nftables]
        .into_iter()
        .map(|way| one(way, pods).with_context(|| format!("enrolling by {}", way.name())))
        .collect()
}

fn one(way: Way, count: usize) -> Result<Enrolment> {
    let lab = Lab::new("bench-enrol")?;
    let pods = (0..count)
        .map(|i| lab.pod(&format!("pod{i}")))
        .collect::<Result<Vec<_>>>()?;
    let (enrol, unenrol) = match way {
        Way::Culvert => culvert(&lab, &pods)?,
        Way::Iptables => tool(Tool::Iptables, &pods)?,
        Way::Nftables | Way::Straight => tool(Tool::Nftables, &pods)?,
    };
    let milliseconds =
        |took: &[Duration]| -> Vec<f64> { took.iter().map(|t| t.as_secs_f64() * 1e3).collect() };
    let (enrol, unenrol) = (milliseconds(&enrol), milliseconds(&unenrol));
    Ok(Enrolment {
        way,
        first: enrol.first().copied().unwrap_or_default(),
        enrol_all: enrol.iter().sum(),
        unenrol_all: unenrol.iter().sum(),
        enrol: Summary::of(enrol.into_iter().skip(1).collect()),
        unenrol: Summary::of(unenrol.into_iter().skip(1).collect()),
        pods: count,
    })
}

type Times = (Vec<Duration>, Vec<Duration>);

/// As the agent does it: one process that has the node programs open.
fn culvert(lab: &Lab, pods: &[Ns]) -> Result<Times> {
    let node = ways::load(lab)?;
    let policy = Policy {
        named_ztunnel: true,
        ..Policy::default()
    };
    lab.node().run(|| {
        let enrol = each(pods, |pod| {
            let netns = Netns::open(pod.path())?;
            let done = pod::attach(&node, &netns, &policy)?;
            ensure!(done == Attached::Enrolled, "{} was enrolled", pod.name());
            Ok(())
        })?;
        let unenrol = each(pods, |pod| {
            let netns = Netns::open(pod.path())?;
            let done = pod::detach(&node, &netns)?;
            ensure!(done == Detached::Gone, "{} is {done:?}", pod.name());
            Ok(())
        })?;
        Ok((enrol, unenrol))
    })
}

fn each(pods: &[Ns], mut act: impl FnMut(&Ns) -> Result<()>) -> Result<Vec<Duration>> {
    pods.iter()
        .map(|pod| {
            let started = Instant::now();
            act(pod)?;
            Ok(started.elapsed())
        })
        .collect()
}

/// By the tools; that a thread enters the pod first is not counted.
fn tool(tool: Tool, pods: &[Ns]) -> Result<Times> {
    let timed = |act: &(dyn Fn(&Ns) -> Result<()> + Sync)| {
        pods.iter()
            .map(|pod| {
                pod.run(|| {
                    let started = Instant::now();
                    act(pod)?;
                    Ok(started.elapsed())
                })
            })
            .collect::<Result<Vec<_>>>()
    };
    let enrol = timed(&|pod| tool.apply(pod))?;
    Ok((enrol, timed(&|pod| tool.remove(pod))?))
}
