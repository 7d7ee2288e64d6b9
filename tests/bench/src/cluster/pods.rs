//! What a watch shows of the benchmark's pods, and when it did. It waits; it changes nothing.

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use culvert::model::keys;
use futures::StreamExt as _;
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::watcher::{Config, Event, watcher};
use kube::{Api, Client};
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

use crate::interrupt;

/// The label of pods that are looked at.
pub(super) const OURS: &str = "culvert.test/bench";
/// Longest that anything is waited for, on a loaded machine.
pub(super) const PATIENCE: Duration = Duration::from_secs(240);
/// How often somebody who waits looks whether to give up.
const LOOK: Duration = Duration::from_millis(100);
/// Between two attempts to watch.
const PAUSE: Duration = Duration::from_millis(500);

/// One pod as the watch shows it.
#[derive(Debug, Clone, Default)]
pub(super) struct Seen {
    pub(super) namespace: String,
    pub(super) name: String,
    /// When it was first shown ready.
    pub(super) ready: Option<Instant>,
    /// Told to be in the mesh, by the annotation that peers go by.
    pub(super) annotated: bool,
    pub(super) leaving: bool,
    pub(super) address: Option<String>,
}

/// By UID.
pub(super) type All = BTreeMap<String, Seen>;

#[derive(Debug, Default)]
struct Shared {
    all: Mutex<All>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, All> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A watch that goes on until it is dropped.
#[derive(Debug)]
pub(super) struct Pods {
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

impl Pods {
    pub(super) fn watch(runtime: &Runtime, client: Client) -> Self {
        let shared = Arc::<Shared>::default();
        let task = runtime.spawn(follow(client, Arc::clone(&shared)));
        Self { shared, task }
    }

    /// Waits until they are as wanted.
    pub(super) fn until<T>(
        &self,
        what: &str,
        mut wanted: impl FnMut(&All) -> Option<T>,
    ) -> Result<T> {
        let started = Instant::now();
        let mut all = self.shared.lock();
        loop {
            if let Some(found) = wanted(&all) {
                return Ok(found);
            }
            interrupt::check()?;
            if started.elapsed() > PATIENCE {
                bail!("{what}: not within {PATIENCE:?}; the pods are\n{all:#?}");
            }
            let waited = self.shared.changed.wait_timeout(all, LOOK);
            all = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Those of a namespace that are to stay, by UID.
    pub(super) fn of(&self, namespace: &str) -> All {
        let mut all = self.shared.lock().clone();
        all.retain(|_, pod| pod.namespace == namespace && !pod.leaving);
        all
    }
}

impl Drop for Pods {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn follow(client: Client, shared: Arc<Shared>) {
    let config = Config::default().labels(OURS);
    let mut stream = pin!(watcher(Api::<Pod>::all(client), config));
    let mut listed = All::new();
    while let Some(event) = stream.next().await {
        match event {
            Ok(Event::Init) => listed.clear(),
            Ok(Event::InitApply(pod)) => {
                let (uid, seen) = seen(&pod);
                listed.insert(uid, seen);
            }
            Ok(Event::InitDone) => {
                let mut all = shared.lock();
                let before = std::mem::replace(&mut *all, std::mem::take(&mut listed));
                for (uid, earlier) in before {
                    if let Some(pod) = all.get_mut(&uid) {
                        pod.ready = earlier.ready.or(pod.ready);
                    }
                }
            }
            Ok(Event::Apply(pod)) => {
                let (uid, mut seen) = seen(&pod);
                let mut all = shared.lock();
                let earlier = all.get(&uid).and_then(|pod| pod.ready);
                seen.ready = earlier.or(seen.ready);
                all.insert(uid, seen);
            }
            Ok(Event::Delete(pod)) => {
                shared
                    .lock()
                    .remove(pod.metadata.uid.as_deref().unwrap_or_default());
            }
            Err(error) => {
                eprintln!("watching pods: {error}");
                tokio::time::sleep(PAUSE).await;
            }
        }
        shared.changed.notify_all();
    }
}

fn seen(pod: &Pod) -> (String, Seen) {
    let meta = &pod.metadata;
    let status = pod.status.as_ref();
    let conditions = status.and_then(|status| status.conditions.as_ref());
    let ready = conditions
        .into_iter()
        .flatten()
        .any(|one| one.type_ == "Ready" && one.status == "True");
    let annotations = meta.annotations.as_ref();
    let told = annotations.and_then(|all| all.get(keys::REDIRECTION));
    let seen = Seen {
        namespace: meta.namespace.clone().unwrap_or_default(),
        name: meta.name.clone().unwrap_or_default(),
        ready: ready.then(Instant::now),
        annotated: told.is_some_and(|value| value == "enabled"),
        leaving: meta.deletion_timestamp.is_some(),
        address: status.and_then(|status| status.pod_ip.clone()),
    };
    (meta.uid.clone().unwrap_or_default(), seen)
}
