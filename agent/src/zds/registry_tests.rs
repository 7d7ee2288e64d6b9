//! The registry against a model of ztunnel, under random interleavings of everything that can happen.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use proptest::prelude::*;
use prost::Message as _;

use super::*;
use crate::zds::{
    messages::{Ack, WorkloadResponse, ZdsHello},
    terms::Message,
};

/// Stands for a namespace's descriptor.
type Ns = u8;

const PATIENCE: Patience = Patience {
    hello: Duration::from_secs(5),
    ack: Duration::from_secs(5),
    retry: (Duration::from_secs(5), Duration::from_secs(60)),
};

#[derive(Clone, Copy, Debug)]
enum Op {
    Expect(u8),
    Add(u8, Ns),
    /// With the identity changed, which only manifests in a directory can do.
    Rename(u8, Ns),
    Remove(u8),
    Open,
    /// A ztunnel that is not connected connects, with whatever it serves from before.
    Connect(usize),
    Hello(usize),
    /// The connection does what is next, if it has anything to do.
    Pump(usize),
    Ack(usize),
    Nack(usize),
    /// Its own retry of what it has refused.
    RetryPending(usize),
    HangUp(usize),
    Pass(u16),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let (uid, ns, who) = (0..4_u8, 0..3_u8, 0..3_usize);
    let op = prop_oneof![
        2 => uid.clone().prop_map(Op::Expect),
        6 => (uid.clone(), ns.clone()).prop_map(|(uid, ns)| Op::Add(uid, ns)),
        1 => (uid.clone(), ns).prop_map(|(uid, ns)| Op::Rename(uid, ns)),
        4 => uid.prop_map(Op::Remove),
        1 => Just(Op::Open),
        3 => who.clone().prop_map(Op::Connect),
        3 => who.clone().prop_map(Op::Hello),
        14 => who.clone().prop_map(Op::Pump),
        12 => who.clone().prop_map(Op::Ack),
        3 => who.clone().prop_map(Op::Nack),
        1 => who.clone().prop_map(Op::RetryPending),
        1 => who.prop_map(Op::HangUp),
        3 => (0..4000_u16).prop_map(Op::Pass),
    ];
    prop::collection::vec(op, 0..120)
}

/// ztunnel as its own sources have it: what it serves survives the connection, the snapshot's bookkeeping does not.
#[derive(Default)]
struct Ztunnel {
    served: BTreeMap<PodUid, (Ns, String)>,
    pending: BTreeMap<PodUid, (Ns, String)>,
    connection: Option<Connection>,
    connections: usize,
}

impl Ztunnel {
    /// The same namespace again is no news, not even with another name; another one replaces the first.
    fn add(&mut self, uid: PodUid, pod: (Ns, String), willing: bool) -> bool {
        if self.served.get(&uid).is_some_and(|old| old.0 == pod.0) {
            self.pending.remove(&uid);
            return true;
        }
        self.served.remove(&uid);
        if willing {
            self.pending.remove(&uid);
            self.served.insert(uid, pod);
        } else {
            self.pending.insert(uid, pod);
        }
        willing
    }
}

struct Connection {
    id: PeerId,
    greeted: bool,
    named: BTreeSet<PodUid>,
    synced: bool,
    unanswered: Option<Message<Ns>>,
}

struct World {
    registry: Registry<Ns>,
    ztunnels: Vec<Ztunnel>,
    now: Instant,
    open: bool,
    /// What the agent wants: `None` without a namespace.
    wanted: BTreeMap<PodUid, Option<(Ns, String)>>,
    adds: BTreeSet<Generation>,
    removals: BTreeSet<u64>,
}

fn uid(number: u8) -> PodUid {
    PodUid::from(&*format!("pod-{number}"))
}

fn workload(name: &str) -> Workload {
    Workload {
        name: name.into(),
        namespace: "ns".into(),
        service_account: "sa".into(),
    }
}

fn answer(error: &str) -> Vec<u8> {
    let ack = Some(Ack {
        error: error.into(),
    });
    WorkloadResponse { ack }.encode_to_vec()
}

impl World {
    fn new() -> Self {
        Self {
            registry: Registry::new(PATIENCE),
            ztunnels: (0..3).map(|_| Ztunnel::default()).collect(),
            now: Instant::now(),
            open: false,
            wanted: BTreeMap::new(),
            adds: BTreeSet::new(),
            removals: BTreeSet::new(),
        }
    }

