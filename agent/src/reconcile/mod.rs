//! Making every pod of the node be as its labels say, again and again.
//!
//! The only caller of both the watch and the kernel. Level-triggered: each pass compares what should be with what is,
//! whatever it was that woke it; an annotation is an output. One pod that fails holds up no other.

mod condition;
mod entry;
pub mod live;
mod pass;
mod plugin;
pub mod publish;
mod report;
mod restore;
mod steps;
#[cfg(test)]
mod tests;
mod told;
mod traced;
pub mod world;

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::sync::{Notify, Semaphore, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    kernel::pod::{Dns, Policy},
    model::{Cluster, PodUid},
    plan::{
        membership::{Settings, Wanted},
        pod::Ztunnel,
    },
};
use entry::Entry;
pub use plugin::Answer;
use publish::Remembered;
use world::{Failure, World};

/// Settings of a [`Reconciler`].
#[derive(Clone, Debug)]
pub struct Options {
    /// Who is in the mesh.
    pub settings: Settings,
    /// How long new connections wait for an absent ztunnel; none = for ever.
    pub grace: Option<Duration>,
    /// Of captured lookups only those that ask a resolver of the pod's own `resolv.conf`.
    pub polite_dns: bool,
    /// ztunnel is told by its process, not by its mark alone.
    pub named_ztunnel: bool,
    /// At most this long between two looks at everything.
    pub period: Duration,
    /// How many pods are worked on at once.
    pub concurrency: usize,
    /// What an earlier agent captured.
    pub remembered: Vec<Remembered>,
    /// Where to write down what is captured, for the next agent.
    pub memory: Option<PathBuf>,
}

impl Options {
    /// What the kernel is to do for a pod that is in the mesh.
    fn policy(&self, wanted: &Wanted) -> Policy {
        Policy {
            exclude_outbound_cidrs: wanted.exclude_outbound_cidrs.iter().copied().collect(),
            exclude_outbound_ports: wanted.exclude_outbound_ports.iter().copied().collect(),
            exclude_inbound_ports: wanted.exclude_inbound_ports.iter().copied().collect(),
            bypass_inbound: wanted.bypass_inbound,
            virtual_interfaces: wanted.virtual_interfaces.clone(),
            hold: self.grace,
            dns: match (wanted.dns, self.polite_dns) {
                (false, _) => Dns::Off,
                (true, false) => Dns::All,
                (true, true) if wanted.resolvers.is_empty() => Dns::ResolvConf,
                (true, true) => Dns::Resolvers(wanted.resolvers.iter().copied().collect()),
            },
            named_ztunnel: self.named_ztunnel,
            ipv6: self.settings.ipv6,
        }
    }
}

/// Keeps the pods of a node as they should be. Cheap to clone.
#[derive(Debug)]
pub struct Reconciler<W: World> {
    inner: Arc<Inner<W>>,
}

impl<W: World> Clone for Reconciler<W> {
    fn clone(&self) -> Self {
        Self {
            inner: Arc::clone(&self.inner),
        }
    }
}

#[derive(Debug)]
struct Inner<W: World> {
    world: W,
    options: Options,
    cluster: watch::Receiver<Cluster>,
    entries: Mutex<BTreeMap<PodUid, Entry<W::Place>>>,
    /// There may be something to do.
    wake: Notify,
    /// Somebody has finished with a pod.
    progress: Notify,
    work: Semaphore,
    /// Passes made, for liveness.
    passes: watch::Sender<u64>,
    /// What an earlier agent captured has been looked for since the cluster was listed.
    adopted: AtomicBool,
    /// All members have been looked for once.
    settled: watch::Sender<bool>,
    /// How often ztunnels have come or gone.
    ztunnels: AtomicU64,
    /// Captured namespaces that no pod of the cluster lays claim to, as counted after the last look for them.
    unclaimed: Mutex<usize>,
}

impl<W: World> Reconciler<W> {
    /// Does nothing until [`Reconciler::run`].
    #[must_use]
    pub fn new(world: W, options: Options, cluster: watch::Receiver<Cluster>) -> Self {
        let work = Semaphore::new(options.concurrency.max(1));
        Self {
            inner: Arc::new(Inner {
                world,
                options,
                cluster,
                entries: Mutex::default(),
                wake: Notify::new(),
                progress: Notify::new(),
                work,
                passes: watch::Sender::new(0),
                adopted: AtomicBool::new(false),
                settled: watch::Sender::new(false),
                ztunnels: AtomicU64::new(0),
                unclaimed: Mutex::new(0),
            }),
        }
    }

