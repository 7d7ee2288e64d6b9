//! One conversation with one ztunnel as a state machine: what may be said next, and what an answer means.
//!
//! Owns the order of messages, the one that is outstanding, its deadline, and what this ztunnel has been told. It is pure:
//! no sockets, no clock of its own, no tasks. Which ztunnel is told of a new pod is `registry`'s business.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    time::{Duration, Instant},
};

use prost::Message as _;

use super::{
    messages::{VERSION, WorkloadResponse, ZdsHello},
    terms::{
        Generation, Heard, Message, Patience, PeerState, Reason, RemovalId, Said, Step, Wanted,
    },
};
use crate::model::PodUid;

#[derive(Debug)]
enum Phase {
    Greeting { until: Instant },
    Held,
    Snapshot { left: VecDeque<PodUid> },
    SnapshotSent,
    Synced,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Told {
    /// In the snapshot: its namespace is owed.
    Kept,
    /// Added, and not answered.
    Unconfirmed,
    /// ztunnel goes on trying with that namespace.
    Refused(Generation),
    Served(Generation),
}

#[derive(Debug)]
struct Outstanding {
    said: Said,
    until: Instant,
}

#[derive(Clone, Copy, Debug)]
struct Retry {
    at: Instant,
    pause: Duration,
}

/// One conversation.
#[derive(Debug)]
pub(super) struct Conversation {
    patience: Patience,
    phase: Phase,
    outstanding: Option<Outstanding>,
    told: HashMap<PodUid, Told>,
    /// Pods to look at, each once, in the order in which they changed: fair, and no longer than there are pods.
    queue: VecDeque<PodUid>,
    queued: HashSet<PodUid>,
    owed_dels: HashMap<PodUid, Vec<RemovalId>>,
    /// What was refused, and when it is said again.
    retries: HashMap<PodUid, Retry>,
}

impl Conversation {
    pub(super) fn new(patience: Patience, now: Instant) -> Self {
        Self {
            patience,
            phase: Phase::Greeting {
                until: now + patience.hello,
            },
            outstanding: None,
            told: HashMap::new(),
            queue: VecDeque::new(),
            queued: HashSet::new(),
            owed_dels: HashMap::new(),
            retries: HashMap::new(),
        }
    }

    /// What to do now. `open`: pods are known; `target`: new pods go here.
    pub(super) fn next<N: Clone>(
        &mut self,
        wanted: &BTreeMap<PodUid, Wanted<N>>,
        open: bool,
        target: bool,
        now: Instant,
    ) -> Step<N> {
        if let Some(outstanding) = &self.outstanding {
            return if now >= outstanding.until {
                Step::Close(self.late(&outstanding.said))
            } else {
                Step::Wait(Some(outstanding.until))
            };
        }
        loop {
            match &mut self.phase {
                Phase::Greeting { until } if now >= *until => {
                    return Step::Close(Reason::NoHello(self.patience.hello));
                }
                Phase::Greeting { until } => return Step::Wait(Some(*until)),
                Phase::Held if !open => return Step::Wait(None),
                Phase::Held => {
                    let left = wanted.keys().cloned().collect();
                    self.phase = Phase::Snapshot { left };
                }
                Phase::Snapshot { left } => {
                    let Some(uid) = left.pop_front() else {
                        self.phase = Phase::SnapshotSent;
                        return self.say(Message::SnapshotSent, Said::SnapshotSent, now);
                    };
                    // Gone meanwhile, and never named: ztunnel drops it by itself.
                    if let Some(pod) = wanted.get(&uid) {
                        return self.name(uid, pod, now);
                    }
                }
                // Its ack makes it `Synced`.
                Phase::SnapshotSent => return Step::Wait(None),
                Phase::Synced => return self.next_change(wanted, target, now),
            }
        }
    }

    /// A pod in the snapshot.
    fn name<N: Clone>(&mut self, uid: PodUid, pod: &Wanted<N>, now: Instant) -> Step<N> {
        match &pod.netns {
            Some(netns) => self.say_add(uid, pod, netns.clone(), now),
            None => {
                self.told.insert(uid.clone(), Told::Kept);
                self.say(Message::Keep { uid: uid.clone() }, Said::Keep(uid), now)
            }
        }
    }

