//! A namespace's label comes and goes, and with it the enrolment of all its pods, which run already.

use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use culvert_lab::Ns;
use serde_json::{Value, json};

use super::site::{self, Site};
use crate::interrupt;
use crate::process::Memory;
use crate::stats::Summary;

/// The namespace of these pods.
const NAMESPACE: &str = "shop";

/// Seconds from writing the manifest until all are, and the agent's memory.
#[derive(Debug)]
pub(super) struct Flips {
    pub(super) pods: usize,
    pub(super) enrol: Summary,
    pub(super) release: Summary,
    /// With nobody enrolled; at once when all are for the first time; and a while after the last flip.
    pub(super) idle: Memory,
    pub(super) first: Memory,
    pub(super) last: Memory,
}

/// The pods of that namespace.
pub(super) struct Shop {
    pods: Vec<Ns>,
}

impl Shop {
    pub(super) fn new(site: &Site, count: usize) -> Result<Self> {
        let mut pods = Vec::new();
        let mut items = Vec::new();
        for i in 0..count {
            interrupt::check()?;
            let ns = site.lab.pod(&format!("shop-{i}"))?;
            let mut pod = site::pod(ns.name(), NAMESPACE, Some(&ns));
            // No runtime runs them: this says what is else found by their processes.
            pod["metadata"]["annotations"] = json!({"culvert.dev/netns": ns.path()});
            items.push(pod);
            pods.push(ns);
        }
        let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
        site.options.write("shop-pods", &list)?;
        let shop = Self { pods };
        shop.label(site, None)?;
        site.knows_namespace(NAMESPACE)?;
        Ok(shop)
    }

    fn label(&self, site: &Site, mode: Option<&str>) -> Result<()> {
        site.options
            .write("shop-namespace", &site::namespace(NAMESPACE, mode))
    }

    /// Labels the namespace and waits until the agent, the kernel and ztunnel have all pods. Seconds, by the agent.
    pub(super) fn enrol(&self, site: &Site) -> Result<f64> {
        let count = self.pods.len();
        let started = Instant::now();
        self.label(site, Some("ambient"))?;
        site.until("all pods are enrolled", || Ok(site.enrolled()?.0 == count))?;
        let took = started.elapsed().as_secs_f64();
        let (captured, served) = (site.captured()?, site.served()?);
        ensure!(
            (captured, served) == (count, count),
            "the agent says {count} pods are enrolled; the kernel captures {captured}, ztunnel serves {served}"
        );
        Ok(took)
    }

    /// Takes the label away again.
    pub(super) fn release(&self, site: &Site) -> Result<f64> {
        let started = Instant::now();
        self.label(site, None)?;
        site.until("no pod is enrolled", || Ok(site.enrolled()?.1 == 0))?;
        let took = started.elapsed().as_secs_f64();
        let (captured, served) = (site.captured()?, site.served()?);
        ensure!(
            (captured, served) == (0, 0),
            "the agent says no pod is enrolled; the kernel captures {captured}, ztunnel serves {served}"
        );
        Ok(took)
    }

    /// Whether a connection between two of them goes through ztunnel.
    pub(super) fn through_ztunnel(&self, site: &Site) -> Result<bool> {
        let [from, to, ..] = self.pods.as_slice() else {
            anyhow::bail!("too few pods");
        };
        site.through_ztunnel(from, to)
            .context("talking between two pods")
    }
}

/// Flips so often; the pods are enrolled at the end.
pub(super) fn measure(site: &Site, shop: &Shop, flips: usize) -> Result<Flips> {
    let (mut enrol, mut release) = (vec![], vec![]);
    let idle = Memory::of(site.agent.pid())?;
    ensure!(
        !shop.through_ztunnel(site)?,
        "pods that are not enrolled talk through ztunnel"
    );
    let mut first = None;
    for flip in 0..flips {
        enrol.push(shop.enrol(site)?);
        first.get_or_insert(Memory::of(site.agent.pid())?);
        ensure!(
            shop.through_ztunnel(site)?,
            "enrolled pods do not talk through ztunnel"
        );
        release.push(shop.release(site)?);
        ensure!(
            !shop.through_ztunnel(site)?,
            "pods that were let go talk through ztunnel"
        );
        eprint!("\r  {} of {flips}", flip + 1);
    }
    shop.enrol(site)?;
    eprintln!();
    super::pause(super::CALM)?;
    let last = Memory::of(site.agent.pid())?;
    Ok(Flips {
        pods: shop.pods.len(),
        enrol: Summary::of(enrol),
        release: Summary::of(release),
        idle,
        first: first.unwrap_or(last),
        last,
    })
}

impl Flips {
    pub(super) fn json(&self) -> Value {
        json!({
            "unit": "s", "pods": self.pods, "enrol": self.enrol.json(), "release": self.release.json(),
            "memory": {"nobody_enrolled": self.idle.json(), "first": self.first.json(), "last": self.last.json()},
        })
    }
}
