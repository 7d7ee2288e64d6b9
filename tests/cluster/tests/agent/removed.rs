//! Culvert taken away: from a node, from the cluster, and pods too when that is asked for.

use anyhow::{Context as _, ensure};
use culvert_cluster::{AGENT, IN_TIME, Mesh, pod};

use crate::bed::{AMBIENT, Bed, shell, talker};
use crate::guards::{OFF, OnEveryNode};
use crate::installation::{
    configurations, foreign, installed, is_taken_away, of_agent, write_foreign,
};
use crate::traffic::Traffic;
use crate::{alone, guards};

const NODES: [&str; 2] = ["node1", "node2"];

/// Pods of the mesh's namespace start outside the mesh where Culvert has been taken away.
fn starts_outside(bed: &Bed, name: &str, node: &str) {
    bed.start(&[pod(name, node, &["serve"])]);
    assert!(bed.mesh.pod_stats(bed.name(), name).is_err(), "{name}");
}

/// Writes the configuration of a node in a way that no program of ours would, and waits until our entry is in it. Returns
/// what there was without it.
fn written_by_hand(bed: &Bed, node: &str) -> String {
    let list = foreign(bed, node);
    let (name, version) = (&list["name"], &list["cniVersion"]);
    let plugins = serde_json::to_string_pretty(&list["plugins"]).unwrap();
    let plugins = plugins.replace('\n', "\n\t ");
    let text = format!(
        "\n{{ \"plugins\" : {plugins} ,\n\n  \"name\": {name},\t\"culvert.test/unknown\": 1.0e1 , \"cniVersion\":{version}}} \n\n"
    );
    write_foreign(bed, node, &text);
    bed.until(&format!("{node} has our entry again"), || {
        installed(bed, node) && configurations(bed, node).contains("culvert.test/unknown")
    });
    // As the directory is without us: that file alone.
    format!("10-bridge.conflist\n644\n{text}")
}

#[test]
fn a_node_is_selected_no_longer() {
    let _alone = alone();
    let traffic = Traffic::start("deselected");
    let bed = &traffic.bed;
    let before = written_by_hand(bed, "node2");
    let agents = OnEveryNode(bed);
    agents.label("node2", &format!("{OFF}=yes"));
    agents.pass_over_labelled();
    is_taken_away(bed, "node2", &before);
    bed.mesh.wait_for_rollout(AGENT.0, AGENT.1).unwrap();
    assert!(installed(bed, "node1"));
    starts_outside(bed, "outside", "node2");
    // The pods that run there stay in.
    traffic.goes_on();
    agents.label("node2", &format!("{OFF}-"));
    // Not by the DaemonSet's status: its controller may not have looked at the node again.
    bed.until("it has its plugin again", || installed(bed, "node2"));
    bed.mesh.wait_for_rollout(AGENT.0, AGENT.1).unwrap();
    bed.wait_for_membership("outside", true);
    traffic.new_pods_start("after");
    traffic.goes_on();
}

#[test]
fn its_daemonset_is_deleted_with_and_without_its_account() {
    let _alone = alone();
    let traffic = Traffic::start("deleted");
    let bed = &traffic.bed;
    let before = NODES.map(|node| written_by_hand(bed, node));
    let _back = guards::Culvert(bed);
    for round in ["alone", "with-account"] {
        if round == "alone" {
            of_agent(bed, &["delete", "daemonset", AGENT.0, IN_TIME]);
        } else {
            // The account goes first: the agent's token is worth nothing when it asks.
            of_agent(bed, &["delete", "serviceaccount", "culvert", IN_TIME]);
            bed.cluster
                .kubectl(&["delete", "namespace", AGENT.1, IN_TIME])
                .unwrap();
        }
        for (node, before) in NODES.iter().zip(&before) {
            is_taken_away(bed, node, before);
            starts_outside(bed, &format!("{round}-{node}"), node);
        }
        traffic.goes_on();
        Mesh::install_again(bed.cluster).unwrap();
        for node in NODES {
            assert!(installed(bed, node));
            bed.wait_for_membership(&format!("{round}-{node}"), true);
        }
        traffic.goes_on();
    }
}

