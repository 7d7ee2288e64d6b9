//! A Deployment's pods on one node: made, counted, enrolled and let go by their namespace's label, and rolled out.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use culvert_cluster::{Namespace, Node};
use k8s_openapi::api::apps::v1::Deployment;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::json;

use super::site::{self, Site};
use crate::interrupt;

/// The namespace of these pods.
pub(super) const NAMESPACE: &str = "shop";
/// The Deployment.
const NAME: &str = "shop";
/// How often the Deployment is asked how far it is, and ztunnel whom it serves.
const LOOK: Duration = Duration::from_millis(20);

/// The pods.
pub(super) struct Fleet<'a> {
    site: &'a Site,
    pub(super) node: Node,
    namespace: Namespace<'a>,
    pub(super) size: usize,
}

/// Seconds after the namespace's label.
#[derive(Debug, Clone, Copy)]
pub(super) struct Turned {
    /// Until ztunnel's own list of pods was right.
    pub(super) ztunnel: f64,
    /// Until all annotations were, as a watch shows them.
    pub(super) annotated: f64,
}

impl Turned {
    /// Until both were.
    pub(super) fn both(self) -> f64 {
        self.ztunnel.max(self.annotated)
    }
}

impl<'a> Fleet<'a> {
    /// Makes so many pods on a node and waits until they run; none is in the mesh.
    pub(super) fn new(site: &'a Site, node: &str, size: usize) -> Result<Self> {
        let namespace = site.cluster.namespace(NAMESPACE, &[])?;
        let deployment = json!({
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": NAME},
            "spec": {
                "replicas": size,
                "selector": {"matchLabels": {"app": NAME}},
                "template": {
                    "metadata": {"labels": site::labels_of(NAME)},
                    "spec": site::pod_spec(node),
                },
            },
        });
        site.create::<Deployment>(NAMESPACE, deployment)?;
        let fleet = Self {
            site,
            node: site.cluster.node(node)?,
            namespace,
            size,
        };
        fleet.settle()?;
        Ok(fleet)
    }

    /// Waits until there are exactly so many pods, all ready.
    pub(super) fn settle(&self) -> Result<()> {
        self.site
            .pods
            .until("the Deployment's pods are ready", |all| {
                let ours = || all.values().filter(|pod| pod.namespace == NAMESPACE);
                let ready = ours().filter(|pod| pod.ready.is_some()).count();
                (ready == self.size && ours().count() == self.size).then_some(())
            })
    }

    /// Makes them more or fewer.
    pub(super) fn scale(&mut self, size: usize) -> Result<()> {
        self.size = size;
        let spec = json!({"spec": {"replicas": size}});
        self.patch(&Patch::Merge(spec)).context("scaling")?;
        self.settle()
    }

    /// The name of one of the pods.
    pub(super) fn one_name(&self) -> Result<String> {
        let pods = self.site.pods.of(NAMESPACE);
        let one = pods.into_values().next().context("no pods")?;
        Ok(one.name)
    }

    /// Fails unless all pods are captured, and served by ztunnel again.
    pub(super) fn still_enrolled(&self) -> Result<()> {
        let captured = self.site.captured(&self.node)?;
        ensure!(
            captured == self.size,
            "of {} enrolled pods the kernel captures {captured}",
            self.size
        );
        self.site.until("ztunnel serves all enrolled pods", || {
            Ok(self.site.served(&self.node)?.len() == self.size)
        })
    }

    fn patch(&self, patch: &Patch<serde_json::Value>) -> Result<Deployment> {
        let api = Api::<Deployment>::namespaced(self.site.client.clone(), NAMESPACE);
        let params = PatchParams::default();
        Ok(self
            .site
            .runtime
            .block_on(api.patch(NAME, &params, patch))?)
    }

    /// Labels the namespace and waits until all pods are enrolled.
    pub(super) fn enrol(&self) -> Result<Turned> {
        self.turn(true)
    }

    /// Takes the label away and waits until all are let go.
    pub(super) fn release(&self) -> Result<Turned> {
        self.turn(false)
    }

