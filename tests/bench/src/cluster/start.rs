//! From a pod's being made to its being ready, as a watch shows it: with Culvert on its node, in the mesh and outside, and
//! on a node that has no Culvert.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use culvert_cluster::Namespace;
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::DeleteParams;
use serde_json::{Value, json};

use super::site::{self, MODE, Site};
use crate::stats::{Shuffle, Summary};

/// The kubelet looks after its pods in beats of about this length: pods are made at moments spread evenly over one.
const BEAT: Duration = Duration::from_secs(1);

/// How a pod starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Mesh,
    Outside,
    Without,
}

impl Way {
    const ALL: [Self; 3] = [Self::Mesh, Self::Outside, Self::Without];

    fn name(self) -> &'static str {
        match self {
            Self::Mesh => "mesh",
            Self::Outside => "outside",
            Self::Without => "without",
        }
    }
}

/// Milliseconds from the request that makes a pod to its being seen ready.
#[derive(Debug)]
pub(super) struct Starts {
    pub(super) mesh: Summary,
    pub(super) outside: Summary,
    pub(super) without: Summary,
}

/// Two namespaces, one of them in the mesh.
struct Bench<'a> {
    site: &'a Site,
    mesh: Namespace<'a>,
    outside: Namespace<'a>,
    serial: usize,
}

/// So many of each kind, half of them with Culvert on one node and half with it on the other.
pub(super) fn measure(site: &Site, each: usize) -> Result<Starts> {
    let ambient = format!("{MODE}=ambient");
    let mut bench = Bench {
        site,
        mesh: site.cluster.namespace("start-mesh", &[&ambient])?,
        outside: site.cluster.namespace("start-outside", &[])?,
        serial: 0,
    };
    let mut shuffle = Shuffle::new();
    let mut times: [Vec<f64>; 3] = Default::default();
    let nodes = ["node1", "node2"];
    for (half, with) in nodes.into_iter().enumerate() {
        let without = nodes[1 - half];
        site.give_culvert_to(&[with])?;
        // The first pod of a kind on a node makes what the others find there.
        for way in Way::ALL {
            bench.start(way, if way == Way::Without { without } else { with })?;
        }
        let rounds = if half == 0 {
            each.div_ceil(2)
        } else {
            each / 2
        };
        let mut moments: Vec<usize> = (0..rounds).collect();
        shuffle.shuffle(&mut moments);
        for (round, moment) in moments.into_iter().enumerate() {
            let mut ways = Way::ALL;
            shuffle.shuffle(&mut ways);
            for way in ways {
                wait_for_moment(BEAT * u32::try_from(moment)? / u32::try_from(rounds)?);
                let node = if way == Way::Without { without } else { with };
                times[way as usize].push(bench.start(way, node)?);
            }
            eprint!("\r  {} of {each}", half * each.div_ceil(2) + round + 1);
        }
    }
    eprintln!();
    site.give_culvert_to(&nodes)?;
    let [mesh, outside, without] = times.map(Summary::of);
    Ok(Starts {
        mesh,
        outside,
        without,
    })
}

/// Waits until the clock's second is as old as this.
fn wait_for_moment(moment: Duration) {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default();
    let now = Duration::from_nanos(now.subsec_nanos().into());
    std::thread::sleep((BEAT + moment).saturating_sub(now).min(BEAT * 2));
}

impl Bench<'_> {
    /// Makes a pod, waits until it is ready, and removes it. Milliseconds until it was ready.
    fn start(&mut self, way: Way, node: &str) -> Result<f64> {
        let namespace = if way == Way::Mesh {
            &self.mesh
        } else {
            &self.outside
        };
        self.serial += 1;
        let name = format!("{}-{}", way.name(), self.serial);
        let pod = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "labels": site::labels_of("start")},
            "spec": site::pod_spec(node),
        });
        let started = Instant::now();
        self.site.create::<Pod>(namespace.name(), pod)?;
        let pods = &self.site.pods;
        let (ready, annotated) = pods.until(&format!("{name} is ready"), |all| {
            let pod = all.values().find(|pod| pod.name == name)?;
            // The mesh's pods count when they are in it, which is before they run.
            Some((pod.ready?, pod.annotated))
        })?;
        if (way == Way::Mesh) != annotated {
            let annotated = pods.until(&format!("{name} is told to be in the mesh"), |all| {
                let pod = all.values().find(|pod| pod.name == name)?;
                pod.annotated.then_some(true)
            });
            annotated.with_context(|| format!("{name} is ready and not as it is to be"))?;
        }
        let api = Api::<Pod>::namespaced(self.site.client.clone(), namespace.name());
        let at_once = DeleteParams::default().grace_period(0);
        self.site
            .runtime
            .block_on(api.delete(&name, &at_once))
            .with_context(|| format!("removing {name}"))?;
        pods.until(&format!("{name} is gone"), |all| {
            (!all.values().any(|pod| pod.name == name)).then_some(())
        })?;
        Ok((ready - started).as_secs_f64() * 1e3)
    }
}

impl Starts {
    pub(super) fn json(&self) -> Value {
        json!({
            "unit": "ms", "mesh": self.mesh.json(), "outside": self.outside.json(), "without": self.without.json(),
        })
    }
}
