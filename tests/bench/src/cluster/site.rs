//! The cluster that is measured, with a stand-in ztunnel on each node and Culvert on those that are to have it, and one
//! who may do everything there. What is measured is the parts' business.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use culvert::watch::client;
use culvert_cluster::{AGENT, Cluster, Mesh, Node, Options, POD, PROXY};
use k8s_openapi::api::core::v1::Namespace;
use kube::Client;
use kube::api::{Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use super::pods::{OURS, PATIENCE, Pods};
use crate::interrupt;

/// The label of nodes that are to have an agent.
const WANTED: &str = "culvert.test/agent";
/// The label of nodes that are more than an object.
const REAL: &str = "culvert.test/real";
/// The label that decides about the mesh.
pub(super) const MODE: &str = "istio.io/dataplane-mode";
/// How often something that cannot be watched is asked for.
const LOOK: Duration = Duration::from_millis(10);

/// Everything that is up; it goes with the value.
pub(super) struct Site {
    pub(super) pods: Pods,
    pub(super) client: Client,
    pub(super) runtime: Runtime,
    pub(super) cluster: Cluster,
}

impl Site {
    pub(super) fn new() -> Result<Self> {
        let cluster = Cluster::up(&Options {
            name: "bench".to_owned(),
            ..Options::default()
        })?;
        interrupt::check()?;
        Mesh::install(&cluster)?;
        cluster.add_workload()?;
        interrupt::check()?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .context("starting the runtime")?;
        let client = runtime.block_on(async {
            let config = client::config(Some(cluster.admin_kubeconfig())).await?;
            client::connect(&config)
        })?;
        let site = Self {
            pods: Pods::watch(&runtime, client.clone()),
            client,
            runtime,
            cluster,
        };
        site.choose_nodes()?;
        Ok(site)
    }

    /// From now on labels say which nodes have an agent; all do.
    fn choose_nodes(&self) -> Result<()> {
        let nodes = self.cluster.nodes();
        for node in &nodes {
            let (real, wanted) = (format!("{REAL}=yes"), format!("{WANTED}=yes"));
            let label = ["label", "node", &node.name(), &real, &wanted];
            self.cluster.kubectl(&label)?;
        }
        for ((name, namespace), label) in [(AGENT, WANTED), (PROXY, REAL)] {
            let patch = json!({"spec": {"template": {"spec": {"nodeSelector": {label: "yes"}}}}});
            let patch = patch.to_string();
            let args = ["patch", "daemonset", name, "-n", namespace, "-p", &patch];
            self.cluster.kubectl(&args)?;
        }
        let mesh = self.mesh()?;
        mesh.wait_for_rollout(PROXY.0, PROXY.1)?;
        mesh.wait_for_rollout(AGENT.0, AGENT.1)
    }

    /// Lets these nodes, and no others, have Culvert; where it is not, nothing of it is in the way of a pod's start.
    pub(super) fn give_culvert_to(&self, chosen: &[&str]) -> Result<()> {
        for node in self.cluster.nodes() {
            let name = node.name();
            let label = if chosen.contains(&name.as_str()) {
                format!("{WANTED}=yes")
            } else {
                format!("{WANTED}-")
            };
            self.cluster
                .kubectl(&["label", "--overwrite", "node", &name, &label])?;
        }
        for node in self.cluster.nodes() {
            let wanted = chosen.contains(&node.name().as_str());
            self.until(
                &format!(
                    "Culvert is in the CNI configuration of {}: {wanted}",
                    node.name()
                ),
                || Ok(in_cni_configuration(&node)? == wanted),
            )?;
        }
        self.mesh()?.wait_for_rollout(AGENT.0, AGENT.1)
    }

    pub(super) fn mesh(&self) -> Result<Mesh<'_>> {
        Mesh::install(&self.cluster)
    }

    /// Asks until it holds.
    pub(super) fn until(&self, what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
        let started = Instant::now();
        while !holds()? {
            interrupt::check()?;
            ensure!(
                started.elapsed() < PATIENCE,
                "{what}: not within {PATIENCE:?}"
            );
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    /// Labels a namespace, or takes its label away.
    pub(super) fn set_mode(&self, namespace: &str, mode: Option<&str>) -> Result<()> {
        let api = kube::Api::<Namespace>::all(self.client.clone());
        let patch = Patch::Merge(json!({"metadata": {"labels": {MODE: mode}}}));
        self.runtime
            .block_on(api.patch(namespace, &PatchParams::default(), &patch))
            .with_context(|| format!("labelling namespace {namespace}"))
            .map(drop)
    }

    /// Makes an object of a namespace.
    pub(super) fn create<K>(&self, namespace: &str, object: Value) -> Result<K>
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>
            + Clone
            + std::fmt::Debug
            + serde::Serialize
            + serde::de::DeserializeOwned,
    {
        let object: K = serde_json::from_value(object).context("a manifest of the benchmark")?;
        let api = kube::Api::<K>::namespaced(self.client.clone(), namespace);
        self.runtime
            .block_on(api.create(&PostParams::default(), &object))
            .with_context(|| format!("making a {} in {namespace}", K::kind(&())))
    }

    /// UIDs of the pods that a node's ztunnel serves, by its own account.
    pub(super) fn served(&self, node: &Node) -> Result<Vec<String>> {
        let stats = self.mesh()?.stats(node)?;
        let pods = stats["pods"].as_array().context("no pods in the stats")?;
        let uid = |pod: &Value| pod["uid"].as_str().map(str::to_owned);
        Ok(pods.iter().filter_map(uid).collect())
    }

    /// How many pods a node's kernel captures, by what is attached to them.
    pub(super) fn captured(&self, node: &Node) -> Result<usize> {
        let culvert = Mesh::culvert()?;
        let list = [
            culvert.as_os_str(),
            "netns".as_ref(),
            "list".as_ref(),
            "-o".as_ref(),
            "json".as_ref(),
        ];
        let text = self.cluster.run_on(node, &list)?;
        let list: Value = serde_json::from_str(&text).context("culvert netns list")?;
        let pods = list["pods"].as_array().context("no pods in the list")?;
        Ok(pods.iter().filter(|pod| pod["state"] == "enrolled").count())
    }
}

/// The spec of a light pod: a server that does nothing unasked and ends when it is told to.
pub(super) fn pod_spec(node: &str) -> Value {
    json!({
        "nodeSelector": {"kubernetes.io/hostname": node},
        "containers": [{"name": "main", "image": POD, "args": ["serve"]}],
    })
}

/// Labels of pods that are watched, with their name.
pub(super) fn labels_of(app: &str) -> Value {
    json!({OURS: "yes", "app": app})
}

fn in_cni_configuration(node: &Node) -> Result<bool> {
    let dir = node.dir().join("etc/cni/net.d");
    for entry in fs::read_dir(&dir).with_context(|| format!("reading {}", dir.display()))? {
        let text = fs::read_to_string(entry?.path()).unwrap_or_default();
        if text.contains("culvert-cni") {
            return Ok(true);
        }
    }
    Ok(false)
}
