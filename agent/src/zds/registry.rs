//! What ztunnels are to serve, and which of them is told: the pure heart of the server.
//!
//! Owns the set of pods and the conversations. New pods go to the newest ztunnel that has had its snapshot, or to the one
//! before it when that one goes; removals go to all. It knows no sockets, no clock and no tasks: callers hand in the time
//! and carry out what comes back.

use std::{
    collections::{BTreeMap, HashMap},
    time::Instant,
};

use super::{
    conversation::Conversation,
    messages::{MAX_PACKET, Request},
    terms::{
        Generation, Heard, Patience, PeerState, Reason, RemovalId, Said, Step, Wanted, Workload,
    },
};
use crate::model::PodUid;

/// Numbers connections in the order in which they came.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(super) struct PeerId(pub(super) u64);

/// Why nobody has acknowledged a pod.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum AddError {
    /// None is connected, or the server is not open yet. The pod is part of the next snapshot.
    #[error("no ztunnel is connected: look at the ztunnel pod of this node")]
    NoZtunnel,
    /// ztunnel said no. It goes on trying by itself, and so do we.
    #[error("ztunnel refused the pod: {0}")]
    Nacked(String),
    /// ztunnel did not answer in time. The pod is part of the next snapshot.
    #[error(
        "ztunnel did not acknowledge the pod in time: look at ztunnel's log and whether it gets CPU time"
    )]
    TimedOut,
    /// The last ztunnel went away before it answered. The pod is part of the next snapshot.
    #[error(
        "ztunnel went away before it acknowledged the pod: look at the ztunnel pod of this node"
    )]
    Disconnected,
    /// The pod was removed, or added with another namespace, before it was acknowledged.
    #[error("the pod was removed or added anew before ztunnel acknowledged it")]
    Superseded,
    /// Its names do not fit into a packet of the protocol. It was not remembered.
    #[error(
        "the pod's names take {0} bytes: ztunnel reads {MAX_PACKET}; give the pod shorter ones"
    )]
    TooLong(usize),
}

impl AddError {
    /// Whether the same call may succeed later.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        !matches!(self, Self::TooLong(_))
    }
}

/// Who has let a pod go.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Removed {
    /// Process numbers of ztunnels that acknowledged it.
    pub acked: Vec<u32>,
    /// Those that refused, and why; they are told again later.
    pub refused: Vec<(u32, String)>,
    /// Those that went away, or did not answer within the time given.
    pub unanswered: Vec<u32>,
}

/// What callers carry out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Output {
    Synced(PeerId),
    Acked(PeerId, PodUid),
    Nacked(PeerId, PodUid, String),
    /// An `Add` that was waited for is decided.
    Added(Generation, Result<PeerId, AddError>),
    /// Nobody is left to wait for.
    Removed(RemovalId, Removed),
}

/// What became of an `Add` at once.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Adding {
    /// The newest ztunnel serves it already.
    Served(PeerId),
    /// Its [`Output::Added`] will come.
    Wait(Generation),
    Failed(AddError),
}

#[derive(Debug)]
struct Peer {
    pid: u32,
    conversation: Conversation,
}

#[derive(Debug, Default)]
struct Removal {
    waiting: usize,
    report: Removed,
}

/// See the file.
#[derive(Debug)]
pub(super) struct Registry<N> {
    patience: Patience,
    open: bool,
    wanted: BTreeMap<PodUid, Wanted<N>>,
    peers: BTreeMap<PeerId, Peer>,
    removals: HashMap<RemovalId, Removal>,
    last: u64,
    outputs: Vec<Output>,
}

impl<N: Clone + PartialEq> Registry<N> {
    pub(super) fn new(patience: Patience) -> Self {
        Self {
            patience,
            open: false,
            wanted: BTreeMap::new(),
            peers: BTreeMap::new(),
            removals: HashMap::new(),
            last: 0,
            outputs: Vec::new(),
        }
    }

    /// What has happened since the last call.
    pub(super) fn outputs(&mut self) -> Vec<Output> {
        std::mem::take(&mut self.outputs)
    }

    pub(super) fn open(&mut self) {
        self.open = true;
    }

    pub(super) fn is_open(&self) -> bool {
        self.open
    }

    /// Pods wanted, and how many of them lack their namespace.
    pub(super) fn wanted(&self) -> (usize, usize) {
        let unknown = self.wanted.values().filter(|pod| pod.netns.is_none());
        (self.wanted.len(), unknown.count())
    }

    /// Somebody has connected.
    pub(super) fn connected(&mut self, pid: u32, now: Instant) -> PeerId {
        self.last += 1;
        let id = PeerId(self.last);
        let conversation = Conversation::new(self.patience, now);
        self.peers.insert(id, Peer { pid, conversation });
        id
    }

