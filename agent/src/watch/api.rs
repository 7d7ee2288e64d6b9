//! The Kubernetes API as the agent uses it: five kinds of watches, and the few requests beside them.
//!
//! Of other nodes' pods nothing is kept but how many ask for the mesh in a namespace.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    hash::{DefaultHasher, Hash, Hasher as _},
    sync::Arc,
    time::Duration,
};

use futures::future::join_all;
use k8s_openapi::{
    api::{
        apps::v1::DaemonSet,
        core::v1::{ConfigMap, Namespace, Node},
        networking::v1::NetworkPolicy,
    },
    apimachinery::pkg::apis::meta::v1::Time,
    jiff::Timestamp,
};
use kube::{
    Client,
    api::{ListParams, ObjectList, PartialObjectMeta, Patch, PatchParams},
    runtime::watcher::{self, watcher},
};
use serde_json::json;
use tokio::{
    sync::{Semaphore, watch},
    time::timeout,
};

use super::{
    cilium::{self, Cilium},
    error::{Error, Result},
    events::{self, Notice},
    follow::{Namespaces, OptIns, Pods, follow},
    objects::{self, Metadata},
    policies::Policies,
    preflight::{self, Right},
    removal::{self, Standing},
    stats::Stats,
    view::View,
};
use crate::{
    model::{Cluster, Pod, PodRef, Redirection, Uncaptured, keys},
    plan::cilium::{CONFIG, Settings},
};

/// Pods a page: whole objects, of which a page at a time is in memory.
const PODS_PAGE: u32 = 50;
/// Objects a page where only metadata comes.
const METADATA_PAGE: u32 = 250;
/// Shortest life of a watch, in seconds, and by how much nodes differ, so that they do not all ask again at the same
/// moment.
const WATCH_SECONDS: (u32, u64) = (300, 240);
/// One attempt at a request.
const ATTEMPT: Duration = Duration::from_secs(3);
/// Attempts at a request: the first may have been made over a connection that had died.
const ATTEMPTS: u32 = 2;
/// Requests at a time, so that a namespace's worth of annotations does not open hundreds of connections.
const AT_ONCE: usize = 16;

/// What the agent says about itself to the API.
#[derive(Clone, Debug)]
pub struct Options {
    /// This node's name.
    pub node: String,
    /// This agent's name in events: its pod's, or the node's.
    pub instance: String,
    /// Label selectors of pods that ask for the mesh themselves:
    /// [`Settings::opt_in_selectors`](crate::plan::settings::Settings::opt_in_selectors).
    pub opt_in: BTreeSet<String>,
}

/// The API server.
pub struct Api {
    client: Client,
    view: View,
    options: Options,
    stats: Arc<Stats>,
    slots: Semaphore,
    events: events::Queue,
    cilium: watch::Sender<Cilium>,
}

/// What became of something written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Written {
    /// It is there.
    Done,
    /// The pod is gone, or another has its name now: there is nothing to write to any more.
    Gone,
}

impl Api {
    /// Asks nothing yet; [`Self::run`] does.
    #[must_use]
    pub fn new(client: Client, options: Options) -> Self {
        let stats = Arc::new(Stats::default());
        Self {
            client,
            view: View::new(options.opt_in.len()),
            stats: Arc::clone(&stats),
            slots: Semaphore::new(AT_ONCE),
            events: events::Queue::new(stats),
            cilium: watch::Sender::default(),
            options,
        }
    }

