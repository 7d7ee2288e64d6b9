//! What the end-to-end tests share: a mesh of pods with a ztunnel on the lab's node.
//!
//! Needs root. Each test makes a [`Mesh`] of its own name; nothing is shared between tests.

pub mod bpf;
pub mod cage;
pub mod cni;
pub mod dns;
pub mod governed;
pub mod killing;
pub mod load;
pub mod picture;
pub mod runtime;
pub mod traffic;
pub mod version;

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use culvert_lab::{Lab, Ns, Zds, Ztunnel, ZtunnelOptions};

/// How long anything may take before a test gives up.
pub const LONG: Duration = Duration::from_secs(10);

/// How long something may take that comes by itself: the machine may have more to do than this test.
const PATIENCE: Duration = Duration::from_secs(30);

/// A lab, ZDS, and one stand-in ztunnel.
pub struct Mesh {
    /// ZDS first: it must let go of the pods' namespaces before the lab removes them.
    pub zds: Zds,
    /// The ztunnel serving the pods.
    pub ztunnel: Ztunnel,
    /// Everything else.
    pub lab: Lab,
}

impl Mesh {
    /// A lab with a ztunnel that is connected and has no pod yet.
    pub fn new(name: &str) -> Result<Self> {
        let lab = Lab::new(name)?;
        let zds = Zds::start(&lab)?;
        let ztunnel = Ztunnel::start(&lab, &zds, &ZtunnelOptions::new())?;
        Ok(Self { zds, ztunnel, lab })
    }

    /// One enrolled pod and the rest of the world. Nobody's probes pass by ztunnel.
    pub fn one_pod(name: &str) -> Result<(Self, Ns, Ns)> {
        let mesh = Self::new(name)?;
        let pod = mesh.lab.pod("a")?;
        let outside = mesh.lab.outside()?;
        mesh.enrol(&pod, &["--probe-source", "none"])?;
        Ok((mesh, pod, outside))
    }

    /// A lab with these pods, enrolled, whose ztunnel speaks HBONE to each of them.
    pub fn meshed<const N: usize>(name: &str, pods: [&str; N]) -> Result<(Self, [Ns; N])> {
        let lab = Lab::new(name)?;
        let zds = Zds::start(&lab)?;
        let mut made = Vec::new();
        let mut options = ZtunnelOptions::new();
        for pod in pods {
            let pod = lab.pod(pod)?;
            options = options.hbone(&pod);
            made.push(pod);
        }
        let ztunnel = Ztunnel::start(&lab, &zds, &options)?;
        let mesh = Self { zds, ztunnel, lab };
        for pod in &made {
            mesh.enrol(pod, &[])?;
        }
        let made = made
            .try_into()
            .map_err(|_| anyhow::anyhow!("as many pods as names"))?;
        Ok((mesh, made))
    }

    /// Enrols a pod the way the agent does: the kernel side first, naming ztunnel's process, then ztunnel.
    pub fn enrol(&self, pod: &Ns, args: &[&str]) -> Result<()> {
        let pid = self.ztunnel.pid().to_string();
        let mut all = vec!["--ztunnel", &pid];
        all.extend(args);
        self.lab.attach(pod, &all)?;
        self.zds.add_pod(pod)?;
        self.expect_listeners(pod, 3)
    }

    /// Waits until at least `count` of ztunnel's listeners are registered.
    pub fn expect_listeners(&self, pod: &Ns, count: usize) -> Result<()> {
        eventually("ztunnel's listeners are registered", || {
            Ok(self.show(pod)?["listeners"]
                .as_array()
                .is_some_and(|l| l.len() >= count))
        })
    }

    /// `culvert netns show` of the pod.
    pub fn show(&self, pod: &Ns) -> Result<serde_json::Value> {
        let path = pod.path().display().to_string();
        self.lab
            .culvert(&["-o", "json", "netns", "show", "--netns", &path])?
            .ok()?
            .json()
    }

    /// One of the pod's counters.
    pub fn counter(&self, pod: &Ns, verdict: &str) -> Result<u64> {
        self.show(pod)?["counters"][verdict]
            .as_u64()
            .with_context(|| format!("no counter {verdict}"))
    }

    /// One of the stand-in's numbers for a pod.
    pub fn stat(&self, pod: &Ns, name: &str) -> Result<u64> {
        self.ztunnel.pod_stats(pod.name())?[name]
            .as_u64()
            .with_context(|| format!("no statistic {name}"))
    }
}

/// Asks until it holds.
pub fn eventually(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let started = Instant::now();
    while !holds()? {
        ensure!(
            started.elapsed() < PATIENCE,
            "{what}: not within {PATIENCE:?}"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
