//! ADD of a pod that the watch has not shown: the agent asks the API server itself, and when that is away too, what is
//! known of the namespace decides.
//!
//! The pods are bound to another node, so that this node's watch never shows them: as it is for a moment with any pod
//! whose kubelet is faster than the watch.

#![expect(
    clippy::unwrap_used,
    reason = "test code: a step that fails is a test that fails"
)]

use std::{
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use culvert_kube_tests::{Bed, logs, mode, node::Node};
use culvert_lab::Ns;
use serde_json::{Value, json};

/// What the plugin asks, by hand; status and body of the answer.
fn add(node: &Node, pod: [&str; 3], ns: &Ns, budget: Duration) -> Result<(u16, Value)> {
    let [namespace, name, uid] = pod;
    let body = json!({
        "pod": {"namespace": namespace, "name": name, "uid": uid}, "container_id": format!("c-{name}"),
        "ifname": "eth0", "network": "podnet", "netns": ns.path(), "addresses": [],
        "budget_ms": u64::try_from(budget.as_millis())?,
    })
    .to_string();
    let mut stream = UnixStream::connect(node.lab.scratch().join("run/agent.sock"))?;
    write!(
        stream,
        "POST /v1/cni/add HTTP/1.1\r\nhost: agent\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP")?;
    let status = head.split(' ').nth(1).context("no status")?.parse()?;
    Ok((status, serde_json::from_str(body)?))
}

async fn elsewhere(bed: &Bed, namespace: &str, name: &str, more: Value) -> String {
    let pod = bed.pod(namespace, name, "elsewhere", more).await.unwrap();
    pod.metadata.uid.unwrap()
}

const BUDGET: Duration = Duration::from_secs(10);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_that_the_watch_has_not_shown() {
    logs();
    let bed = Bed::start("asked").await.unwrap();
    bed.namespace("mesh", mode("ambient")).await.unwrap();
    bed.namespace("plain", json!({})).await.unwrap();
    let mut node = Node::new("asked", &bed).unwrap();
    node.start_agent(&[]).unwrap();
    node.until("ready", || Ok(node.status(&[])?.status.success()))
        .unwrap();
    node.start_ztunnel().unwrap();
    let ns = |name: &str| node.lab.pod(name).unwrap();

    // Of the mesh by its namespace; by a label of its own where nobody else asked for the mesh; not of it.
    let hash = "0123456789abcdef0123456789abcdef";
    for (namespace, name, more, enrolled) in [
        ("mesh", "web", json!({}), true),
        (
            "plain",
            "own",
            json!({"metadata": {"labels": mode("ambient")}}),
            true,
        ),
        ("plain", "none", json!({}), false),
        (
            "mesh",
            "out",
            json!({"metadata": {"labels": mode("none")}}),
            false,
        ),
        // The runtime names a static pod by its configuration's hash, the API server by its mirror's UID.
        (
            "mesh",
            "static",
            json!({"metadata": {"annotations": {"kubernetes.io/config.hash": hash}}}),
            true,
        ),
    ] {
        let uid = elsewhere(&bed, namespace, name, more).await;
        let uid = if name == "static" { hash } else { &uid };
        let here = ns(name);
        let (status, said) = add(&node, [namespace, name, uid], &here, BUDGET).unwrap();
        assert_eq!(
            (status, &said["enrolled"]),
            (200, &json!(enrolled)),
            "{name}: {said}\n{}",
            node.log()
        );
        assert_eq!(node.whole(&here).unwrap(), enrolled, "{name}");
    }

    // Another pod of that name, deleted and made again meanwhile: it is not the one that starts.
    let here = ns("web2");
    let began = Instant::now();
    let short = Duration::from_secs(2);
    let (status, said) = add(&node, ["mesh", "web", "not-this-one"], &here, short).unwrap();
    assert!(
        status >= 400
            && said["retry"] == true
            && said["message"]
                .to_string()
                .contains("no pod mesh/web with this UID"),
        "{status}: {said}"
    );
    // It was looked for again until the plugin would have given up.
    assert!(began.elapsed() >= short / 2 && began.elapsed() < BUDGET);
    assert!(!node.whole(&here).unwrap());

    // Nobody can be asked. Where pods could be of the mesh they wait, where none can be they start.
    let unseen = elsewhere(&bed, "mesh", "unseen", json!({})).await;
    bed.namespace("empty", json!({})).await.unwrap();
    let alone = elsewhere(&bed, "empty", "alone", json!({})).await;
    node.until("the watch knows the namespace", || {
        let decisions = node.lab.scratch().join("decisions.json");
        Ok(std::fs::read_to_string(decisions)?.contains("\"empty\""))
    })
    .unwrap();
    bed.plane.stop_api_server().unwrap();
    let here = ns("unseen");
    let (status, said) = add(&node, ["mesh", "unseen", &unseen], &here, short).unwrap();
    assert!(
        status >= 400
            && said["retry"] == true
            && said["message"].to_string().contains("could not be asked"),
        "{status}: {said}"
    );
    assert!(!node.whole(&here).unwrap());
    for [namespace, name, uid] in [
        ["empty", "alone", &alone],
        // Excluded by configuration, whatever it asks for.
        ["kube-system", "proxy", "some-uid"],
    ] {
        let began = Instant::now();
        let here = ns(name);
        let (status, said) = add(&node, [namespace, name, uid], &here, BUDGET).unwrap();
        assert_eq!((status, &said["enrolled"]), (200, &json!(false)), "{said}");
        assert!(began.elapsed() < BUDGET / 2, "{:?}", began.elapsed());
        assert!(!node.whole(&here).unwrap());
    }
    bed.plane.start_api_server().unwrap();
    let here = ns("unseen2");
    let (status, said) = add(&node, ["mesh", "unseen", &unseen], &here, BUDGET).unwrap();
    assert_eq!((status, &said["enrolled"]), (200, &json!(true)), "{said}");
    assert!(node.whole(&here).unwrap());
    node.stop_agent().unwrap();
}
