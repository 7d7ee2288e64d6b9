//! New pods are in the mesh before their first instruction: whatever starts them, nothing of what they send is seen on the
//! wires of the nodes.

use std::net::SocketAddr;

use culvert_cluster::{IN_TIME, POD, pod};
use serde_json::{Value, json};

use crate::bed::{AMBIENT, Bed, counted_once_each};
use crate::capture::{Capture, seen_on};

/// A container whose first act is to send this.
fn sender(to: SocketAddr, text: &str) -> Value {
    json!({"name": "send", "image": POD, "args": ["send", to.to_string(), text]})
}

fn with_sender(mut pod: Value, to: SocketAddr, text: &str) -> Value {
    pod["spec"]["initContainers"] = json!([sender(to, text)]);
    pod
}

/// A server on node 2 that all ztunnels know.
fn server(bed: &Bed) -> Vec<SocketAddr> {
    bed.start(&[pod("server", "node2", &["serve"])]);
    bed.mesh.wait_until_enrolled(bed.name()).unwrap();
    bed.mesh.tell_peers().unwrap();
    bed.addresses("server")
}

#[test]
fn an_init_container_sends_nothing_in_the_clear() {
    let bed = Bed::new("first", &[AMBIENT]);
    let to = server(&bed);
    let outside = Bed::new("first-outside", &[]);
    let captures = Capture::start(bed.cluster, "first");
    bed.apply(&[
        with_sender(pod("four", "node1", &["serve"]), to[0], "first-secret-4"),
        with_sender(pod("six", "node1", &["serve"]), to[1], "first-secret-6"),
        with_sender(pod("near", "node2", &["serve"]), to[0], "first-secret-n"),
    ]);
    // The same outside the mesh shows that the captures see.
    outside.start(&[
        with_sender(pod("far", "node1", &["serve"]), to[0], "first-open-far"),
        with_sender(pod("near", "node2", &["serve"]), to[1], "first-open-near"),
    ]);
    bed.namespace.wait_until_ready().unwrap();
    let needles = [
        "first-secret-4",
        "first-secret-6",
        "first-secret-n",
        "first-open-far",
        "first-open-near",
    ];
    // Which wires Cilium's pods have is its choice; that it has one to the other node is not.
    let seen = seen_on(captures, &needles);
    assert_eq!(seen[..3], [0, 0, 0], "in the clear: {needles:?}");
    assert!(seen[3] > 0 && seen[4] > 0, "{needles:?}: {seen:?}");
    let tries = |bed: &Bed, pods: &[&str]| -> Vec<u64> {
        pods.iter().map(|pod| bed.tries(pod, "send")).collect()
    };
    let (inside, open) = (
        tries(&bed, &["four", "six", "near"]),
        tries(&outside, &["far", "near"]),
    );
    counted_once_each(bed.counted("server", "hbone_in"), &inside);
    counted_once_each(bed.counted("server", "inbound_accepts"), &open);
}

#[test]
fn jobs_send_nothing_in_the_clear_and_end() {
    let bed = Bed::new("jobs", &[AMBIENT]);
    let to = server(&bed)[0];
    let captures = Capture::start(bed.cluster, "jobs");
    bed.apply(&[json!({
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "job"},
        "spec": {
            "completions": 6,
            "parallelism": 3,
            "template": {"spec": {
                "restartPolicy": "Never",
                "containers": [sender(to, "jobs-secret")],
            }},
        },
    })]);
    let args = [
        "wait",
        "--for=condition=Complete",
        "job/job",
        "--timeout=120s",
    ];
    bed.namespace.kubectl(&args).unwrap();
    assert_eq!(seen_on(captures, &["jobs-secret"]), [0]);
    let pods = bed.pods();
    let names = pods
        .iter()
        .map(|pod| pod["metadata"]["name"].as_str().unwrap());
    let of_the_job: Vec<&str> = names.filter(|name| *name != "server").collect();
    assert_eq!(of_the_job.len(), 6);
    let tries: Vec<u64> = of_the_job
        .iter()
        .map(|name| bed.tries(name, "send"))
        .collect();
    counted_once_each(bed.counted("server", "hbone_in"), &tries);
    // Ztunnel lets go of pods that have ended, though their objects stay.
    for name in of_the_job {
        bed.until(&format!("{name} is let go of"), || {
            bed.mesh.pod_stats("jobs", name).is_err()
        });
    }
}

