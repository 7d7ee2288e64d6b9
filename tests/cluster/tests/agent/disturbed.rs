//! The agent killed and replaced, the API server and the container runtime away, a node without power, another party at
//! the CNI configuration.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use culvert_cluster::{AGENT, Service};
use serde_json::json;

use crate::alone;
use crate::bed::{AMBIENT, Bed};
use crate::capture::{Capture, seen_on};
use crate::traffic::{Traffic, installed, of_agent};

#[test]
fn the_agent_is_killed() {
    let _alone = alone();
    let traffic = Traffic::start("killed");
    let captures = Capture::start(traffic.bed.cluster, "killed");
    for node in ["node1", "node2"] {
        let node = traffic.bed.cluster.node(node).unwrap();
        let kill = ["sh", "-c", "kill -9 $(pgrep -x culvert)"];
        traffic.bed.cluster.run_on(&node, &kill).unwrap();
    }
    // While it is away, and when it is back.
    traffic.bed.start(&[
        traffic.sender("one", "node1", "killed-secret"),
        traffic.sender("two", "node2", "killed-secret"),
    ]);
    for pod in ["one", "two"] {
        traffic.bed.wait_for_membership(pod, true);
    }
    traffic.goes_on();
    assert_eq!(seen_on(captures, &["killed-secret"]), [0]);
}

#[test]
fn the_agent_is_rolled_to_another_image_and_back_while_pods_start_and_talk() {
    let _alone = alone();
    let traffic = Traffic::start("rolled");
    let bed = &traffic.bed;
    for node in bed.cluster.nodes() {
        let [from, to] = ["dev", "next"].map(|tag| format!("docker.io/library/culvert:{tag}"));
        let tag = [
            "ctr", "-n", "k8s.io", "images", "tag", "--force", &from, &to,
        ];
        bed.cluster.run_on(&node, &tag).unwrap();
    }
    let captures = Capture::start(bed.cluster, "rolled");
    let next = ["set", "image", "daemonset/culvert", "agent=culvert:next"];
    let back = ["rollout", "undo", "daemonset/culvert"];
    for (round, change) in [("next", &next[..]), ("back", &back[..])] {
        of_agent(bed, change);
        let names = ["node1", "node2"].map(|node| (format!("{round}-{node}"), node));
        let pods = names
            .each_ref()
            .map(|(name, node)| traffic.sender(name, node, "rolled-secret"));
        bed.start(&pods);
        bed.mesh.wait_for_rollout(AGENT.0, AGENT.1).unwrap();
        for (name, node) in &names {
            bed.wait_for_membership(name, true);
            assert!(installed(bed, node), "an upgrade takes nothing away");
        }
        traffic.goes_on();
    }
    assert_eq!(seen_on(captures, &["rolled-secret"]), [0]);
}

#[test]
fn the_api_server_is_away() {
    let _alone = alone();
    let traffic = Traffic::start("away");
    let later = Bed::new("away-later", &[]);
    later.start_servers();
    let before = traffic.bed.counted("load", "hbone_out");
    traffic.bed.cluster.stop_api_server().unwrap();
    // Longer than a watch waits before it is taken for dead.
    std::thread::sleep(Duration::from_secs(15));
    traffic.bed.cluster.start_api_server().unwrap();
    // Ztunnel's counters began anew if it had been told to let go.
    assert!(traffic.bed.counted("load", "hbone_out") > before + 50);
    traffic.goes_on();
    // The watch goes on as well.
    later.label_namespace(AMBIENT);
    for pod in ["a", "b"] {
        later.wait_for_membership(pod, true);
    }
    traffic.new_pods_start("after");
}

#[test]
fn the_container_runtime_is_restarted() {
    let _alone = alone();
    let traffic = Traffic::start("runtime");
    for node in traffic.bed.cluster.nodes() {
        for service in [Service::Containerd, Service::Kubelet] {
            traffic.bed.cluster.stop_service(&node, service).unwrap();
            traffic.bed.cluster.start_service(&node, service).unwrap();
        }
    }
    traffic.new_pods_start("after");
    traffic.goes_on();
}