    fn next_change<N: Clone>(
        &mut self,
        wanted: &BTreeMap<PodUid, Wanted<N>>,
        target: bool,
        now: Instant,
    ) -> Step<N> {
        let due: Vec<PodUid> = self
            .retries
            .iter()
            .filter(|(_, retry)| retry.at <= now)
            .map(|(uid, _)| uid.clone())
            .collect();
        for uid in &due {
            self.touch(uid);
        }
        while let Some(uid) = self.queue.pop_front() {
            self.queued.remove(&uid);
            if self.retries.get(&uid).is_some_and(|retry| retry.at > now) {
                continue;
            }
            if let Some(removals) = self.owed_dels.remove(&uid) {
                return self.say_del(uid, removals, now);
            }
            let told = self.told.get(&uid);
            match wanted.get(&uid) {
                // It is to forget what it still tries before it hears of another namespace.
                Some(pod) if matches!(told, Some(Told::Refused(tried)) if *tried != pod.generation) =>
                {
                    return self.say_del(uid, Vec::new(), now);
                }
                Some(pod) if told != Some(&Told::Served(pod.generation)) => {
                    // What was kept is owed its namespace by whoever was told to keep it.
                    let owed = target || told == Some(&Told::Kept);
                    if let Some(netns) = pod.netns.clone().filter(|_| owed) {
                        return self.say_add(uid, pod, netns, now);
                    }
                    self.retries.remove(&uid);
                }
                _ => {
                    self.retries.remove(&uid);
                }
            }
        }
        Step::Wait(self.retries.values().map(|retry| retry.at).min())
    }

    fn say_add<N: Clone>(
        &mut self,
        uid: PodUid,
        pod: &Wanted<N>,
        netns: N,
        now: Instant,
    ) -> Step<N> {
        self.told.insert(uid.clone(), Told::Unconfirmed);
        let message = Message::Add {
            uid: uid.clone(),
            workload: pod.workload.clone(),
            netns,
        };
        self.say(message, Said::Add(uid, pod.generation), now)
    }

    fn say_del<N>(&mut self, uid: PodUid, removals: Vec<RemovalId>, now: Instant) -> Step<N> {
        self.told.remove(&uid);
        self.say(
            Message::Del { uid: uid.clone() },
            Said::Del(uid, removals),
            now,
        )
    }

    fn say<N>(&mut self, message: Message<N>, said: Said, now: Instant) -> Step<N> {
        let until = now + self.patience.ack;
        self.outstanding = Some(Outstanding { said, until });
        Step::Send(message, until)
    }

    /// A packet has come, never an empty one.
    pub(super) fn hear(&mut self, packet: &[u8], now: Instant) -> Result<Heard, Reason> {
        if let Phase::Greeting { .. } = self.phase {
            let hello = ZdsHello::decode(packet)
                .map_err(|e| Reason::Protocol(format!("its hello cannot be read: {e}")))?;
            if hello.version != VERSION {
                return Err(Reason::Version(hello.version));
            }
            self.phase = Phase::Held;
            return Ok(Heard::Hello);
        }
        // On an error it stays outstanding: who waits for it is found there when the conversation ends.
        let outstanding = self.outstanding.as_ref();
        let refusal = outstanding
            .map(|outstanding| self.refusal(outstanding, packet, now))
            .transpose()?;
        match (self.outstanding.take(), refusal) {
            (Some(Outstanding { said, .. }), Some(refusal)) if refusal.is_empty() => {
                self.acked(&said);
                Ok(Heard::Ack(said))
            }
            (Some(Outstanding { said, .. }), Some(refusal)) => {
                self.nacked(&said, now);
                Ok(Heard::Nack(said, refusal))
            }
            _ => Err(Reason::Protocol("it answered what nobody asked".into())),
        }
    }

    /// Why ztunnel will not do what was asked; empty when it has done it.
    fn refusal(
        &self,
        Outstanding { said, until }: &Outstanding,
        packet: &[u8],
        now: Instant,
    ) -> Result<String, Reason> {
        if now >= *until {
            return Err(self.late(said));
        }
        let answer = WorkloadResponse::decode(packet)
            .map_err(|e| Reason::Protocol(format!("its answer to {said} cannot be read: {e}")))?;
        match answer.ack {
            None => Err(Reason::Protocol(format!("its answer to {said} is no ack"))),
            Some(ack) if *said == Said::SnapshotSent && !ack.error.is_empty() => {
                Err(Reason::Snapshot(ack.error))
            }
            Some(ack) => Ok(ack.error),
        }
    }

    fn acked(&mut self, said: &Said) {
        match said {
            Said::Add(uid, generation) => {
                self.retries.remove(uid);
                self.told.insert(uid.clone(), Told::Served(*generation));
                // It may have changed while this was outstanding.
                self.touch(uid);
            }
            Said::Del(uid, _) => {
                self.retries.remove(uid);
                self.touch(uid);
            }
            Said::Keep(_) => {}
            Said::SnapshotSent => self.phase = Phase::Synced,
        }
    }

