//! What the container runtime waits for: ADD of pods in the mesh, which ends when ztunnel serves them, and of others.

use std::time::Instant;

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
    /// For comparison: the plugin's process that asks nobody, and a request to rtnetlink that changes nothing.
    pub(super) process: Summary,
    pub(super) rtnetlink: Summary,
    pub(super) outside: Summary,
    pub(super) del: Summary,
}

/// Adds so many pods of each kind. `left` pods are there before and after.
pub(super) fn measure(site: &Site, plugin: &Plugin, count: usize, left: usize) -> Result<Adds> {
    let (mut mesh, mut ours, mut kernel, mut ztunnel) = (vec![], vec![], vec![], vec![]);
    let (mut outside, mut del) = (vec![], vec![]);
    let (mut process, mut rtnetlink) = (vec![], vec![]);
    let mut number = 0;
    while mesh.len() < count {
        interrupt::check()?;
        let size = BATCH.min(count - mesh.len());
        let batch = Batch::new(site, &format!("add-mesh-{number}"), Some("ambient"), size)?;
        for (ns, sandbox) in &batch.pods {
            interrupt::check()?;
            // What it takes to ask the kernel for nothing, in the same namespace at the same time: it has one lock for
            // all changes of networks, and whoever makes or unmakes namespaces has it for long.
            let started = Instant::now();
            ns.set_up("lo")?;
            rtnetlink.push(started.elapsed().as_secs_f64() * 1e3);
            process.push(plugin.version()?.as_secs_f64() * 1e3);
            let took = plugin.add(sandbox)?.as_secs_f64() * 1e3;
            let timings = plugin.timings()?;
            ensure!(
                timings.kernel_us > 0 && timings.ztunnel_us > 0,
                "ADD of {} succeeded without capture or ztunnel",
                sandbox.name
            );
            mesh.push(took);
            kernel.push(timings.kernel_us as f64 / 1e3);
            ztunnel.push(timings.ztunnel_us as f64 / 1e3);
            ours.push(took - timings.ztunnel_us as f64 / 1e3);
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
        process: Summary::of(process),
        rtnetlink: Summary::of(rtnetlink),
        outside: Summary::of(outside),
        del: Summary::of(del),
    })
}

impl Adds {
    pub(super) fn json(&self) -> Value {
        json!({
            "unit": "ms", "mesh": self.mesh.json(), "ours": self.ours.json(), "kernel": self.kernel.json(),
            "ztunnel": self.ztunnel.json(), "process": self.process.json(), "rtnetlink": self.rtnetlink.json(),
            "outside": self.outside.json(), "del": self.del.json(),
        })
    }
}
