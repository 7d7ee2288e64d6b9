//! What only concerns Cilium: its agent starts anew and is configured anew while traffic flows and pods start.

use std::sync::PoisonError;

use culvert_cluster::{AGENT, Cluster, POD, Service, pod};
use serde_json::json;

use crate::bed::{AMBIENT, Bed, LONG, counted_once_each, talker};
use crate::capture::{Capture, seen_on};
use crate::turns::{CHANGED, ON_IT};

/// The only test on the cluster for a while. One alone may wait for this: two would wait for each other.
struct Alone(());

impl Alone {
    /// Waits until the others have ended; this one has its turn already.
    fn wait() -> Self {
        let on_it = ON_IT.lock().unwrap();
        let mut on_it = CHANGED
            .wait_while(on_it, |on_it| *on_it != Some(1))
            .unwrap();
        *on_it = None;
        Self(())
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        *ON_IT.lock().unwrap_or_else(PoisonError::into_inner) = Some(1);
        CHANGED.notify_all();
    }
}

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
    let _alone = Alone::wait();
    bed.start_servers();
    bed.mesh.wait_until_enrolled("exclusive").unwrap();
    bed.mesh.tell_peers().unwrap();
    let to = bed.addresses("b");
    bed.start(&[
        talker("talker", "node1", to[0]),
        talker("talker6", "node1", to[1]),
    ]);
    let before = bed.starts();
    let goes_on = || {
        for talker in ["talker", "talker6"] {
            bed.wait_for_more_lines(talker);
        }
        let starts = bed.starts();
        for (container, start) in &before {
            assert_eq!(starts[container], *start, "{container}");
        }
    };

    // Cilium's default takes away every CNI configuration that is not its own. Pods may start outside then; the agent says
    // so and who it is, and has them in the mesh a moment later.
    restart_with(bed.cluster, "cni-exclusive", "true");
    bed.start(&[
        pod("one-exclusive", "node1", &["serve"]),
        pod("two-exclusive", "node2", &["serve"]),
    ]);
    for name in ["one-exclusive", "two-exclusive"] {
        bed.wait_for_membership(name, true);
    }
    let events = ["get", "events", "-A", "-o", "json"];
    let told = |text: &str| {
        text.contains("CulvertCiliumExclusive") && text.contains("set cni.exclusive=false")
    };
    let events = bed
        .cluster
        .admin()
        .wait_until("the event", LONG, &events, told);
    events.unwrap();
    goes_on();

    // As it is meant to be: while Cilium's agent is away and while it starts, nothing is sent in the clear.
    let captures = Capture::start(bed.cluster, "exclusive");
    let carried = bed.counted("b", "hbone_in");
    restart_with(bed.cluster, "cni-exclusive", "false");
    bed.mesh.wait_for_rollout(AGENT.0, AGENT.1).unwrap();
    restart_with(bed.cluster, "cni-exclusive", "false");
    let starting = |name: &str, node: &str| {
        let mut pod = pod(name, node, &["serve"]);
        let send = ["send", &to[0].to_string(), "exclusive-secret"];
        pod["spec"]["initContainers"] = json!([{"name": "send", "image": POD, "args": send}]);
        pod
    };
    bed.start(&[starting("one", "node1"), starting("two", "node2")]);
    for name in ["one", "two"] {
        bed.wait_for_membership(name, true);
    }
    let tries = ["one", "two"].map(|pod| bed.tries(pod, "send"));
    counted_once_each(bed.counted("b", "hbone_in") - carried, &tries);
    assert_eq!(seen_on(captures, &["exclusive-secret"]), [0]);
    goes_on();
}