/// Runs `culvert` of an image on a node, which has the node's root at /host, and returns what it wrote; an error when it
/// failed.
fn debugged(bed: &Bed, node: &str, image: &str, args: &[&str]) -> anyhow::Result<String> {
    let at = format!("node/{node}");
    let image = format!("--image={image}");
    let debug = [
        "debug",
        &at,
        "-n",
        bed.name(),
        "--profile=sysadmin",
        &image,
        "--",
        "culvert",
    ];
    let said = bed
        .cluster
        .kubectl(&[&debug[..], args, &["--host-root", "/host"]].concat())?;
    // "Creating debugging pod NAME with container ..."
    let pod = said
        .split(' ')
        .find(|word| word.starts_with("node-debugger-"));
    let pod = pod.with_context(|| format!("no pod is named: {said}"))?;
    let mut phase = String::new();
    bed.until("the debugger has ended", || {
        phase = bed.pod(pod)["status"]["phase"].to_string();
        ["\"Succeeded\"", "\"Failed\""].contains(&phase.as_str())
    });
    let log = bed.cluster.kubectl(&["logs", pod, "-n", bed.name()])?;
    bed.cluster
        .kubectl(&["delete", "pod", pod, "-n", bed.name(), IN_TIME])?;
    ensure!(phase.contains("Succeeded"), "{phase}: {log}");
    Ok(log)
}

#[test]
fn uninstalled_with_its_pods_everything_is_as_before() {
    let _alone = alone();
    let bed = Bed::new("uninstalled", &[]);
    bed.start_servers();
    let to = bed.addresses("b")[0];
    // From before the mesh: it needs nobody.
    bed.start(&[talker("talker", "node1", to), shell("shell", "node1")]);
    bed.wait_for_more_lines("talker");
    let before = bed.starts();
    bed.label_namespace(AMBIENT);
    bed.mesh.wait_until_enrolled("uninstalled").unwrap();
    bed.start(&[shell("leaver", "node1")]);
    bed.mesh.wait_until_enrolled("uninstalled").unwrap();
    let configured = NODES.map(|node| written_by_hand(&bed, node));
    let _back = guards::Culvert(&bed);
    let template = "jsonpath={.spec.template.spec.containers[0].image}";
    let image = of_agent(&bed, &["get", "daemonset", AGENT.0, "-o", template]);
    of_agent(&bed, &["delete", "daemonset", AGENT.0, IN_TIME]);
    let nodes = bed.cluster.nodes();
    for (node, before) in NODES.iter().zip(&configured) {
        is_taken_away(&bed, node, before);
    }
    // Nobody tells ztunnel that this one has ended: it goes on holding sockets in its namespace.
    bed.cluster
        .kubectl(&[
            "delete",
            "pod",
            "leaver",
            "-n",
            bed.name(),
            "--grace-period=1",
            IN_TIME,
        ])
        .unwrap();
    let culvert = Mesh::culvert().unwrap().display().to_string();
    let uninstall = ["uninstall", "--unenrol-pods", "--wait=30"];
    let find = "for ns in /run/netns/cni-*; do for f in -4 -6; do nsenter --net=$ns ip $f rule list; done; done";
    for node in &nodes {
        // Pods that a test before has left may still be ending, with connections through ztunnel: it says to try again.
        bed.until("all pods are let go of", || {
            // On one node by hand, on the other from the image alone, as the documents say.
            let done = match node.name().as_str() {
                "node1" => bed
                    .cluster
                    .run_on(node, &[&[culvert.as_str()][..], &uninstall].concat()),
                other => debugged(&bed, other, &image, &uninstall),
            };
            done.inspect_err(|error| eprintln!("{}: {error:#}", node.name()))
                .is_ok()
        });
        let left = bed
            .cluster
            .run_on(node, &["ls", "-A", "/sys/fs/bpf"])
            .unwrap();
        assert!(!left.contains("culvert"), "{left}");
        let rules = bed.cluster.run_on(node, &["sh", "-c", find]).unwrap();
        assert!(
            rules.contains("main") && !rules.contains("15001"),
            "{rules}"
        );
    }
    assert!(bed.ask("shell", to).unwrap().starts_with("b "));
    bed.wait_for_more_lines("talker");
    assert_eq!(bed.starts(), before);
    Mesh::install_again(bed.cluster).unwrap();
    bed.mesh.wait_until_enrolled("uninstalled").unwrap();
    bed.wait_for_more_lines("talker");
    assert_eq!(bed.starts(), before);
}
