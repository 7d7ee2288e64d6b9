//! Keeping one watch alive: every end of it is followed by a new one, at once or after a small pause, and the view keeps
//! what it has until a complete new list replaces it.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    hash::{BuildHasher, RandomState},
    pin::pin,
    time::Duration,
};

use futures::{Stream, StreamExt as _};
use k8s_openapi::api::core::v1 as api;
use kube::runtime::watcher::{self, Event};
use tokio::time::{Instant, sleep};

use super::{
    error::{self, Error},
    objects::{self, Metadata},
    outage::Outage,
    stats::{Stats, WELL_AGAIN},
    view::View,
};
use crate::model::{Namespace, Pod, PodUid};

/// Pause after a failure; doubled each time.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// Longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// A failure that goes on is told again this often.
const TELL_AGAIN: Duration = Duration::from_secs(60);

/// Where the objects of one watch go.
pub(super) trait Sink {
    /// What is watched.
    type Object;
    /// A list begins.
    fn begin(&mut self);
    /// One of the list.
    fn listed(&mut self, object: Self::Object);
    /// The list is complete.
    fn complete(&mut self);
    /// New or changed; true if it was not there.
    fn changed(&mut self, object: Self::Object) -> bool;
    /// Gone.
    fn gone(&mut self, object: Self::Object);
}

/// Follows a watch for ever.
pub(super) async fn follow<K>(
    what: &str,
    stream: impl Stream<Item = watcher::Result<Event<K>>>,
    mut sink: impl Sink<Object = K>,
    stats: &Stats,
) {
    let mut stream = pin!(stream);
    let mut trouble = Trouble::default();
    while let Some(event) = stream.next().await {
        match event {
            Ok(Event::Init) => sink.begin(),
            Ok(Event::InitApply(object)) => {
                stats.objects.add();
                sink.listed(object);
            }
            Ok(Event::InitDone) => {
                stats.lists.add();
                sink.complete();
                trouble.over(what, stats);
            }
            Ok(Event::Apply(object)) => {
                stats.objects.add();
                if sink.changed(object) {
                    stats.added.add();
                } else {
                    stats.updated.add();
                }
                trouble.over(what, stats);
            }
            Ok(Event::Delete(object)) => {
                stats.objects.add();
                stats.deleted.add();
                sink.gone(object);
                trouble.over(what, stats);
            }
            Err(e) => {
                let pause = trouble.note(what, &e, stats);
                sleep(pause).await;
            }
        }
    }
}

/// Failures in a row.
#[derive(Default)]
struct Trouble {
    pause: Option<Duration>,
    last: Option<Instant>,
    told: Option<Instant>,
    outage: Outage,
}

impl Trouble {
    fn note(&mut self, what: &str, e: &watcher::Error, stats: &Stats) -> Duration {
        use watcher::Error::{
            InitialListFailed, NoResourceVersion, WatchError, WatchFailed, WatchStartFailed,
        };
        stats.interruptions.add();
        let now = Instant::now();
        // A watch that was resumed and had nothing to say leaves no other trace of being well again.
        if self.last.is_some_and(|l| now - l > WELL_AGAIN) {
            *self = Self::default();
        }
        self.last = Some(now);
        self.outage.failed(what);
        let dead = error::is_dead_connection(e);
        if dead {
            stats.dead_connections.add();
            tracing::warn!(
                what,
                "the connection to the API server had silently died; connecting anew"
            );
        }
        let error = match e {
            InitialListFailed(e) => Error::kube("list", what, e),
            WatchStartFailed(e) | WatchFailed(e) => Error::kube("watch", what, e),
            // 410: the place to go on from is no longer known. The next step lists anew.
            WatchError(status) if status.code == 410 => {
                tracing::debug!(what, "watch fell behind; listing anew");
                self.outage = Outage::default();
                return Duration::ZERO;
            }
            WatchError(status) => Error::kube("watch", what, &kube::Error::Api(status.clone())),
            NoResourceVersion => {
                let cause = kube::Error::Service("an object without resourceVersion".into());
                Error::kube("watch", what, &cause)
            }
        };
        stats.set_trouble(what, Some(error.to_string()));
        self.outage.because(&error);
        if !dead && self.told.is_none_or(|t| now - t > TELL_AGAIN) {
            self.told = Some(now);
            tracing::warn!(what, %error, "watch interrupted; what is known stays valid meanwhile");
        }
        let pause = self.pause.unwrap_or(FIRST_PAUSE);
        self.pause = Some((pause * 2).min(LONGEST_PAUSE));
        // All nodes lose the same API server at the same moment: spread their return.
        let spread = u32::try_from(RandomState::new().hash_one(()) % 256).unwrap_or(0);
        pause * (128 + spread) / 256
    }