    fn run(&mut self, op: Op) {
        match op {
            Op::Expect(pod) => {
                self.registry.expect(uid(pod), workload("first")).unwrap();
                self.wanted.insert(uid(pod), None);
            }
            Op::Add(pod, ns) => self.add(pod, ns, "first"),
            Op::Rename(pod, ns) => self.add(pod, ns, "second"),
            Op::Remove(pod) => {
                if let Some(RemovalId(id)) = self.registry.remove(&uid(pod)) {
                    self.removals.insert(id);
                }
                self.wanted.remove(&uid(pod));
            }
            Op::Open => {
                self.registry.open();
                self.open = true;
            }
            Op::Connect(who) => {
                if self.ztunnels[who].connection.is_none() {
                    let id = self.registry.connected(7, self.now);
                    let ztunnel = &mut self.ztunnels[who];
                    ztunnel.pending.clear();
                    ztunnel.connections += 1;
                    ztunnel.connection = Some(Connection {
                        id,
                        greeted: false,
                        named: BTreeSet::new(),
                        synced: false,
                        unanswered: None,
                    });
                }
            }
            Op::Hello(who) => self.hello(who),
            Op::Pump(who) => {
                self.pump(who);
            }
            Op::Ack(who) => self.respond(who, true),
            Op::Nack(who) => self.respond(who, false),
            Op::RetryPending(who) => {
                let ztunnel = &mut self.ztunnels[who];
                for (uid, pod) in std::mem::take(&mut ztunnel.pending) {
                    ztunnel.add(uid, pod, true);
                }
            }
            Op::HangUp(who) => self.part(who, &Reason::HungUp),
            Op::Pass(millis) => self.now += Duration::from_millis(millis.into()),
        }
        self.outputs();
    }

    fn add(&mut self, pod: u8, ns: Ns, name: &str) {
        match self.registry.add(uid(pod), workload(name), ns) {
            Adding::Wait(generation) => {
                self.adds.insert(generation);
            }
            Adding::Served(id) => {
                let serving = self.ztunnels.iter().any(|ztunnel| {
                    let connection = ztunnel.connection.as_ref();
                    connection.is_some_and(|c| c.id == id)
                        && ztunnel.served.get(&uid(pod)).is_some_and(|pod| pod.0 == ns)
                });
                assert!(serving, "{} is not served", uid(pod));
            }
            Adding::Failed(_) => {}
        }
        self.wanted.insert(uid(pod), Some((ns, name.into())));
    }

    fn outputs(&mut self) {
        for output in self.registry.outputs() {
            match output {
                Output::Added(generation, _) => {
                    assert!(
                        self.adds.remove(&generation),
                        "settled, and nobody waited: {generation:?}"
                    );
                }
                Output::Removed(RemovalId(id), _) => {
                    assert!(self.removals.remove(&id), "settled twice: {id}");
                }
                Output::Synced(_) | Output::Acked(..) | Output::Nacked(..) => {}
            }
        }
    }

    fn hello(&mut self, who: usize) {
        let Some(connection) = &mut self.ztunnels[who].connection else {
            return;
        };
        if connection.greeted {
            return;
        }
        connection.greeted = true;
        let hello = ZdsHello { version: 1 }.encode_to_vec();
        let heard = self.registry.heard(connection.id, &hello, self.now);
        heard.unwrap();
    }

    fn part(&mut self, who: usize, reason: &Reason) {
        if let Some(connection) = self.ztunnels[who].connection.take() {
            self.registry.gone(connection.id, reason);
        }
    }

    /// False when there was nothing to do.
    fn pump(&mut self, who: usize) -> bool {
        let Some(connection) = &self.ztunnels[who].connection else {
            return false;
        };
        match self.registry.next(connection.id, self.now) {
            Step::Wait(_) => false,
            Step::Close(reason) => {
                self.part(who, &reason);
                true
            }
            Step::Send(message, until) => {
                assert!(until > self.now);
                self.receive(who, message);
                true
            }
        }
    }