    fn nacked(&mut self, said: &Said, now: Instant) {
        let uid = match said {
            Said::Add(uid, generation) => {
                self.told.insert(uid.clone(), Told::Refused(*generation));
                uid
            }
            Said::Del(uid, _) => {
                self.owed_dels.entry(uid.clone()).or_default();
                uid
            }
            Said::Keep(_) | Said::SnapshotSent => return,
        };
        let (first, longest) = self.patience.retry;
        let pause = self
            .retries
            .get(uid)
            .map_or(first, |retry| longest.min(retry.pause * 2));
        let at = now + pause;
        self.retries.insert(uid.clone(), Retry { at, pause });
    }

    /// Something about this pod has changed: it is looked at in its turn.
    pub(super) fn touch(&mut self, uid: &PodUid) {
        // The snapshot will hold it, as it is then.
        if matches!(self.phase, Phase::Greeting { .. } | Phase::Held) {
            return;
        }
        if self.queued.insert(uid.clone()) {
            self.queue.push_back(uid.clone());
        }
    }

    /// Like `touch`, without waiting for the time of a retry.
    pub(super) fn touch_now(&mut self, uid: &PodUid) {
        self.retries.remove(uid);
        self.touch(uid);
    }

    /// The pod is wanted no more, or not as who it was; `removal` hears of the ack. False when this ztunnel need not be told.
    pub(super) fn owe_del(
        &mut self,
        uid: &PodUid,
        was_wanted: bool,
        removal: Option<RemovalId>,
    ) -> bool {
        if !was_wanted
            && let Some(outstanding) = &mut self.outstanding
            && let Said::Del(gone, removals) = &mut outstanding.said
            && gone == uid
        {
            removals.extend(removal);
            return true;
        }
        let known = self.told.contains_key(uid) || self.owed_dels.contains_key(uid);
        let owed = match self.phase {
            Phase::Greeting { .. } | Phase::Held => false,
            // A `Del` before the end of the snapshot is a protocol error; what was not named needs none.
            Phase::Snapshot { .. } => known,
            Phase::SnapshotSent | Phase::Synced => known || was_wanted,
        };
        if owed {
            let removals = self.owed_dels.entry(uid.clone()).or_default();
            removals.extend(removal);
            self.touch_now(uid);
        }
        owed
    }

    /// Everybody who waits for this ztunnel to let a pod go.
    pub(super) fn removals(&self) -> impl Iterator<Item = RemovalId> + '_ {
        let outstanding = match &self.outstanding {
            Some(Outstanding {
                said: Said::Del(_, removals),
                ..
            }) => removals.as_slice(),
            _ => &[],
        };
        let owed = self.owed_dels.values().flatten();
        outstanding.iter().chain(owed).copied()
    }

    /// The `Add` that is not answered.
    pub(super) fn adding(&self) -> Option<Generation> {
        match self.outstanding {
            Some(Outstanding {
                said: Said::Add(_, generation),
                ..
            }) => Some(generation),
            _ => None,
        }
    }

    pub(super) fn serves(&self, uid: &PodUid, generation: Generation) -> bool {
        self.told.get(uid) == Some(&Told::Served(generation)) && !self.owed_dels.contains_key(uid)
    }

    pub(super) fn state(&self) -> PeerState {
        match self.phase {
            Phase::Greeting { .. } => PeerState::Greeting,
            Phase::Held => PeerState::Held,
            Phase::Snapshot { .. } | Phase::SnapshotSent => PeerState::Snapshot,
            Phase::Synced => PeerState::Synced,
        }
    }

    /// Messages that wait: the outstanding one, those of the snapshot, changes to look at.
    pub(super) fn pending(&self) -> usize {
        let left = match &self.phase {
            Phase::Snapshot { left } => left.len(),
            _ => 0,
        };
        left + self.queue.len() + usize::from(self.outstanding.is_some())
    }

    /// Pods it has acknowledged, and pods (or their removal) that it has refused so far.
    pub(super) fn tally(&self) -> (usize, usize) {
        let served = self
            .told
            .values()
            .filter(|told| matches!(told, Told::Served(_)))
            .count();
        (served, self.retries.len())
    }

    fn late(&self, said: &Said) -> Reason {
        Reason::Late {
            said: said.to_string(),
            after: self.patience.ack,
        }
    }
}

#[cfg(test)]
#[path = "conversation_tests.rs"]
mod tests;