    /// The world it acts on.
    #[must_use]
    pub fn world(&self) -> &W {
        &self.inner.world
    }

    /// Counts passes over all pods.
    #[must_use]
    pub fn passes(&self) -> watch::Receiver<u64> {
        self.inner.passes.subscribe()
    }

    /// True once the cluster has been listed and the namespace of each member was looked for: from then on it is known
    /// whom ztunnel has to serve.
    #[must_use]
    pub fn settled(&self) -> watch::Receiver<bool> {
        self.inner.settled.subscribe()
    }

    /// Something may have changed that no watch shows.
    pub fn wake(&self) {
        self.inner.wake.notify_one();
    }

    /// Runs until cancelled. What was begun is finished by then or is taken up by the next agent.
    pub async fn run(&self, end: CancellationToken) {
        let mut cluster = self.inner.cluster.clone();
        let mut tick = tokio::time::interval(self.inner.options.period);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut memory = restore::Memory::default();
        loop {
            let mut changed = false;
            let full = tokio::select! {
                () = end.cancelled() => break,
                _ = tick.tick() => true,
                outcome = cluster.changed() => {
                    if outcome.is_err() {
                        break;
                    }
                    changed = true;
                    false
                }
                () = self.inner.wake.notified() => false,
                () = self.next_due() => false,
                () = memory.due() => {
                    self.write_down(&mut memory).await;
                    continue;
                }
            };
            changed |= cluster.has_changed().unwrap_or(true);
            cluster.mark_unchanged();
            self.pass(full, changed).await;
            memory.outdated();
            self.inner.passes.send_modify(|n| *n += 1);
        }
        self.write_down(&mut memory).await;
    }

    /// Sleeps until a pod that failed may be tried again.
    async fn next_due(&self) {
        let next = {
            let entries = self.entries();
            let again = entries
                .values()
                .filter(|e| !e.busy)
                .filter_map(Entry::again);
            again.min()
        };
        match next {
            Some(at) => tokio::time::sleep_until(at).await,
            None => std::future::pending().await,
        }
    }

    /// ztunnel serves a pod: it said so while its snapshot was sent. Telling it again costs nothing now, and ends in a
    /// look at its listeners.
    pub fn acked(&self, uid: &PodUid) {
        let mut entries = self.entries();
        if let Some(entry) = entries.get_mut(uid)
            && entry.ztunnel == Ztunnel::Waiting
        {
            entry.trouble = None;
            // Whoever is at it has most likely waited for this word, and wakes us at the end.
            let busy = entry.busy;
            drop(entries);
            if !busy {
                self.wake();
            }
        }
    }

    /// ztunnel refused a pod.
    pub fn nacked(&self, uid: &PodUid, error: &str) {
        let failure = Failure {
            message: format!("ztunnel refused the pod: {error}"),
            retry: true,
        };
        let mut said = None;
        if let Some(entry) = self.entries().get_mut(uid) {
            entry.ztunnel = Ztunnel::Waiting;
            said = entry
                .worth_saying(&failure)
                .map(|n| (entry.target.clone(), n));
            entry.failed(failure, tokio::time::Instant::now());
        }
        if let Some((target, notice)) = said {
            let this = self.clone();
            tokio::spawn(async move { this.inner.world.say(&target, notice).await });
        }
        self.wake();
    }

    /// A ztunnel has come or gone; `any` says whether one is there. Who was served is told again: the answer is known
    /// already where the one that counts now serves the pod, and either way its listeners are looked at.
    pub fn ztunnels_changed(&self, any: bool) {
        self.inner.ztunnels.fetch_add(1, Ordering::Relaxed);
        for entry in self.entries().values_mut() {
            match (entry.ztunnel, any) {
                (Ztunnel::Acked | Ztunnel::Away, true) => entry.ztunnel = Ztunnel::Waiting,
                (Ztunnel::Acked, false) => entry.ztunnel = Ztunnel::Away,
                (Ztunnel::Waiting, true) => entry.trouble = None,
                _ => {}
            }
        }
        self.wake();
    }

    fn entries(&self) -> MutexGuard<'_, BTreeMap<PodUid, Entry<W::Place>>> {
        // A panic elsewhere must not stop the repair of pods; each entry is whole between two statements.
        self.inner
            .entries
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