    /// Where ztunnel would exit with a protocol error, the test fails.
    fn receive(&mut self, who: usize, message: Message<Ns>) {
        let open = self.open;
        let ztunnel = &mut self.ztunnels[who];
        let connection = ztunnel.connection.as_mut().unwrap();
        assert!(connection.greeted, "{message:?} before the hello");
        assert!(open, "{message:?} before pods are known");
        assert_eq!(connection.unanswered, None, "two at a time: {message:?}");
        match &message {
            Message::Add { uid, .. } | Message::Keep { uid } if !connection.synced => {
                assert!(
                    connection.named.insert(uid.clone()),
                    "{uid} twice in a snapshot"
                );
            }
            Message::Add { .. } => {}
            Message::Keep { .. } | Message::SnapshotSent => {
                assert!(!connection.synced, "{message:?} after the snapshot");
            }
            Message::Del { .. } => assert!(connection.synced, "{message:?} in the snapshot"),
        }
        connection.unanswered = Some(message);
    }

    fn respond(&mut self, who: usize, willing: bool) {
        let ztunnel = &mut self.ztunnels[who];
        let connection = ztunnel.connection.as_mut();
        let Some(message) = connection.and_then(|c| c.unanswered.take()) else {
            return;
        };
        let mut refused = false;
        match message {
            Message::Add {
                uid,
                netns,
                workload,
            } => refused = !ztunnel.add(uid, (netns, workload.name), willing),
            Message::Keep { .. } => refused = !willing,
            Message::Del { uid } => {
                ztunnel.served.remove(&uid);
                ztunnel.pending.remove(&uid);
                refused = !willing;
            }
            Message::SnapshotSent => {
                let connection = ztunnel.connection.as_mut().unwrap();
                connection.synced = true;
                let named = &connection.named;
                ztunnel.served.retain(|uid, _| named.contains(uid));
            }
        }
        let id = ztunnel.connection.as_ref().unwrap().id;
        let word = if refused { "no" } else { "" };
        let heard = self.registry.heard(id, &answer(word), self.now);
        if let Err(reason) = heard {
            assert!(matches!(reason, Reason::Late { .. }), "{reason}");
            self.part(who, &reason);
        }
    }

    /// From here on everything goes well: everybody answers, at once, and time passes.
    fn calm(&mut self) {
        self.run(Op::Open);
        if self.ztunnels.iter().all(|z| z.connection.is_none()) {
            self.run(Op::Connect(0));
        }
        for _ in 0..2000 {
            let mut busy = false;
            for who in 0..self.ztunnels.len() {
                self.hello(who);
                busy |= self.pump(who);
                self.respond(who, true);
                self.outputs();
            }
            // A connection that was late is given up only now; somebody else must be there in the end.
            if self.ztunnels.iter().all(|z| z.connection.is_none()) {
                self.run(Op::Connect(0));
                busy = true;
            }
            if !busy {
                // Longer than the longest pause before something refused is said again.
                self.now += PATIENCE.retry.1;
                for who in 0..self.ztunnels.len() {
                    self.run(Op::RetryPending(who));
                }
                let more = (0..self.ztunnels.len()).any(|who| {
                    let pumped = self.pump(who);
                    self.respond(who, true);
                    self.outputs();
                    pumped
                });
                if !more {
                    return;
                }
            }
        }
        panic!("it never comes to rest");
    }

    fn check(&self) {
        assert_eq!(self.adds, BTreeSet::new(), "adds that nobody answered");
        assert_eq!(
            self.removals,
            BTreeSet::new(),
            "removals that nobody answered"
        );
        let connected = self
            .ztunnels
            .iter()
            .filter_map(|z| z.connection.as_ref().map(|c| (c.id, z)));
        let connected: BTreeMap<PeerId, &Ztunnel> = connected.collect();
        for ztunnel in connected.values() {
            assert_eq!(ztunnel.pending, BTreeMap::new(), "ztunnel is not ready");
            for uid in ztunnel.served.keys() {
                assert!(self.wanted.contains_key(uid), "{uid} is served for nobody");
            }
        }
        let newest = connected.values().next_back().unwrap();
        for (uid, pod) in &self.wanted {
            if let Some(pod) = pod {
                let (ns, name) = newest.served.get(uid).unwrap();
                assert_eq!(ns, &pod.0, "{uid}");
                // What changed its name while this ztunnel was not connected keeps the old one: same namespace, no news.
                if newest.connections == 1 {
                    assert_eq!(name, &pod.1, "{uid}");
                }
            }
        }
        for (_, state, pending, (_, refused)) in self.registry.peers() {
            assert_eq!((state, pending, refused), (PeerState::Synced, 0, 0));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn ztunnels_end_up_with_what_is_wanted_and_never_see_a_protocol_error(ops in ops()) {
        let mut world = World::new();
        for op in ops {
            world.run(op);
        }
        world.calm();
        world.check();
    }
}