    fn over(&mut self, what: &str, stats: &Stats) {
        if self.last.is_some() {
            stats.set_trouble(what, None);
        }
        if self.told.is_some() {
            tracing::info!(what, "watch goes on");
        }
        if self.last.is_some_and(|l| l.elapsed() <= WELL_AGAIN) {
            std::mem::take(&mut self.outage).over();
        }
        *self = Self::default();
    }
}

/// Pods of this node.
pub(super) struct Pods {
    view: View,
    list: BTreeMap<PodUid, Pod>,
}

impl Pods {
    pub(super) fn new(view: View) -> Self {
        let list = BTreeMap::new();
        Self { view, list }
    }
}

impl Sink for Pods {
    type Object = objects::Pod;

    fn begin(&mut self) {
        self.list.clear();
    }

    fn listed(&mut self, object: objects::Pod) {
        if let Some(pod) = objects::pod(object) {
            self.list.insert(pod.uid.clone(), pod);
        }
    }

    fn complete(&mut self) {
        self.view.replace_pods(std::mem::take(&mut self.list));
    }

    fn changed(&mut self, object: objects::Pod) -> bool {
        objects::pod(object).is_some_and(|pod| self.view.set_pod(pod))
    }

    fn gone(&mut self, object: objects::Pod) {
        if let Some(pod) = objects::pod(object) {
            self.view.remove_pod(&pod.uid);
        }
    }
}

/// All namespaces.
pub(super) struct Namespaces {
    view: View,
    list: BTreeMap<String, Namespace>,
}

impl Namespaces {
    pub(super) fn new(view: View) -> Self {
        let list = BTreeMap::new();
        Self { view, list }
    }
}

impl Sink for Namespaces {
    type Object = Metadata<api::Namespace>;

    fn begin(&mut self) {
        self.list.clear();
    }

    fn listed(&mut self, object: Self::Object) {
        self.list.extend(objects::namespace(object.metadata));
    }

    fn complete(&mut self) {
        self.view.replace_namespaces(std::mem::take(&mut self.list));
    }

    fn changed(&mut self, object: Self::Object) -> bool {
        objects::namespace(object.metadata)
            .is_some_and(|(name, namespace)| self.view.set_namespace(name, namespace))
    }

    fn gone(&mut self, object: Self::Object) {
        if let Some(name) = object.metadata.name {
            self.view.remove_namespace(&name);
        }
    }
}

/// Pods of all nodes that ask for the mesh by their own labels: of each, eight bytes are kept.
pub(super) struct OptIns {
    view: View,
    seed: RandomState,
    known: HashMap<String, HashSet<u64>>,
    list: HashMap<String, HashSet<u64>>,
    first: bool,
}

impl OptIns {
    pub(super) fn new(view: View) -> Self {
        Self {
            view,
            seed: RandomState::new(),
            known: HashMap::new(),
            list: HashMap::new(),
            first: true,
        }
    }

    fn key(&self, object: Metadata<objects::Pod>) -> Option<(String, u64)> {
        let Metadata { metadata, .. } = object;
        Some((metadata.namespace?, self.seed.hash_one(metadata.uid?)))
    }
}

impl Sink for OptIns {
    type Object = Metadata<objects::Pod>;

    fn begin(&mut self) {
        self.list.clear();
    }

    fn listed(&mut self, object: Self::Object) {
        if let Some((namespace, pod)) = self.key(object) {
            self.list.entry(namespace).or_default().insert(pod);
        }
    }

    fn complete(&mut self) {
        let count = |set: &HashSet<u64>| isize::try_from(set.len()).unwrap_or(isize::MAX);
        let mut changes: HashMap<String, isize> = HashMap::new();
        for (namespace, pods) in &self.list {
            *changes.entry(namespace.clone()).or_default() += count(pods);
        }
        for (namespace, pods) in &self.known {
            *changes.entry(namespace.clone()).or_default() -= count(pods);
        }
        self.known = std::mem::take(&mut self.list);
        self.view
            .change_opted_in(changes, std::mem::take(&mut self.first));
    }

    fn changed(&mut self, object: Self::Object) -> bool {
        if let Some((namespace, pod)) = self.key(object)
            && self.known.entry(namespace.clone()).or_default().insert(pod)
        {
            self.view.change_opted_in([(namespace, 1)].into(), false);
            return true;
        }
        false
    }

    fn gone(&mut self, object: Self::Object) {
        if let Some((namespace, pod)) = self.key(object)
            && let Some(pods) = self.known.get_mut(&namespace)
            && pods.remove(&pod)
        {
            if pods.is_empty() {
                self.known.remove(&namespace);
            }
            self.view.change_opted_in([(namespace, -1)].into(), false);
        }
    }
}