#[test]
fn another_party_rewrites_the_cni_configuration_in_a_loop() {
    let _alone = alone();
    let traffic = Traffic::start("rewritten");
    let bed = &traffic.bed;
    let node = bed.cluster.node("node1").unwrap();
    let file = node.dir().join("etc/cni/net.d/10-bridge.conflist");
    let mut foreign: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    let plugins = foreign["plugins"].as_array_mut().unwrap();
    plugins.retain(|plugin| plugin["type"] != "culvert-cni");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let rewriting = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                // From within the node: its /etc is an overlay, which may not be changed from beneath.
                let script = "cat > /etc/cni/net.d/.foreign && mv /etc/cni/net.d/.foreign /etc/cni/net.d/10-bridge.conflist";
                let mut command = bed.cluster.command_on(&node, &["sh", "-c", script]).unwrap();
                let mut child = command
                    .stdin(std::process::Stdio::piped())
                    .spawn()
                    .unwrap();
                let mut input = child.stdin.take().unwrap();
                std::io::Write::write_all(&mut input, foreign.to_string().as_bytes()).unwrap();
                drop(input);
                child.wait().unwrap();
                std::thread::sleep(Duration::from_millis(100));
            }
        });
        // Told to whoever looks at the node.
        let events = ["get", "events", "-A", "-o", "json"];
        let told = |text: &str| {
            text.contains("CulvertCniConfiguration") && text.contains("overwritten again and again")
        };
        let said = bed
            .cluster
            .admin()
            .wait_until("the event", crate::bed::LONG, &events, told);
        // Whatever gap it finds, a new pod is in the mesh soon.
        traffic.new_pods_start("meanwhile");
        stop.store(true, Ordering::Relaxed);
        rewriting.join().unwrap();
        said.unwrap();
    });
    bed.until("the configuration is whole again", || {
        installed(bed, "node1")
    });
    bed.mesh.wait_for_rollout(AGENT.0, AGENT.1).unwrap();
    traffic.new_pods_start("after");
    traffic.goes_on();
}

#[test]
fn a_node_is_rebooted_and_its_kubelet_is_first() {
    let _alone = alone();
    let bed = Bed::new("reboot", &[AMBIENT]);
    bed.start(&[culvert_cluster::pod("a", "node1", &["serve"])]);
    bed.mesh.wait_until_enrolled("reboot").unwrap();
    bed.mesh.tell_peers().unwrap();
    let to = bed.addresses("a")[0];
    let mut pod = culvert_cluster::pod("b", "node2", &["serve"]);
    pod["spec"]["restartPolicy"] = "Always".into();
    let args = ["send", &to.to_string(), "reboot-secret"];
    pod["spec"]["initContainers"] =
        json!([{"name": "send", "image": culvert_cluster::POD, "args": args}]);
    bed.start(&[pod]);
    bed.wait_for_membership("b", true);
    let sandbox = |bed: &Bed| bed.pod("b")["status"]["containerStatuses"][0]["containerID"].clone();
    let (before, carried) = (sandbox(&bed), bed.counted("a", "hbone_in"));
    assert_eq!(carried, 1);

    let node = bed.cluster.node("node2").unwrap();
    // On the other node: this one's wires are new after it.
    let mut captures = Capture::start(bed.cluster, "reboot");
    captures.truncate(1);
    bed.cluster.power_off(&node).unwrap();
    let services = [Service::Kubelet, Service::KubeProxy];
    bed.cluster.power_on(&node, &services).unwrap();
    bed.until("the pod is back", || {
        let pod = bed.pod("b");
        sandbox(&bed) != before && pod["status"]["containerStatuses"][0]["ready"] == true
    });
    bed.wait_for_membership("b", true);
    assert_eq!(seen_on(captures, &["reboot-secret"]), [0]);
    assert_eq!(bed.counted("a", "hbone_in"), 2);
    assert_eq!(bed.counted("a", "inbound_accepts"), 0);
    bed.mesh.wait_for_rollout(AGENT.0, AGENT.1).unwrap();
}
