//! What only concerns Cilium: its agent starts anew and is configured anew while traffic flows and pods start.

use culvert_cluster::{Cluster, Service, pod};
use serde_json::json;

use crate::bed::{AMBIENT, Bed, talker};
use crate::capture::{Capture, seen_on};

/// Starts Cilium's agent anew on all nodes with that setting: it loads its programs again and writes its CNI configuration.
fn restart_with(cluster: &Cluster, key: &str, value: &str) {
    let patch = json!({"data": {key: value}}).to_string();
    let map = ["patch", "configmap", "cilium-config", "-n", "kube-system"];
    let patch = ["--type=merge", "-p", &patch];
    cluster.kubectl(&[&map[..], &patch].concat()).unwrap();
    for node in cluster.nodes() {
        cluster.stop_service(&node, Service::Cilium).unwrap();
        cluster.start_service(&node, Service::Cilium).unwrap();
    }
}

#[test]
fn ciliums_agent_starts_anew_and_takes_the_cni_directory_while_pods_start_and_talk() {
    let bed = Bed::new("exclusive", &[AMBIENT]);
    bed.start_servers();
    bed.mesh.wait_until_enrolled("exclusive").unwrap();
    bed.mesh.tell_peers().unwrap();
    let to = bed.addresses("b");
    bed.start(&[
        talker("talker", "node1", to[0]),
        talker("talker6", "node1", to[1]),
    ]);
    let before = bed.starts();
    let captures = Capture::start(bed.cluster, "exclusive");
    // Cilium's default first: it takes away every CNI configuration that is not its own.
    for (round, exclusive) in ["true", "false"].into_iter().enumerate() {
        restart_with(bed.cluster, "cni-exclusive", exclusive);
        // While the agent is away and while it starts.
        let names = ["one", "two"].map(|name| format!("{name}-{exclusive}"));
        let starting = |name: &String, node: &str| {
            let mut pod = pod(name, node, &["serve"]);
            let send = ["send", &to[0].to_string(), "exclusive-secret"];
            pod["spec"]["initContainers"] =
                json!([{"name": "send", "image": culvert_cluster::POD, "args": send}]);
            pod
        };
        bed.start(&[starting(&names[0], "node1"), starting(&names[1], "node2")]);
        for name in &names {
            bed.wait_for_membership(name, true);
        }
        for talker in ["talker", "talker6"] {
            bed.wait_for_more_lines(talker);
        }
        assert_eq!(bed.counted("b", "hbone_in"), 2 + 2 * (round as u64 + 1));
        for (container, start) in &before {
            assert_eq!(bed.starts()[container], *start, "{container}");
        }
    }
    assert_eq!(seen_on(captures, &["exclusive-secret"]), [0]);
}