    /// What a connection does next.
    pub(super) fn next(&mut self, id: PeerId, now: Instant) -> Step<N> {
        let target = self.target() == Some(id);
        match self.peers.get_mut(&id) {
            Some(peer) => peer.conversation.next(&self.wanted, self.open, target, now),
            None => Step::Close(Reason::Stopped),
        }
    }

    /// A ztunnel has said something.
    pub(super) fn heard(&mut self, id: PeerId, packet: &[u8], now: Instant) -> Result<(), Reason> {
        let peer = self.peers.get_mut(&id).ok_or(Reason::Stopped)?;
        match peer.conversation.hear(packet, now)? {
            Heard::Hello | Heard::Ack(Said::Keep(_)) => {}
            Heard::Ack(Said::SnapshotSent) => {
                self.outputs.push(Output::Synced(id));
                self.target_changed();
            }
            Heard::Ack(Said::Add(uid, generation)) => {
                if self.is_current(&uid, generation) {
                    self.settle(&uid, Ok(id));
                    self.outputs.push(Output::Acked(id, uid));
                }
            }
            Heard::Nack(Said::Add(uid, generation), error) => {
                self.refused(id, uid, generation, error);
            }
            Heard::Ack(Said::Del(_, removals)) => {
                let pid = peer.pid;
                self.let_go(removals, |report| report.acked.push(pid));
            }
            Heard::Nack(Said::Del(_, removals), error) => {
                let pid = peer.pid;
                self.let_go(removals, |report| report.refused.push((pid, error.clone())));
            }
            Heard::Nack(Said::Keep(uid), error) => {
                self.outputs.push(Output::Nacked(id, uid, error));
            }
            // The conversation closes on it.
            Heard::Nack(Said::SnapshotSent, _) => {}
        }
        Ok(())
    }

    fn refused(&mut self, id: PeerId, uid: PodUid, generation: Generation, error: String) {
        if self.is_current(&uid, generation) {
            // While another ztunnel is the one for new pods, its word decides.
            if self.target().is_none_or(|target| target == id) {
                self.settle(&uid, Err(AddError::Nacked(error.clone())));
            }
            self.outputs.push(Output::Nacked(id, uid, error));
        } else if let Some(peer) = self.peers.get_mut(&id) {
            // Refused is what nobody wants any more: what is wanted now need not wait.
            peer.conversation.touch_now(&uid);
        }
    }

    /// A connection is over.
    pub(super) fn gone(&mut self, id: PeerId, why: &Reason) {
        let was_target = self.target() == Some(id);
        let Some(peer) = self.peers.remove(&id) else {
            return;
        };
        self.let_go(peer.conversation.removals().collect(), |report| {
            report.unanswered.push(peer.pid);
        });
        if was_target {
            self.target_changed();
        }
        if self.peers.is_empty() {
            let late = matches!(why, Reason::Late { .. })
                .then(|| peer.conversation.adding())
                .flatten();
            for pod in self.wanted.values_mut().filter(|pod| pod.awaited) {
                pod.awaited = false;
                let error = if late == Some(pod.generation) {
                    AddError::TimedOut
                } else {
                    AddError::Disconnected
                };
                self.outputs.push(Output::Added(pod.generation, Err(error)));
            }
        }
    }

    /// In the mesh, and the namespace is not known.
    pub(super) fn expect(&mut self, uid: PodUid, workload: Workload) -> Result<(), AddError> {
        fits(&uid, &workload)?;
        if self
            .wanted
            .get(&uid)
            .is_some_and(|pod| pod.netns.is_none() && pod.workload == workload)
        {
            return Ok(());
        }
        self.want(uid, workload, None);
        Ok(())
    }

    /// To be served, in this namespace.
    pub(super) fn add(&mut self, uid: PodUid, workload: Workload, netns: N) -> Adding {
        if let Err(error) = fits(&uid, &workload) {
            return Adding::Failed(error);
        }
        let known = self.wanted.get(&uid).filter(|pod| {
            pod.workload == workload && pod.netns.as_ref().is_some_and(|known| *known == netns)
        });
        let generation = match known {
            Some(pod) => pod.generation,
            None => self.want(uid.clone(), workload, Some(netns)),
        };
        if let Some(id) = self.serving(&uid, generation) {
            return Adding::Served(id);
        }
        for peer in self.peers.values_mut() {
            peer.conversation.touch_now(&uid);
        }
        if !self.open || self.peers.is_empty() {
            return Adding::Failed(AddError::NoZtunnel);
        }
        if let Some(pod) = self.wanted.get_mut(&uid) {
            pod.awaited = true;
        }
        Adding::Wait(generation)
    }

