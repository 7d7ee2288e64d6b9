//! The ZDS server as the agent holds it: tasks that listen and converse, and calls that wait for acks.
//!
//! Joins `registry` (who is told what) with `socket` (how). It decides nothing about the protocol, and holds no lock while
//! it waits.

mod serving;

use std::{
    collections::HashMap,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use nix::sys::stat::fstat;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    registry::{AddError, Adding, Output, PeerId, Registry, Removed},
    report::{Acked, Event, Options, PeerStatus, Status},
    socket::{Credentials, Error, Listener},
    terms::{Generation, Patience, RemovalId, Workload},
};
use crate::model::PodUid;
use serving::{Admit, listen};

/// A handle to the server. Its tasks end, and the socket goes, when the last handle is dropped.
#[derive(Clone, Debug)]
pub struct Server(Arc<Handle>);

#[derive(Debug)]
struct Handle {
    shared: Arc<Shared>,
    _stop: DropGuard,
}

/// A namespace, told from others by what the kernel calls it: we hold it open, so the number is not used again.
#[derive(Clone, Debug)]
struct Netns {
    fd: Arc<OwnedFd>,
    file: Option<(u64, u64)>,
}

impl PartialEq for Netns {
    fn eq(&self, other: &Self) -> bool {
        self.file.is_some() && self.file == other.file
    }
}

#[derive(Debug)]
struct Peer {
    pid: u32,
    pidfd: Option<Arc<OwnedFd>>,
    connected: SystemTime,
    changed: Arc<Notify>,
}

#[derive(Debug)]
struct State {
    registry: Registry<Netns>,
    peers: HashMap<PeerId, Peer>,
    adds: HashMap<Generation, Vec<oneshot::Sender<Result<Acked, AddError>>>>,
    removals: HashMap<RemovalId, oneshot::Sender<Removed>>,
    refused: u64,
    nacks: u64,
    timeouts: u64,
    send_retries: u64,
}

#[derive(Debug)]
struct Shared {
    options: Options,
    state: Mutex<State>,
    events: mpsc::UnboundedSender<Event>,
    /// Nobody listens any more, or a conversation broke off in a panic.
    ended: CancellationToken,
}

impl Server {
    /// Listens at `path` and converses with whoever connects; nobody is answered before [`Server::open`]. Must be called
    /// within a tokio runtime.
    ///
    /// # Errors
    /// When another server answers at the path, or the kernel refuses it.
    pub fn bind(
        path: &Path,
        options: Options,
    ) -> Result<(Self, mpsc::UnboundedReceiver<Event>), Error> {
        Self::bind_with(path, options, |_| Ok(()))
    }

    /// As [`Server::bind`]; each peer's process number is shown to `admit` first, on a thread that may block. Nothing is
    /// said to a peer before that has returned, and nothing ever to one that it refuses.
    ///
    /// # Errors
    /// As [`Server::bind`].
    pub fn bind_with(
        path: &Path,
        options: Options,
        admit: impl Fn(u32) -> Result<(), String> + Send + Sync + 'static,
    ) -> Result<(Self, mpsc::UnboundedReceiver<Event>), Error> {
        let listener = Listener::bind(path)?;
        let (events, receiver) = mpsc::unbounded_channel();
        let patience = Patience {
            hello: options.hello,
            ack: options.ack,
            retry: options.retry,
        };
        let state = State {
            registry: Registry::new(patience),
            peers: HashMap::new(),
            adds: HashMap::new(),
            removals: HashMap::new(),
            refused: 0,
            nacks: 0,
            timeouts: 0,
            send_retries: 0,
        };
        let shared = Arc::new(Shared {
            options,
            state: Mutex::new(state),
            events,
            ended: CancellationToken::new(),
        });
        let stop = CancellationToken::new();
        let admit: Admit = Arc::new(admit);
        tokio::spawn({
            // Goes with the task, be it by a panic.
            let task = shared.ended.clone().drop_guard();
            let (shared, stop) = (Arc::clone(&shared), stop.clone());
            async move {
                listen(shared, listener, admit, stop).await;
                drop(task);
            }
        });
        let handle = Handle {
            shared,
            _stop: stop.drop_guard(),
        };
        Ok((Self(Arc::new(handle)), receiver))
    }

    /// Returns when ztunnels are not listened for or not answered any more: never, while there is a handle and all is well.
    pub async fn ended(&self) {
        self.0.shared.ended.cancelled().await;
    }

    /// The node's pods are listed and their namespaces were looked for: from now on ztunnels get their snapshots.
    pub fn open(&self) {
        self.0.shared.change(|state| state.registry.open());
    }

    /// The pod is in the mesh, and its namespace is not known (any more): ztunnel is asked to keep it if it has it. To be
    /// followed by [`Server::add`] or [`Server::remove`].
    ///
    /// # Errors
    /// [`AddError::TooLong`] alone.
    pub fn expect(&self, uid: PodUid, workload: Workload) -> Result<(), AddError> {
        self.0
            .shared
            .change(|state| state.registry.expect(uid, workload))
    }

