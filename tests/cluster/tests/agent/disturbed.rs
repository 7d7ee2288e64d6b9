//! The agent killed, the API server and the container runtime away, a token void, a node without power, another party at the
//! CNI configuration.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use culvert_cluster::{AGENT, IN_TIME, Service};
use culvert_lab::Stop;
use serde_json::json;

use crate::alone;
use crate::bed::{AMBIENT, Bed, counted_once_each, redirection};
use crate::capture::{Capture, seen_on};
use crate::guards::{ApiServerOff, OFF, OnEveryNode, PowerOff, Tokens};
use crate::installation::{
    foreign, installed, of_agent, running_agents, staying_agents, write_foreign,
};
use crate::traffic::Traffic;

#[test]
fn the_agent_is_killed() {
    let _alone = alone();
    let traffic = Traffic::start("killed");
    let captures = Capture::start(traffic.bed.cluster, "killed");
    for node in ["node1", "node2"] {
        let node = traffic.bed.cluster.node(node).unwrap();
        let kill = ["pkill", "-9", "-x", "culvert"];
        traffic.bed.until("there is an agent to be killed", || {
            traffic.bed.cluster.run_on(&node, &kill).is_ok()
        });
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
fn the_api_server_is_away_for_a_minute() {
    let _alone = alone();
    let traffic = Traffic::start("away");
    let later = Bed::new("away-later", &[]);
    later.start_servers();
    let before = traffic.bed.counted("load", "hbone_out");
    let agents = running_agents(&traffic.bed);
    let off = ApiServerOff::begin(&traffic.bed);
    // Longer than a watch waits before it is taken for dead, and than nodes may be silent.
    std::thread::sleep(Duration::from_secs(60));
    drop(off);
    // Ztunnel's counters began anew if it had been told to let go.
    assert!(traffic.bed.counted("load", "hbone_out") > before + 200);
    traffic.goes_on();
    // The watch goes on as well, in the same agents.
    later.label_namespace(AMBIENT);
    for pod in ["a", "b"] {
        later.wait_for_membership(pod, true);
    }
    traffic.new_pods_start("after");
    assert_eq!(running_agents(&traffic.bed), agents);
}

#[test]
fn the_agents_token_is_worth_nothing_and_is_renewed() {
    let _alone = alone();
    let traffic = Traffic::start("token");
    let bed = &traffic.bed;
    let later = Bed::new("token-later", &[]);
    later.start_servers();
    let agents = running_agents(bed);
    // A token ends with the account that it was made for, and one of the same name is another. No token lives less than ten
    // minutes, so this is how one ends within a test.
    let _tokens = Tokens(bed);
    of_agent(bed, &["delete", "serviceaccount", "culvert", IN_TIME]);
    of_agent(bed, &["create", "serviceaccount", "culvert"]);
    // Watches outlive the token that they began with, but not the server.
    drop(ApiServerOff::begin(bed));
    bed.until("both agents say that they are refused", || {
        let names = agents.keys().filter(|name| {
            let log = ["logs", "-n", AGENT.1, name, "--since=5m"];
            let log = bed.cluster.kubectl(&log).unwrap_or_default();
            log.contains("refuses the agent's token")
        });
        names.count() == agents.len()
    });
    later.label_namespace(AMBIENT);
    traffic.goes_on();
    assert_eq!(redirection(&later.pod("a")), None, "nobody could know");
    // A kubelet asks for a new one after four fifths of the old one's life, or when it has just been started.
    for node in bed.cluster.nodes() {
        let kubelet = Service::Kubelet;
        bed.cluster.stop_service(&node, kubelet).unwrap();
        bed.cluster.start_service(&node, kubelet).unwrap();
    }
    for pod in ["a", "b"] {
        later.wait_for_membership(pod, true);
    }
    bed.mesh.wait_for_rollout(AGENT.0, AGENT.1).unwrap();
    traffic.new_pods_start("after");
    traffic.goes_on();
    assert_eq!(running_agents(bed), agents, "the same agents go on");
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
    let foreign = foreign(bed, "node1").to_string();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let at_the_end = Stop::at_the_end(&stop);
        let rewriting = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                write_foreign(bed, "node1", &foreign);
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
        drop(at_the_end);
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

/// How often a pod could not start because the plugin has found no agent, as the kubelet tells it.
fn refusals(bed: &Bed, pod: &str) -> usize {
    let field = format!("--field-selector=involvedObject.name={pod},reason=FailedCreatePodSandBox");
    let events = ["events", "-n", bed.name(), &field];
    let events = bed.cluster.admin().get(&events).unwrap();
    let events = events["items"].as_array().unwrap().iter();
    let note = |event: &&serde_json::Value| {
        let note = event["message"].as_str().unwrap_or_default();
        note.contains("has to wait for culvert's agent")
    };
    events.filter(note).count()
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
    assert_eq!(refusals(&bed, "b"), 0);
    let (before, carried) = (sandbox(&bed), bed.counted("a", "hbone_in"));
    counted_once_each(carried, &[bed.tries("b", "send")]);

    let node = bed.cluster.node("node2").unwrap();
    // On the other node: this one's wires are new after it.
    let mut captures = Capture::start(bed.cluster, "reboot");
    captures.truncate(1);
    let agents = OnEveryNode(&bed);
    let off = PowerOff::begin(&bed, &node);
    // Its agent is held back until somebody has asked for it.
    agents.label("node2", &format!("{OFF}=yes"));
    agents.pass_over_labelled();
    bed.until("no agent is to be on it", || {
        staying_agents(&bed) == ["node1"]
    });
    drop(off);
    bed.until("the plugin has kept the pod from starting", || {
        refusals(&bed, "b") > 0
    });
    let agent = bed.cluster.run_on(&node, &["pgrep", "-x", "culvert"]);
    assert!(agent.is_err(), "an agent runs: {agent:?}");
    agents.label("node2", &format!("{OFF}-"));
    bed.until("the pod is back", || {
        let pod = bed.pod("b");
        sandbox(&bed) != before && pod["status"]["containerStatuses"][0]["ready"] == true
    });
    bed.wait_for_membership("b", true);
    assert_eq!(seen_on(captures, &["reboot-secret"]), [0]);
    let again = bed.tries("b", "send");
    counted_once_each(bed.counted("a", "hbone_in") - carried, &[again]);
    assert_eq!(bed.counted("a", "inbound_accepts"), 0);
    bed.mesh.wait_for_rollout(AGENT.0, AGENT.1).unwrap();
}