#[test]
fn a_stateful_pod_comes_back_under_its_name() {
    let bed = Bed::new("stateful", &[AMBIENT]);
    let to = server(&bed)[0];
    let captures = Capture::start(bed.cluster, "stateful");
    let mut main = sender(to, "never");
    main["name"] = "main".into();
    main["args"] = json!(["serve"]);
    bed.apply(&[json!({
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": "db"},
        "spec": {
            "replicas": 1,
            "serviceName": "db",
            "selector": {"matchLabels": {"app": "db"}},
            "template": {
                "metadata": {"labels": {"app": "db"}},
                "spec": {
                    "terminationGracePeriodSeconds": 1,
                    "initContainers": [sender(to, "stateful-secret")],
                    "containers": [main],
                },
            },
        },
    })]);
    let (mut uids, mut tries) = (Vec::new(), Vec::new());
    for round in 1..=3 {
        // Not by the set's status, which may still be that of the pod before.
        bed.until(&format!("db-0 is ready, number {round}"), || {
            let pod = bed.pod("db-0");
            let uid = pod["metadata"]["uid"].clone();
            let ready = pod["status"]["containerStatuses"][0]["ready"] == true;
            if ready && !uids.contains(&uid) {
                uids.push(uid);
            }
            uids.len() == round
        });
        bed.wait_for_membership("db-0", true);
        tries.push(bed.tries("db-0", "send"));
        counted_once_each(bed.counted("server", "hbone_in"), &tries);
        let delete = ["delete", "pod", "db-0", IN_TIME];
        bed.namespace.kubectl(&delete).unwrap();
    }
    assert_eq!(seen_on(captures, &["stateful-secret"]), [0]);
    bed.namespace
        .kubectl(&["delete", "statefulset", "db", IN_TIME])
        .unwrap();
}

#[test]
fn a_deployment_that_rolls_at_full_speed_sends_nothing_in_the_clear() {
    let bed = Bed::new("rolling", &[AMBIENT]);
    let to = server(&bed)[0];
    let captures = Capture::start(bed.cluster, "rolling");
    let mut main = sender(to, "never");
    main["name"] = "main".into();
    main["args"] = json!(["serve"]);
    bed.apply(&[json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "web"},
        "spec": {
            "replicas": 4,
            "strategy": {"rollingUpdate": {"maxSurge": "100%", "maxUnavailable": "100%"}},
            "selector": {"matchLabels": {"app": "web"}},
            "template": {
                "metadata": {"labels": {"app": "web"}},
                "spec": {
                    // Gone from the API server before it has ended: it is to stay captured even so.
                    "terminationGracePeriodSeconds": 0,
                    "initContainers": [sender(to, "rolling-secret")],
                    "containers": [main],
                },
            },
        },
    })]);
    let rolled_out = ["rollout", "status", "deployment/web", "--timeout=120s"];
    bed.namespace.kubectl(&rolled_out).unwrap();
    // Each begins before the pods of the one before are ready.
    for turn in 0..4 {
        // Not by `rollout restart`, which refuses a second one within the same second.
        let template =
            json!({"metadata": {"annotations": {"culvert.test/turn": turn.to_string()}}});
        let patch = json!({"spec": {"template": template}}).to_string();
        bed.namespace
            .kubectl(&["patch", "deployment/web", "--patch", &patch])
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(700));
    }
    bed.namespace.kubectl(&rolled_out).unwrap();
    bed.until("only the last pods are left, all in the mesh", || {
        let pods = bed.pods();
        pods.len() == 5
            && pods
                .iter()
                .all(|pod| crate::bed::redirection(pod).as_deref() == Some("enabled"))
    });
    assert_eq!(seen_on(captures, &["rolling-secret"]), [0]);
    assert!(bed.counted("server", "hbone_in") >= 8);
}
