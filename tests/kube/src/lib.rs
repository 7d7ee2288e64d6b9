//! What the tests of the watch share: a real API server, somebody who may do everything there, and the agent's watch
//! with a service account that may do what `culvert::watch::rbac` lists and nothing else.
//!
//! No mock: each [`Bed`] starts an etcd and an API server of its own.

pub mod node;
pub mod rbac;
pub mod relay;

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use culvert::{
    model::{Cluster, Pod as ModelPod, PodRef},
    plan::settings::Settings,
    watch::{Api, Options, client},
};
use culvert_cluster::ControlPlane;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::{
    Client,
    api::{DeleteParams, Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};
use tokio::{sync::watch, task::JoinHandle};

/// How long anything may take on a loaded machine.
pub const LONG: Duration = Duration::from_secs(30);
/// The node whose agent is tested.
pub const NODE: &str = "here";
/// Namespace and service account of the agent.
pub const HOME: (&str, &str) = ("culvert-system", "culvert");
/// The label that decides.
pub const MODE: &str = "istio.io/dataplane-mode";

/// An API server with roles as the agent needs them.
pub struct Bed {
    /// The servers.
    pub plane: ControlPlane,
    /// May do everything.
    pub admin: Client,
    /// The agent's credentials.
    pub kubeconfig: PathBuf,
}

/// A running watch, as in the agent.
pub struct Watcher {
    /// What is tested.
    pub api: Arc<Api>,
    /// What it shows.
    pub cluster: watch::Receiver<Cluster>,
    task: JoinHandle<()>,
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Bed {
    /// Starts the servers and makes roles.
    pub async fn start(name: &str) -> Result<Self> {
        let plane = tokio::task::block_in_place(|| ControlPlane::start(name))?;
        let config = client::config(Some(plane.admin_kubeconfig())).await?;
        let admin = client::connect(&config)?;
        let (namespace, account) = HOME;
        plane.apply(&rbac::manifests(|_, _| true)?)?;
        plane.apply(&format!(
            "apiVersion: v1\nkind: Node\nmetadata: {{name: {NODE}}}\n"
        ))?;
        let kubeconfig = plane.kubeconfig_for(namespace, account)?;
        Ok(Self {
            plane,
            admin,
            kubeconfig,
        })
    }

    /// The agent's watch, running.
    pub async fn watcher(&self) -> Result<Watcher> {
        let config = client::config(Some(&self.kubeconfig)).await?;
        Ok(watch_with(client::connect(&config)?))
    }

    /// Makes a namespace.
    pub async fn namespace(&self, name: &str, labels: Value) -> Result<()> {
        let namespace = serde_json::from_value(json!({
            "metadata": {"name": name, "labels": labels}
        }))?;
        let api = kube::Api::<Namespace>::all(self.admin.clone());
        api.create(&PostParams::default(), &namespace).await?;
        Ok(())
    }

    /// Changes something of a namespace.
    pub async fn patch_namespace(&self, name: &str, patch: Value) -> Result<()> {
        let api = kube::Api::<Namespace>::all(self.admin.clone());
        let params = PatchParams::default();
        api.patch(name, &params, &Patch::Merge(patch)).await?;
        Ok(())
    }

    /// Pods of a namespace.
    pub fn pods(&self, namespace: &str) -> kube::Api<Pod> {
        kube::Api::namespaced(self.admin.clone(), namespace)
    }

    /// Makes a pod on a node, without status.
    pub async fn pod(&self, namespace: &str, name: &str, node: &str, more: Value) -> Result<Pod> {
        let pod = pod_manifest(name, node, more)?;
        let made = self.pods(namespace);
        Ok(made.create(&PostParams::default(), &pod).await?)
    }

    /// Makes many pods, named by number.
    pub async fn many_pods(&self, namespace: &str, node: &str, count: usize) -> Result<()> {
        let pods = self.pods(namespace);
        stream::iter(0..count)
            .map(|i| {
                let pods = pods.clone();
                async move {
                    let pod = pod_manifest(&format!("{node}-{i}"), node, json!({}))?;
                    pods.create(&PostParams::default(), &pod).await?;
                    anyhow::Ok(())
                }
            })
            .buffer_unordered(16)
            .try_collect::<()>()
            .await
    }

    /// Sets a pod's status, as its kubelet would.
    pub async fn status(&self, namespace: &str, name: &str, status: Value) -> Result<()> {
        let patch = Patch::Merge(json!({ "status": status }));
        let params = PatchParams::default();
        self.pods(namespace)
            .patch_status(name, &params, &patch)
            .await?;
        Ok(())
    }

    /// Changes a pod's metadata.
    pub async fn patch_pod(&self, namespace: &str, name: &str, metadata: Value) -> Result<()> {
        let patch = Patch::Merge(json!({ "metadata": metadata }));
        let params = PatchParams::default();
        self.pods(namespace).patch(name, &params, &patch).await?;
        Ok(())
    }

    /// Takes a pod away at once.
    pub async fn delete_pod(&self, namespace: &str, name: &str) -> Result<()> {
        let at_once = DeleteParams::default().grace_period(0);
        self.pods(namespace).delete(name, &at_once).await?;
        Ok(())
    }
}

/// A watch over this client.
#[must_use]
pub fn watch_with(client: Client) -> Watcher {
    let options = Options {
        node: NODE.into(),
        instance: "culvert-test".into(),
        opt_in: Settings::default().opt_in_selectors(),
    };
    let api = Arc::new(Api::new(client, options));
    let cluster = api.subscribe();
    let running = Arc::clone(&api);
    let task = tokio::spawn(async move { running.run().await });
    Watcher { api, cluster, task }
}

impl Watcher {
    /// Waits until the picture is like that.
    pub async fn until(&mut self, what: &str, holds: impl FnMut(&Cluster) -> bool) -> Result<()> {
        self.within(what, LONG, holds).await.map(drop)
    }

    /// The same with a time; returns how long it took.
    pub async fn within(
        &mut self,
        what: &str,
        time: Duration,
        holds: impl FnMut(&Cluster) -> bool,
    ) -> Result<Duration> {
        let started = Instant::now();
        let waited = tokio::time::timeout(time, self.cluster.wait_for(holds)).await;
        let waited = waited.map(|held| held.map(drop));
        waited
            .with_context(|| format!("{what}: not within {time:?}"))?
            .context("the view is gone")?;
        Ok(started.elapsed())
    }

    /// A pod of the picture.
    #[must_use]
    pub fn find(&self, namespace: &str, name: &str) -> Option<ModelPod> {
        find(&self.cluster.borrow(), namespace, name).cloned()
    }

    /// What names a pod of the picture.
    pub fn reference(&self, namespace: &str, name: &str) -> Result<PodRef> {
        let pod = self.find(namespace, name);
        Ok(pod
            .with_context(|| format!("no pod {namespace}/{name}"))?
            .reference())
    }
}

/// The pod of that name.
#[must_use]
pub fn find<'a>(cluster: &'a Cluster, namespace: &str, name: &str) -> Option<&'a ModelPod> {
    let mut pods = cluster.pods.values();
    pods.find(|p| p.namespace == namespace && p.name == name)
}

/// Waits until something outside the picture holds.
pub async fn eventually<F: Future<Output = Result<bool>>>(
    what: &str,
    mut holds: impl FnMut() -> F,
) -> Result<()> {
    let started = Instant::now();
    while !holds().await? {
        ensure!(started.elapsed() < LONG, "{what}: not within {LONG:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// `more` is merged over a pod with one container.
pub fn pod_manifest(name: &str, node: &str, more: Value) -> Result<Pod> {
    let mut pod = json!({
        "metadata": {"name": name},
        "spec": {"nodeName": node, "containers": [{"name": "app", "image": "app:1"}]},
    });
    merge(&mut pod, more);
    serde_json::from_value(pod).context("making a pod")
}

fn merge(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from,
    }
}

/// Labels of a pod or namespace in this mode.
#[must_use]
pub fn mode(mode: &str) -> Value {
    let labels: BTreeMap<_, _> = [(MODE, mode)].into();
    json!(labels)
}

/// Log lines of the watch in the test's output, by `RUST_LOG`.
pub fn logs() {
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    // Another test of this process was first: fine.
    let _already = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_test_writer()
        .try_init();
}