    /// The pod is to be served, and this is its namespace. Returns when the ztunnel it went to has acknowledged it; at once
    /// when that has happened before. Whatever the outcome, the pod is part of later snapshots, and what was refused is
    /// offered again. Dropping the future gives up the waiting, not the pod.
    ///
    /// # Errors
    /// See [`AddError`].
    pub async fn add(
        &self,
        uid: PodUid,
        workload: Workload,
        netns: Arc<OwnedFd>,
    ) -> Result<Acked, AddError> {
        let netns = Netns {
            file: fstat(netns.as_fd())
                .ok()
                .map(|stat| (stat.st_dev, stat.st_ino)),
            fd: netns,
        };
        let answer = self.0.shared.change(|state| {
            match state.registry.add(uid, workload, netns) {
                Adding::Served(id) => state.acked(id),
                Adding::Failed(error) => Err(error),
                Adding::Wait(generation) => {
                    let (sender, receiver) = oneshot::channel();
                    let waiting = state.adds.entry(generation).or_default();
                    // Those who gave up must not pile up behind a ztunnel that is slow.
                    waiting.retain(|sender| !sender.is_closed());
                    waiting.push(sender);
                    return Ok(receiver);
                }
            }
            .map_or_else(|error| Err(Err(error)), |acked| Err(Ok(acked)))
        });
        match answer {
            Ok(receiver) => receiver.await.unwrap_or(Err(AddError::Disconnected)),
            Err(known) => known,
        }
    }

    /// The pod is to be served no more. Returns when every ztunnel has let it go, or after [`Options::remove`]. A pod that
    /// nobody knows is let go already. Dropping the future gives up the waiting, not the removal.
    pub async fn remove(&self, uid: &PodUid) -> Removed {
        let shared = &self.0.shared;
        let waiting = shared.change(|state| {
            let id = state.registry.remove(uid)?;
            let (sender, receiver) = oneshot::channel();
            state.removals.insert(id, sender);
            Some((id, receiver))
        });
        let Some((id, receiver)) = waiting else {
            return Removed::default();
        };
        let abandon = Abandon { shared, id };
        match tokio::time::timeout(shared.options.remove, receiver).await {
            Ok(Ok(removed)) => removed,
            Ok(Err(_)) | Err(_) => abandon.now(),
        }
    }

    /// What there is to see.
    #[must_use]
    pub fn status(&self) -> Status {
        let state = self.0.shared.lock();
        let (pods, expected) = state.registry.wanted();
        let peers = state
            .registry
            .peers()
            .filter_map(|(id, phase, pending, (served, nacked))| {
                let peer = state.peers.get(&id)?;
                Some(PeerStatus {
                    pid: peer.pid,
                    connected: peer.connected,
                    state: phase,
                    pending,
                    served,
                    nacked,
                })
            })
            .collect();
        Status {
            open: state.registry.is_open(),
            pods,
            expected,
            peers,
            refused: state.refused,
            nacks: state.nacks,
            timeouts: state.timeouts,
            send_retries: state.send_retries,
        }
    }
}

/// Takes a removal off the books when nobody waits for it any more.
struct Abandon<'a> {
    shared: &'a Shared,
    id: RemovalId,
}

impl Abandon<'_> {
    fn now(&self) -> Removed {
        self.shared.change(|state| {
            state.removals.remove(&self.id);
            state.registry.give_up(self.id)
        })
    }
}

impl Drop for Abandon<'_> {
    fn drop(&mut self) {
        let _nobody_asks = self.now();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something to the state, tells who waits for its outcome, and wakes the conversations.
    fn change<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.lock();
        let result = work(&mut state);
        for output in state.registry.outputs() {
            state.carry_out(output, &self.events);
        }
        for peer in state.peers.values() {
            peer.changed.notify_one();
        }
        result
    }

    fn tell(&self, event: Event) {
        // The agent that does not listen to events has dropped the other end.
        let _nobody_listens = self.events.send(event);
    }

    fn refuse(&self, peer: &Credentials, why: &'static str) {
        self.lock().refused += 1;
        tracing::warn!(
            pid = peer.pid,
            uid = peer.uid,
            why,
            "refused a connection to the ZDS socket"
        );
        self.tell(Event::Refused {
            pid: peer.pid,
            uid: peer.uid,
            why,
        });
    }
}

impl State {
    fn acked(&self, id: PeerId) -> Result<Acked, AddError> {
        let peer = self.peers.get(&id).ok_or(AddError::Disconnected)?;
        Ok(Acked {
            pid: peer.pid,
            pidfd: peer.pidfd.clone(),
        })
    }

    fn carry_out(&mut self, output: Output, events: &mpsc::UnboundedSender<Event>) {
        let pid = |state: &Self, id| state.peers.get(&id).map_or(0, |peer| peer.pid);
        let event = match output {
            Output::Synced(id) => Event::Synced { pid: pid(self, id) },
            Output::Acked(id, uid) => Event::Acked {
                uid,
                pid: pid(self, id),
            },
            Output::Nacked(id, uid, error) => {
                self.nacks += 1;
                let pid = pid(self, id);
                tracing::warn!(pid, %uid, error, "ztunnel refused a pod");
                Event::Nacked { uid, pid, error }
            }
            Output::Added(generation, outcome) => {
                let outcome = outcome.and_then(|id| self.acked(id));
                for waiting in self.adds.remove(&generation).unwrap_or_default() {
                    // Who gave up waiting does not want to know.
                    let _gave_up = waiting.send(outcome.clone());
                }
                return;
            }
            Output::Removed(id, removed) => {
                if let Some(waiting) = self.removals.remove(&id) {
                    let _gave_up = waiting.send(removed);
                }
                return;
            }
        };
        let _nobody_listens = events.send(event);
    }
}