    fn turn(&self, into: bool) -> Result<Turned> {
        let pods = self.site.pods.of(NAMESPACE);
        ensure!(
            pods.len() == self.size,
            "{} pods instead of {}",
            pods.len(),
            self.size
        );
        let wanted = if into { self.size } else { 0 };
        let what = if into {
            "all are in the mesh"
        } else {
            "none is in the mesh"
        };
        let started = Instant::now();
        let turned = std::thread::scope(|scope| -> Result<Turned> {
            let ztunnel = scope.spawn(|| {
                self.site.until(&format!("{what}, by ztunnel's list"), || {
                    let served = self.site.served(&self.node)?;
                    Ok(served.iter().filter(|uid| pods.contains_key(*uid)).count() == wanted)
                })?;
                anyhow::Ok(started.elapsed().as_secs_f64())
            });
            self.site.set_mode(NAMESPACE, into.then_some("ambient"))?;
            self.site
                .pods
                .until(&format!("{what}, by annotation"), |all| {
                    let ours = all.values().filter(|pod| pod.namespace == NAMESPACE);
                    let told = ours.filter(|pod| pod.annotated).count();
                    (told == wanted).then_some(())
                })?;
            let annotated = started.elapsed().as_secs_f64();
            let Ok(ztunnel) = ztunnel.join() else {
                bail!("asking ztunnel panicked");
            };
            Ok(Turned {
                ztunnel: ztunnel?,
                annotated,
            })
        })?;
        let captured = self.site.captured(&self.node)?;
        ensure!(
            captured == wanted,
            "{what}, by ztunnel's list and by annotation; the kernel captures {captured} of {}",
            self.size
        );
        ensure!(
            self.through_ztunnel()? == into,
            "{what}, but a connection between two of them goes {} ztunnel",
            if into { "past" } else { "through" }
        );
        Ok(turned)
    }

    /// Whether a connection from one of the pods to another goes through ztunnel, which counts it.
    fn through_ztunnel(&self) -> Result<bool> {
        let pods = self.site.pods.of(NAMESPACE);
        let mut pods = pods.values();
        let (Some(from), Some(to)) = (pods.next(), pods.next()) else {
            bail!("a connection needs two pods");
        };
        let to = to.address.as_deref().context("a pod without an address")?;
        let mesh = self.site.mesh()?;
        // Nobody counts for a pod that is not in the mesh.
        let accepts = || {
            let stats = mesh.pod_stats(NAMESPACE, &from.name).unwrap_or_default();
            stats["outbound_accepts"].as_u64().unwrap_or(0)
        };
        let before = accepts();
        let send = ["/bin/culvert-pod", "send", &format!("{to}:8080"), "a word"];
        self.namespace.exec(&from.name, &send)?;
        Ok(accepts() > before)
    }

    /// Rolls all of them out anew. Seconds until the Deployment says that it is done.
    pub(super) fn roll(&self) -> Result<f64> {
        let stamp = Instant::now();
        let round = format!("{stamp:?}");
        let patch = json!({"spec": {"template": {"metadata": {"annotations": {"culvert.test/round": round}}}}});
        let wanted = self.patch(&Patch::Merge(patch)).context("rolling out")?;
        let generation = wanted.metadata.generation;
        let api = Api::<Deployment>::namespaced(self.site.client.clone(), NAMESPACE);
        let size = i32::try_from(self.size)?;
        loop {
            interrupt::check()?;
            std::thread::sleep(LOOK);
            let now = self.site.runtime.block_on(api.get_status(NAME))?;
            let done = now.status.is_some_and(|status| {
                status.observed_generation >= generation
                    && status.updated_replicas == Some(size)
                    && status.available_replicas == Some(size)
                    && status.replicas == Some(size)
            });
            if done {
                break;
            }
            ensure!(
                stamp.elapsed() < super::pods::PATIENCE,
                "the Deployment is not rolled out within {:?}",
                super::pods::PATIENCE
            );
        }
        let took = stamp.elapsed().as_secs_f64();
        // What is still leaving would be in the way of the next.
        self.settle()?;
        Ok(took)
    }
}
