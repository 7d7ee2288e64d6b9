//! Enrolled pods with traffic that has to go on whatever happens.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use culvert_cluster::{POD, pod};
use serde_json::{Value, json};

use crate::bed::{AMBIENT, Bed, talker};

/// A server on each node, and on node 1 a connection kept up and new ones again and again, all to node 2 in HBONE.
pub(crate) struct Traffic {
    pub(crate) bed: Bed,
    pub(crate) to: SocketAddr,
    starts: BTreeMap<String, String>,
}

impl Traffic {
    pub(crate) fn start(name: &str) -> Self {
        let bed = Bed::new(name, &[AMBIENT]);
        bed.start_servers();
        bed.mesh.wait_until_enrolled(name).unwrap();
        bed.mesh.tell_peers().unwrap();
        let to = bed.addresses("b")[0];
        let load = ["load", &to.to_string()];
        bed.start(&[talker("talker", "node1", to), pod("load", "node1", &load)]);
        bed.mesh.wait_until_enrolled(name).unwrap();
        let traffic = Self {
            starts: bed.starts(),
            bed,
            to,
        };
        traffic.goes_on();
        traffic
    }

    /// Waits until both have carried more than before; nothing may have failed, nothing have been started anew, and all of
    /// it have been in HBONE.
    pub(crate) fn goes_on(&self) {
        let bed = &self.bed;
        bed.wait_for_more_lines("talker");
        let (good, carried) = (
            told_by_now(bed, "load", "good"),
            bed.counted("load", "hbone_out"),
        );
        bed.until("new connections are made, in HBONE", || {
            bed.told("load", "good") > Some(good + 10)
                && bed.counted("load", "hbone_out") > carried + 10
        });
        assert_eq!(told_by_now(bed, "load", "failed"), 0, "{}", bed.log("load"));
        for name in ["load", "talker"] {
            assert_eq!(bed.counted(name, "passthrough_out"), 0, "{name}");
        }
        let starts = bed.starts();
        for (container, start) in &self.starts {
            assert_eq!(starts[container], *start, "{container}");
        }
    }

    /// A server that sends that before it serves.
    pub(crate) fn sender(&self, name: &str, node: &str, text: &str) -> Value {
        let mut pod = pod(name, node, &["serve"]);
        let args = ["send", &self.to.to_string(), text];
        pod["spec"]["initContainers"] = json!([{"name": "send", "image": POD, "args": args}]);
        pod
    }

    /// A new pod on each node is in the mesh before it is ready.
    pub(crate) fn new_pods_start(&self, round: &str) {
        let names = ["node1", "node2"].map(|node| (format!("new-{round}-{node}"), node));
        let pods = names
            .each_ref()
            .map(|(name, node)| pod(name, node, &["serve"]));
        self.bed.start(&pods);
        for (name, _) in names {
            self.bed.wait_for_membership(&name, true);
        }
    }
}

/// The number behind a word in the log of a pod that has surely said it, as soon as that can be read.
fn told_by_now(bed: &Bed, pod: &str, word: &str) -> u64 {
    let mut told = None;
    bed.until(&format!("{pod} says how many are {word}"), || {
        told = bed.told(pod, word);
        told.is_some()
    });
    told.unwrap()
}
