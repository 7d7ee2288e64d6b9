//! Which pods are served: the node agent's messages, turned into proxies that start and stop.
//!
//! Owns the set of pods, the snapshot's bookkeeping and the retry of what could not start. It must not touch packets (`zds`)
//! or a pod's traffic (`pod`).

use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::messages::{AddWorkload, Request};
use crate::netns::Netns;
use crate::pod::{Pod, Workload};
use crate::zds::{Connection, Incoming, ZdsError};

const FIRST_BACKOFF: Duration = Duration::from_millis(20);
const LONGEST_BACKOFF: Duration = Duration::from_secs(15);
/// How often ztunnel tries again what it has nacked.
const RETRY: Duration = Duration::from_secs(5);

/// The pods being served, by UID; shared with the statistics.
#[derive(Clone, Debug, Default)]
pub struct Pods(Arc<Mutex<HashMap<String, Arc<Pod>>>>);

impl Pods {
    /// All of them, in no order.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Pod>> {
        self.lock().values().cloned().collect()
    }

    fn get(&self, uid: &str) -> Option<Arc<Pod>> {
        self.lock().get(uid).cloned()
    }

    fn insert(&self, pod: Arc<Pod>) {
        self.lock().insert(pod.workload.uid.clone(), pod);
    }

    fn remove(&self, uid: &str) -> Option<Arc<Pod>> {
        self.lock().remove(uid)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Arc<Pod>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The proxy's view of the node agent's wishes.
#[derive(Debug)]
pub struct Manager {
    config: Arc<Config>,
    pods: Pods,
    /// Wished for, but not started; retried while the connection lasts.
    pending: HashMap<String, (Workload, Netns)>,
    /// What the snapshot has named so far; `None` once it is complete.
    snapshot: Option<HashSet<String>>,
}

impl Manager {
    /// A manager without pods.
    #[must_use]
    pub fn new(config: Arc<Config>) -> Self {
        Self {
            config,
            pods: Pods::default(),
            pending: HashMap::new(),
            snapshot: None,
        }
    }

    /// The pods, for the statistics.
    #[must_use]
    pub fn pods(&self) -> Pods {
        self.pods.clone()
    }

    /// Follows the node agent until `stop`, through as many connections as it takes.
    ///
    /// # Errors
    /// When the agent breaks the protocol. A connection that ends is no error: pods stay until a later snapshot leaves them out.
    pub async fn run(&mut self, path: &Path, stop: &CancellationToken) -> Result<(), ZdsError> {
        let mut backoff = FIRST_BACKOFF;
        loop {
            let conversation = async {
                let connection = Connection::open(path).await?;
                tracing::info!(path = %path.display(), "connected to the node agent");
                backoff = FIRST_BACKOFF;
                self.converse(&connection).await
            };
            let ended = tokio::select! {
                () = stop.cancelled() => return Ok(()),
                ended = conversation => ended,
            };
            match ended {
                Ok(()) => tracing::info!("the node agent has closed the connection"),
                Err(ZdsError::Io(error)) => tracing::debug!(%error, ?backoff, "no node agent"),
                Err(error) => return Err(error),
            }
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                () = tokio::time::sleep(backoff) => backoff = LONGEST_BACKOFF.min(backoff * 2),
            }
        }
    }

    async fn converse(&mut self, connection: &Connection) -> Result<(), ZdsError> {
        self.snapshot = Some(HashSet::new());
        self.pending.clear();
        let mut retry = tokio::time::interval(RETRY);
        loop {
            tokio::select! {
                incoming = connection.next() => match incoming {
                    Ok(None) => return Ok(()),
                    Ok(Some(incoming)) => self.answer(connection, incoming).await?,
                    Err(error @ ZdsError::Protocol(_)) => {
                        connection.answer(&error.to_string()).await?;
                        return Err(error);
                    }
                    Err(error) => return Err(error),
                },
                _ = retry.tick() => self.retry_pending(),
            }
        }
    }

    async fn answer(
        &mut self,
        connection: &Connection,
        incoming: Incoming,
    ) -> Result<(), ZdsError> {
        match self.process(incoming) {
            Ok(()) => connection.answer("").await,
            Err(Refusal::Pod(error)) => {
                tracing::error!(
                    error = format!("{error:#}"),
                    "cannot serve the pod, trying again later"
                );
                connection
                    .answer(&format!("failure to start proxy: {error:#}"))
                    .await
            }
            Err(Refusal::Protocol(what)) => {
                connection.answer(what).await?;
                Err(ZdsError::Protocol(what.to_owned()))
            }
        }
    }

    fn process(&mut self, Incoming { request, netns }: Incoming) -> Result<(), Refusal> {
        match (request, netns) {
            (Request::Add(add), Some(netns)) => self.add(add, netns),
            (Request::Add(_), None) => Err(Refusal::Protocol("Add without a network namespace")),
            (Request::Keep(keep), _) => {
                let named = self
                    .snapshot
                    .as_mut()
                    .ok_or(Refusal::Protocol("Keep after SnapshotSent"))?;
                named.insert(keep.uid);
                Ok(())
            }
            (Request::Del(del), _) => {
                if self.snapshot.is_some() {
                    return Err(Refusal::Protocol("Del before SnapshotSent"));
                }
                self.remove(&del.uid);
                Ok(())
            }
            (Request::SnapshotSent(_), _) => {
                let named = self
                    .snapshot
                    .take()
                    .ok_or(Refusal::Protocol("a second SnapshotSent"))?;
                for pod in self.pods.all() {
                    if !named.contains(&pod.workload.uid) {
                        self.remove(&pod.workload.uid);
                    }
                }
                tracing::info!(
                    pods = self.pods.all().len(),
                    pending = self.pending.len(),
                    "snapshot complete"
                );
                Ok(())
            }
        }
    }

    fn add(&mut self, add: AddWorkload, netns: OwnedFd) -> Result<(), Refusal> {
        if let Some(named) = &mut self.snapshot {
            named.insert(add.uid.clone());
        }
        let netns = Netns::new(netns).map_err(anyhow::Error::from)?;
        let workload = Workload {
            uid: add.uid,
            info: add.workload_info.unwrap_or_default(),
        };
        Ok(self.start(workload, netns)?)
    }

    fn start(&mut self, workload: Workload, netns: Netns) -> anyhow::Result<()> {
        self.pending.remove(&workload.uid);
        if let Some(existing) = self.pods.get(&workload.uid) {
            if existing.netns.inode() == netns.inode() {
                return Ok(());
            }
            // The sandbox was made anew: the old namespace's proxy is of no use to anyone.
            self.remove(&workload.uid);
        }
        match Pod::start(self.config.clone(), workload.clone(), netns.clone()) {
            Ok(pod) => {
                self.pods.insert(pod);
                Ok(())
            }
            Err(error) => {
                self.pending.insert(workload.uid.clone(), (workload, netns));
                Err(error)
            }
        }
    }

    fn remove(&mut self, uid: &str) {
        self.pending.remove(uid);
        if let Some(pod) = self.pods.remove(uid) {
            pod.cut();
        }
    }

    fn retry_pending(&mut self) {
        for (uid, (workload, netns)) in std::mem::take(&mut self.pending) {
            match self.start(workload, netns) {
                Ok(()) => tracing::info!(uid, "pod is served now"),
                Err(error) => tracing::warn!(
                    uid,
                    error = format!("{error:#}"),
                    "still cannot serve the pod"
                ),
            }
        }
    }

    /// Lets every pod's connections finish, for as long as the configuration allows.
    pub async fn drain(&self) {
        let pods = self.pods.all();
        for pod in &pods {
            pod.stop_accepting();
        }
        let all_done = async {
            for pod in &pods {
                pod.idle().await;
            }
        };
        if tokio::time::timeout(self.config.drain, all_done)
            .await
            .is_err()
        {
            tracing::warn!(after = ?self.config.drain, "cutting the connections that are left");
        }
        for pod in &pods {
            pod.cut();
        }
    }
}

/// Why a request is not acked.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error(transparent)]
    Pod(#[from] anyhow::Error),
    #[error("{0}")]
    Protocol(&'static str),
}