    fn want(&mut self, uid: PodUid, workload: Workload, netns: Option<N>) -> Generation {
        self.settle(&uid, Err(AddError::Superseded));
        if self
            .wanted
            .get(&uid)
            .is_some_and(|pod| pod.workload != workload)
        {
            // For the same namespace ztunnel would keep the identity it knows.
            for peer in self.peers.values_mut() {
                peer.conversation.owe_del(&uid, true, None);
            }
        }
        self.last += 1;
        let generation = Generation(self.last);
        let pod = Wanted {
            workload,
            netns,
            generation,
            awaited: false,
        };
        self.wanted.insert(uid, pod);
        generation
    }

    /// To be served no more. `None`: nobody has to be told.
    pub(super) fn remove(&mut self, uid: &PodUid) -> Option<RemovalId> {
        self.settle(uid, Err(AddError::Superseded));
        let was_wanted = self.wanted.remove(uid).is_some();
        self.last += 1;
        let id = RemovalId(self.last);
        let mut removal = Removal::default();
        for peer in self.peers.values_mut() {
            if peer.conversation.owe_del(uid, was_wanted, Some(id)) {
                removal.waiting += 1;
            }
        }
        (removal.waiting > 0).then(|| {
            self.removals.insert(id, removal);
            id
        })
    }

    /// Nobody waits for a removal any more; what is known of it until now.
    pub(super) fn give_up(&mut self, id: RemovalId) -> Removed {
        let mut report = self
            .removals
            .remove(&id)
            .map(|removal| removal.report)
            .unwrap_or_default();
        let owing = self
            .peers
            .values()
            .filter(|peer| peer.conversation.removals().any(|owed| owed == id));
        report.unanswered.extend(owing.map(|peer| peer.pid));
        report
    }

    /// Connections, oldest first, with what `status` shows of each.
    pub(super) fn peers(
        &self,
    ) -> impl Iterator<Item = (PeerId, PeerState, usize, (usize, usize))> + '_ {
        self.peers.iter().map(|(id, peer)| {
            let c = &peer.conversation;
            (*id, c.state(), c.pending(), c.tally())
        })
    }

    fn target(&self) -> Option<PeerId> {
        self.peers
            .iter()
            .rev()
            .find(|(_, peer)| peer.conversation.state() == PeerState::Synced)
            .map(|(id, _)| *id)
    }

    /// Who serves the pod, of those whose word counts: the one that new pods go to, or anybody while there is none.
    fn serving(&self, uid: &PodUid, generation: Generation) -> Option<PeerId> {
        let target = self.target();
        self.peers
            .iter()
            .rev()
            .filter(|(id, _)| target.is_none_or(|target| target == **id))
            .find(|(_, peer)| peer.conversation.serves(uid, generation))
            .map(|(id, _)| *id)
    }

    /// New pods go to another ztunnel now: what that one serves already, nobody needs to wait for.
    fn target_changed(&mut self) {
        let Some(target) = self.target() else {
            return;
        };
        let awaited: Vec<_> = self
            .wanted
            .iter()
            .filter(|(_, pod)| pod.awaited)
            .map(|(uid, pod)| (uid.clone(), pod.generation))
            .collect();
        for (uid, generation) in awaited {
            if self.serving(&uid, generation).is_some() {
                self.settle(&uid, Ok(target));
            }
        }
        self.touch_all(target);
    }

    fn touch_all(&mut self, id: PeerId) {
        if let Some(peer) = self.peers.get_mut(&id) {
            for uid in self.wanted.keys() {
                peer.conversation.touch(uid);
            }
        }
    }

    fn is_current(&self, uid: &PodUid, generation: Generation) -> bool {
        self.wanted
            .get(uid)
            .is_some_and(|pod| pod.generation == generation)
    }

    fn settle(&mut self, uid: &PodUid, outcome: Result<PeerId, AddError>) {
        if let Some(pod) = self.wanted.get_mut(uid)
            && std::mem::take(&mut pod.awaited)
        {
            self.outputs.push(Output::Added(pod.generation, outcome));
        }
    }

    fn let_go(&mut self, removals: Vec<RemovalId>, note: impl Fn(&mut Removed)) {
        for id in removals {
            let Some(removal) = self.removals.get_mut(&id) else {
                continue;
            };
            note(&mut removal.report);
            removal.waiting -= 1;
            if removal.waiting == 0
                && let Some(done) = self.removals.remove(&id)
            {
                self.outputs.push(Output::Removed(id, done.report));
            }
        }
    }
}

/// `Add` is the longest message about a pod: when it fits, all do.
fn fits(uid: &PodUid, workload: &Workload) -> Result<(), AddError> {
    let length = Request::add(uid, workload).into_packet().len();
    if length > MAX_PACKET {
        return Err(AddError::TooLong(length));
    }
    Ok(())
}

#[cfg(test)]
#[path = "registry_tests.rs"]
mod tests;
