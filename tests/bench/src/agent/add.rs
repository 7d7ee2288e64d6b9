//! What the container runtime waits for: ADD of pods in the mesh, which ends when ztunnel serves them, and of others.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::batch::Batch;
use super::plugin::Plugin;
use super::site::Site;
use crate::interrupt;
use crate::stats::Summary;

/// So many pods are made at once; the runtime starts them one after the other.
const BATCH: usize = 50;

/// Milliseconds of a call, and where they went.
#[derive(Debug)]
pub(super) struct Adds {
    pub(super) mesh: Summary,
    /// `mesh` without ztunnel's part, pod by pod.
    pub(super) ours: Summary,
    /// Of ours, the kernel's side.
    pub(super) kernel: Summary,
    /// From telling ztunnel to its acknowledgement, and the look at its listeners.
    pub(super) ztunnel: Summary,
    pub(super) outside: Summary,
    pub(super) del: Summary,
}

/// Adds so many pods of each kind. `left` pods are there before and after.
pub(super) fn measure(site: &Site, plugin: &Plugin, count: usize, left: usize) -> Result<Adds> {
    let (mut mesh, mut ours, mut kernel, mut ztunnel) = (vec![], vec![], vec![], vec![]);
    let (mut outside, mut del) = (vec![], vec![]);
    let mut number = 0;
    while mesh.len() < count {
        interrupt::check()?;
        let size = BATCH.min(count - mesh.len());
        let batch = Batch::new(site, &format!("add-mesh-{number}"), Some("ambient"), size)?;
        for (_, sandbox) in &batch.pods {
            interrupt::check()?;
            let before = site.stages()?;
            let took = plugin.add(sandbox)?.as_secs_f64() * 1e3;
            let after = site.stages()?;
            let stage = |name: &str| after[name] - before[name];
            ensure!(
                stage("kernel") > 0.0 && stage("ztunnel") > 0.0,
                "ADD of {} succeeded without capture or ztunnel",
                sandbox.name
            );
            mesh.push(took);
            kernel.push(stage("kernel"));
            ztunnel.push(stage("ztunnel"));
            ours.push(took - stage("ztunnel"));
        }
        batch.run()?;
        // Proof, not measurement: the last pod's words go through ztunnel at once.
        if let [.., (from, _), (to, _)] = batch.pods.as_slice() {
            ensure!(
                site.through_ztunnel(from, to)?,
                "a pod that was added is not carried by ztunnel"
            );
        }
        del.extend(batch.end(plugin, left)?);
        let batch = Batch::new(site, &format!("add-plain-{number}"), None, size)?;
        for (_, sandbox) in &batch.pods {
            interrupt::check()?;
            outside.push(plugin.add(sandbox)?.as_secs_f64() * 1e3);
        }
        ensure!(
            site.enrolled()?.1 <= left,
            "a pod outside the mesh was enrolled"
        );
        batch.run()?;
        batch.end(plugin, left)?;
        number += 1;
        eprint!("\r  {} of {count}", mesh.len());
    }
    eprintln!();
    Ok(Adds {
        mesh: Summary::of(mesh),
        ours: Summary::of(ours),
        kernel: Summary::of(kernel),
        ztunnel: Summary::of(ztunnel),
        outside: Summary::of(outside),
        del: Summary::of(del),
    })
}

impl Adds {
    pub(super) fn json(&self) -> Value {
        json!({
            "unit": "ms", "mesh": self.mesh.json(), "ours": self.ours.json(), "kernel": self.kernel.json(),
            "ztunnel": self.ztunnel.json(), "outside": self.outside.json(), "del": self.del.json(),
        })
    }
}