    /// The picture of the cluster.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<Cluster> {
        self.view.subscribe()
    }

    /// What Cilium was asked to do, as it changes.
    #[must_use]
    pub fn cilium(&self) -> watch::Receiver<Cilium> {
        self.cilium.subscribe()
    }

    /// What was counted.
    #[must_use]
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Watches and writes events until it is dropped.
    pub async fn run(&self) {
        let Options {
            node,
            instance,
            opt_in,
        } = &self.options;
        let mut hash = DefaultHasher::new();
        node.hash(&mut hash);
        let (least, spread) = WATCH_SECONDS;
        let seconds = least + u32::try_from(hash.finish() % spread).unwrap_or(0);
        let config = || watcher::Config::default().timeout(seconds);

        let pods = config()
            .fields(&format!("spec.nodeName={node}"))
            .page_size(PODS_PAGE);
        let pods = follow(
            "pods of this node",
            watcher(kube::Api::<objects::Pod>::all(self.client.clone()), pods),
            Pods::new(self.view.clone()),
            &self.stats,
        );
        let namespaces = follow(
            "namespaces",
            watcher(
                kube::Api::<Metadata<Namespace>>::all(self.client.clone()),
                config().page_size(METADATA_PAGE),
            ),
            Namespaces::new(self.view.clone()),
            &self.stats,
        );
        let opt_ins = opt_in.iter().map(|selector| {
            follow(
                "pods that ask for the mesh",
                watcher(
                    kube::Api::<Metadata<objects::Pod>>::all(self.client.clone()),
                    config().labels(selector).page_size(METADATA_PAGE),
                ),
                OptIns::new(self.view.clone()),
                &self.stats,
            )
        });
        let policies = follow(
            "network policies",
            watcher(
                kube::Api::<NetworkPolicy>::all(self.client.clone()),
                config().page_size(METADATA_PAGE),
            ),
            Policies::new(self.view.clone()),
            &self.stats,
        );
        let (cilium_namespace, cilium_name) = CONFIG;
        let cilium = follow(
            "Cilium's configuration",
            watcher(
                kube::Api::<ConfigMap>::namespaced(self.client.clone(), cilium_namespace),
                config().fields(&format!("metadata.name={cilium_name}")),
            ),
            cilium::Keep::new(self.cilium.clone()),
            &self.stats,
        );
        tokio::join!(
            pods,
            namespaces,
            policies,
            cilium,
            join_all(opt_ins),
            self.events.write(&self.client, node, instance),
        );
    }

    /// A pod as the API server has it now, for those the watch has not shown yet. Whether it is the one meant is for the
    /// caller to see: [`Pod::is_called`].
    pub async fn get_pod(&self, namespace: &str, name: &str) -> Result<Option<Pod>> {
        let api = kube::Api::<objects::Pod>::namespaced(self.client.clone(), namespace);
        let object = format!("{namespace}/{name}");
        let found = self.ask("read pod", &object, || api.get_opt(name)).await?;
        Ok(found.and_then(objects::pod))
    }

    /// Tells istiod, by the pod's annotation, whether peers may speak HBONE to it; `None` takes the annotation away.
    pub async fn set_redirection(&self, pod: &PodRef, to: Option<Redirection>) -> Result<Written> {
        // With the UID, the server refuses to write to a successor of the same name.
        let patch = Patch::Merge(json!({
            "metadata": {
                "uid": pod.uid.as_str(),
                "annotations": { keys::REDIRECTION: to.map(Redirection::as_str) },
            }
        }));
        self.patch_status("annotate pod", pod, &patch).await
    }

    /// Says by a condition of the pod why it is not in the mesh; `None` takes the condition away.
    pub async fn set_uncaptured(&self, pod: &PodRef, to: Option<&Uncaptured>) -> Result<Written> {
        let condition = match to {
            Some(why) => json!({
                "type": keys::CAPTURED,
                "status": "False",
                "reason": why.reason,
                "message": why.message,
                "lastTransitionTime": Time(Timestamp::now()),
            }),
            None => json!({ "$patch": "delete", "type": keys::CAPTURED }),
        };
        // A merge patch would replace all conditions, the kubelet's too; this one goes by their type.
        let patch = Patch::Strategic(json!({
            "metadata": { "uid": pod.uid.as_str() },
            "status": { "conditions": [condition] },
        }));
        self.patch_status("write a condition of pod", pod, &patch)
            .await
    }

    async fn patch_status(
        &self,
        what: &'static str,
        pod: &PodRef,
        patch: &Patch<serde_json::Value>,
    ) -> Result<Written> {
        let api = kube::Api::<objects::Pod>::namespaced(self.client.clone(), &pod.namespace);
        let params = PatchParams::default();
        let written = self
            .ask(what, pod, || api.patch_status(&pod.name, &params, patch))
            .await;
        match written {
            Ok(_) => Ok(Written::Done),
            Err(e) if e.code == 404 => Ok(Written::Gone),
            // Either another pod has the name, or the object changed under the patch.
            Err(e) if e.code == 409 || e.code == 422 => {
                let now = self.get_pod(&pod.namespace, &pod.name).await?;
                if now.is_some_and(|p| p.uid == pod.uid) {
                    Err(e)
                } else {
                    Ok(Written::Gone)
                }
            }
            Err(e) => Err(e),
        }
    }

    /// Says something about a pod or this node, where `kubectl describe` shows it. Never waits; what is too much is
    /// merged or dropped and counted.
    pub fn event(&self, notice: Notice) {
        self.events.push(notice);
    }

    /// Whether the agent's DaemonSet still wants an agent on this node.
    pub async fn standing(&self, namespace: &str, name: &str) -> Standing {
        let daemonsets = kube::Api::<DaemonSet>::namespaced(self.client.clone(), namespace);
        let object = format!("{namespace}/{name}");
        let nodes = kube::Api::<Node>::all(self.client.clone());
        let own = &self.options.node;
        let namespaces = kube::Api::<Namespace>::all(self.client.clone());
        let named = ListParams::default().fields(&format!("metadata.name={namespace}"));
        // All at once: whoever asks is about to end, and each may meet a connection that has died.
        let (daemonset, node, around) = tokio::join!(
            self.ask("read DaemonSet", &object, || daemonsets.get_opt(name)),
            self.ask("read node", own, || nodes.get_opt(own)),
            self.ask("read namespace", namespace, || namespaces
                .list_metadata(&named)),
        );
        let daemonset = match daemonset {
            Ok(Some(daemonset)) => daemonset,
            Ok(None) => return Standing::Removed("its DaemonSet is gone".into()),
            Err(e) => return removal::unanswered(e),
        };
        if let Some(standing) = removal::without_node(&daemonset) {
            return standing;
        }
        // Of a namespace that goes, pods go first, and the DaemonSet looks as if it wanted others.
        let goes = |around: ObjectList<PartialObjectMeta<Namespace>>| {
            let mut found = around.items.into_iter();
            found.any(|one| one.metadata.deletion_timestamp.is_some())
        };
        if around.is_ok_and(goes) {
            return Standing::Removed("its namespace is being deleted".into());
        }
        match node {
            Ok(Some(node)) => removal::on_node(&daemonset, &node),
            Ok(None) => Standing::Removed("its node is gone".into()),
            Err(e) => removal::unanswered(e),
        }
    }

    /// Which of its rights the agent has; `own` is its namespace.
    pub async fn rights(&self, own: &str) -> Result<Vec<Right>> {
        preflight::rights(&self.client, own).await
    }

    /// Labels of this node.
    pub async fn node_labels(&self) -> Result<BTreeMap<String, String>> {
        let nodes = kube::Api::<Node>::all(self.client.clone());
        let node = &self.options.node;
        let found = self.ask("read node", node, || nodes.get(node)).await?;
        Ok(found.metadata.labels.unwrap_or_default())
    }

    /// What Cilium was asked to do, asked for directly; `None` where it is not installed.
    pub async fn cilium_config(&self) -> Result<Option<Settings>> {
        let (namespace, name) = CONFIG;
        let maps = kube::Api::<ConfigMap>::namespaced(self.client.clone(), namespace);
        let object = format!("{namespace}/{name}");
        let found = self
            .ask("read ConfigMap", object, || maps.get_opt(name))
            .await?;
        Ok(found.map(|map| crate::plan::cilium::settings(map.data.unwrap_or_default())))
    }

    /// Requests that may be repeated, within a time that an ADD can wait.
    async fn ask<T, F>(
        &self,
        operation: &'static str,
        object: impl fmt::Display,
        request: impl Fn() -> F,
    ) -> Result<T>
    where
        F: Future<Output = kube::Result<T>>,
    {
        // Never closed, so an error cannot be; going on without a slot would be right as well.
        let _slot = self.slots.acquire().await.ok();
        let mut attempt = 1;
        loop {
            let error = match timeout(ATTEMPT, request()).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(e)) => Error::kube(operation, &object, &e),
                Err(_) => Error::slow(operation, &object),
            };
            if error.code != 0 || attempt == ATTEMPTS {
                return Err(error);
            }
            attempt += 1;
        }
    }
}

impl fmt::Debug for Api {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Api")
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}
