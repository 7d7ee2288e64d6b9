//! What the fuzzer drives: a whole conversation on bytes that ztunnel might send. Called by nothing in the agent; compiled
//! always, so that the workspace is built once.

use std::time::{Duration, Instant};

use super::{
    messages::{MAX_PACKET, Request},
    registry::{PeerId, Registry},
    terms::{Patience, Reason, Step, Workload},
};
use crate::model::PodUid;

/// Pods that come and go.
const PODS: u8 = 3;

/// Reads `data` as a script: packets from ztunnel, time that passes, pods that come and go. Whatever it holds, nothing panics,
/// and what waits stays within the number of pods.
pub fn conversation(mut data: &[u8]) {
    let patience = Patience {
        hello: Duration::from_secs(5),
        ack: Duration::from_secs(5),
        retry: (Duration::from_secs(5), Duration::from_secs(60)),
    };
    let mut now = Instant::now();
    let mut registry = Registry::new(patience);
    registry.open();
    let mut peer = registry.connected(1, now);
    while let Some((&[what, how], rest)) = data.split_first_chunk() {
        data = rest;
        let uid = PodUid::from(["a", "b", "c"][usize::from(how % PODS)]);
        match what % 8 {
            0..=3 => {
                let length = usize::from(how).min(data.len());
                let (packet, rest) = data.split_at(length);
                data = rest;
                if let Err(reason) = registry.heard(peer, packet, now) {
                    peer = reconnect(&mut registry, peer, &reason, now);
                }
            }
            4 => now += Duration::from_millis(u64::from(how) * 32),
            5 => drop(registry.add(uid, workload(how), how)),
            6 => drop(registry.remove(&uid)),
            _ => drop(registry.expect(uid, workload(how))),
        }
        peer = step(&mut registry, peer, now);
        assert_bounded(&registry);
    }
}

fn step(registry: &mut Registry<u8>, peer: PeerId, now: Instant) -> PeerId {
    match registry.next(peer, now) {
        Step::Send(message, _) => {
            let packet = Request::from(message).into_packet();
            assert!(packet.len() <= MAX_PACKET, "{} bytes", packet.len());
            peer
        }
        Step::Wait(_) => peer,
        Step::Close(reason) => reconnect(registry, peer, &reason, now),
    }
}

fn reconnect(registry: &mut Registry<u8>, peer: PeerId, why: &Reason, now: Instant) -> PeerId {
    registry.gone(peer, why);
    drop(registry.outputs());
    registry.connected(1, now)
}

fn assert_bounded(registry: &Registry<u8>) {
    for (_, _, pending, (served, refused)) in registry.peers() {
        let pods = usize::from(PODS);
        // The outstanding message, the rest of the snapshot, and each pod once.
        assert!(pending <= 1 + 2 * pods && served <= pods && refused <= pods);
    }
}

fn workload(how: u8) -> Workload {
    Workload {
        name: format!("pod-{}", how % 2),
        namespace: "ns".into(),
        service_account: "sa".into(),
    }
}
