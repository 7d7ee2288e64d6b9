//! The real agent on a real API server: pods of every kind in real namespaces, as they come, change and end.

#![expect(
    clippy::unwrap_used,
    reason = "test code: a step that fails is a test that fails"
)]

use culvert_kube_tests::{
    Bed, NODE, eventually, logs, mode,
    node::{Node, running},
    rbac,
};
use culvert_lab::Ns;
use serde_json::{Value, json};

const REDIRECTION: &str = "ambient.istio.io/redirection";

/// A pod at the API server that has not been given an address yet; its UID.
async fn made(bed: &Bed, name: &str, more: Value) -> String {
    let pod = bed.pod("mesh", name, NODE, more).await.unwrap();
    pod.metadata.uid.unwrap()
}

async fn annotated(bed: &Bed, name: &str, value: Option<&str>) {
    let what = format!("{name} is annotated {value:?}");
    eventually(&what, || async {
        let pod = bed.pods("mesh").get(name).await?;
        let annotations = pod.metadata.annotations.unwrap_or_default();
        Ok(annotations.get(REDIRECTION).map(String::as_str) == value)
    })
    .await
    .unwrap();
}

/// In the mesh: for the agent, in the kernel, at the API server.
async fn enrolled(bed: &Bed, node: &Node, name: &str, ns: &Ns) {
    node.until_state("mesh", name, "enrolled").unwrap();
    assert!(node.whole(ns).unwrap(), "{name}");
    annotated(bed, name, Some("enabled")).await;
}

fn status(ns: &Ns, phase: &str) -> Value {
    let mut status = running(ns).unwrap();
    status["phase"] = phase.into();
    status
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_of_every_kind() {
    logs();
    let bed = Bed::start("kinds").await.unwrap();
    bed.namespace("mesh", mode("ambient")).await.unwrap();
    let mut node = Node::new("kinds", &bed).unwrap();
    node.start_agent(&[]).unwrap();
    node.until("ready", || Ok(node.status(&[])?.status.success()))
        .unwrap();
    node.start_ztunnel().unwrap();
    let ns = |node: &Node, name: &str| node.lab.pod(name).unwrap();

    // An init container runs: the pod is Pending, has an address, and speaks through the mesh already.
    let init = ns(&node, "init");
    let more = json!({"spec": {
        "initContainers": [
            {"name": "proxy", "image": "a:1", "restartPolicy": "Always"},
            {"name": "migrate", "image": "a:1"}]}});
    let uid = made(&bed, "init", more).await;
    node.container(&uid, "migrate", &init).unwrap();
    let mut pending = status(&init, "Pending");
    pending["initContainerStatuses"] = json!([
        {"name": "proxy", "image": "a:1", "imageID": "", "ready": true, "restartCount": 0, "state": {"running": {}}},
        {"name": "migrate", "image": "a:1", "imageID": "", "ready": false, "restartCount": 0, "state": {"running": {}}}]);
    bed.status("mesh", "init", pending).await.unwrap();
    enrolled(&bed, &node, "init", &init).await;
    let cookie = node.pod("mesh", "init").unwrap()["netns_cookie"].clone();
    // Its containers proper start; later a debugger is put beside them: nothing changes for the mesh.
    node.container(&uid, "app", &init).unwrap();
    bed.status("mesh", "init", status(&init, "Running"))
        .await
        .unwrap();
    let debugger = r#"{"spec":{"ephemeralContainers":[{"name":"debug","image":"a:1"}]}}"#;
    bed.plane
        .kubectl(&[
            "patch",
            "pod",
            "init",
            "-n",
            "mesh",
            "--subresource",
            "ephemeralcontainers",
            "-p",
            debugger,
        ])
        .unwrap();
    node.container(&uid, "debug", &init).unwrap();
    enrolled(&bed, &node, "init", &init).await;
    assert_eq!(node.pod("mesh", "init").unwrap()["netns_cookie"], cookie);

    // Without an address it waits; each of the two fields that bring one is enough.
    for (name, address) in [("single", "podIP"), ("list", "podIPs")] {
        let here = ns(&node, name);
        let uid = made(&bed, name, json!({})).await;
        node.container(&uid, "app", &here).unwrap();
        bed.status("mesh", name, json!({"phase": "Pending"}))
            .await
            .unwrap();
        let ip = here.v4().unwrap();
        let value = if address == "podIP" {
            json!(ip)
        } else {
            json!([{"ip": ip}])
        };
        assert_eq!(node.pod("mesh", name).unwrap(), Value::Null, "it waits");
        bed.status("mesh", name, json!({ address: value }))
            .await
            .unwrap();
        enrolled(&bed, &node, name, &here).await;
    }

    // A static pod: the node knows it by its configuration's hash.
    let fixed = ns(&node, "static");
    let hash = "0123456789abcdef0123456789abcdef";
    let more = json!({"metadata": {"annotations": {"kubernetes.io/config.hash": hash}}});
    made(&bed, "static", more).await;
    node.container(hash, "app", &fixed).unwrap();
    bed.status("mesh", "static", running(&fixed).unwrap())
        .await
        .unwrap();
    enrolled(&bed, &node, "static", &fixed).await;

    // A Job: whichever way it ends, its namespace is let go, and nobody is told to reach it by HBONE any more.
    for (name, end) in [("job", "Succeeded"), ("crashed", "Failed")] {
        let gone = "culvert_unenrolments_total{reason=\"gone\"}";
        let before = node.metric(gone).unwrap();
        let here = ns(&node, name);
        let uid = made(&bed, name, json!({"spec": {"restartPolicy": "Never"}})).await;
        node.container(&uid, "app", &here).unwrap();
        bed.status("mesh", name, running(&here).unwrap())
            .await
            .unwrap();
        enrolled(&bed, &node, name, &here).await;
        node.end_containers(&uid).unwrap();
        bed.status("mesh", name, status(&here, end)).await.unwrap();
        node.until("let go", || Ok(!node.whole(&here)?)).unwrap();
        node.until("counted", || Ok(node.metric(gone)? > before))
            .unwrap();
        annotated(&bed, name, None).await;
    }
    // Deleted, but its processes are still ending: what they send stays captured.
    bed.delete_pod("mesh", "init").await.unwrap();
    node.until("still captured", || {
        let said = node.pod("mesh", "init")?.to_string();
        Ok(said.contains("its processes have not ended"))
    })
    .unwrap();
    assert!(node.whole(&init).unwrap(), "its processes are still there");
    node.end_containers(&uid).unwrap();
    node.until("gone", || Ok(!node.whole(&init)?)).unwrap();
    assert_eq!(node.metric("culvert_enrolled_pods").unwrap(), 3.0);
    node.stop_agent().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_that_moves_to_another_sandbox_and_back_out_of_the_mesh() {
    logs();
    let bed = Bed::start("moves").await.unwrap();
    bed.namespace("mesh", mode("ambient")).await.unwrap();
    let mut node = Node::new("moves", &bed).unwrap();
    node.start_agent(&[]).unwrap();
    node.until("ready", || Ok(node.status(&[])?.status.success()))
        .unwrap();
    node.start_ztunnel().unwrap();
    let (first, second) = (
        node.lab.pod("first").unwrap(),
        node.lab.pod("second").unwrap(),
    );
    let uid = made(&bed, "web", json!({})).await;
    node.container(&uid, "app", &first).unwrap();
    bed.status("mesh", "web", running(&first).unwrap())
        .await
        .unwrap();
    enrolled(&bed, &node, "web", &first).await;

    // The sandbox died; another was made for the same pod, and no plugin told of it.
    node.end_containers(&uid).unwrap();
    node.container(&uid, "again", &second).unwrap();
    bed.status("mesh", "web", running(&second).unwrap())
        .await
        .unwrap();
    node.until("captured in its new namespace", || node.whole(&second))
        .unwrap();
    node.until("let go in the old one", || Ok(!node.whole(&first)?))
        .unwrap();
    enrolled(&bed, &node, "web", &second).await;

    // A further address changes nothing but what is known of it.
    let mut more = running(&second).unwrap();
    more["podIPs"] = json!([{"ip": second.v4().unwrap()}]);
    bed.status("mesh", "web", more).await.unwrap();
    node.until("one address", || {
        Ok(node.pod("mesh", "web")?["addresses"]
            .as_array()
            .map(Vec::len)
            == Some(1))
    })
    .unwrap();
    enrolled(&bed, &node, "web", &second).await;

    // Its namespace becomes excluded, by an agent that was told so.
    node.stop_agent().unwrap();
    node.start_agent(&["--excluded-namespaces", "kube-system,mesh"])
        .unwrap();
    node.until("let go", || Ok(!node.whole(&second)?)).unwrap();
    annotated(&bed, "web", None).await;
    node.stop_agent().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_does_not_succeed_at_once_is_tried_again() {
    logs();
    let bed = Bed::start("again").await.unwrap();
    bed.namespace("mesh", mode("ambient")).await.unwrap();
    let mut node = Node::new("again", &bed).unwrap();
    node.start_agent(&[]).unwrap();
    node.until("ready", || Ok(node.status(&[])?.status.success()))
        .unwrap();

    // Half of it, while no ztunnel is there; the other half when one comes.
    let web = node.lab.pod("web").unwrap();
    let uid = made(&bed, "web", json!({})).await;
    node.container(&uid, "app", &web).unwrap();
    bed.status("mesh", "web", running(&web).unwrap())
        .await
        .unwrap();
    annotated(&bed, "web", Some("pending")).await;
    assert!(
        node.whole(&web).unwrap(),
        "captured before anybody serves it"
    );
    node.start_ztunnel().unwrap();
    enrolled(&bed, &node, "web", &web).await;

    // A pod whose processes come later than its address.
    let late = node.lab.pod("late").unwrap();
    let uid = made(&bed, "late", json!({})).await;
    bed.status("mesh", "late", running(&late).unwrap())
        .await
        .unwrap();
    node.until("not found yet", || {
        let error = node.pod("mesh", "late")?["last_error"].clone();
        Ok(error
            .as_str()
            .is_some_and(|e| e.contains("no running process")))
    })
    .unwrap();
    annotated(&bed, "late", None).await;
    node.container(&uid, "app", &late).unwrap();
    enrolled(&bed, &node, "late", &late).await;

    // Leaving, when the annotation may not be taken away: the kernel lets go all the same, and the rest follows.
    let without = rbac::manifests(|rule, _| rule.resource != "pods/status");
    bed.plane.apply(&without.unwrap()).unwrap();
    let retries = "culvert_annotation_writes_total{result=\"retry\"}";
    let before = node.metric(retries).unwrap();
    eventually("the right is gone", || async {
        let can = bed.plane.kubectl(&[
            "auth",
            "can-i",
            "patch",
            "pods/status",
            "-A",
            "--as=system:serviceaccount:culvert-system:culvert",
        ]);
        Ok(can.is_err())
    })
    .await
    .unwrap();
    bed.patch_namespace(
        "mesh",
        json!({"metadata": {"labels": {"istio.io/dataplane-mode": null}}}),
    )
    .await
    .unwrap();
    for ns in [&web, &late] {
        node.until("let go", || Ok(!node.whole(ns)?)).unwrap();
    }
    node.until("it was tried", || Ok(node.metric(retries)? > before))
        .unwrap();
    annotated(&bed, "web", Some("enabled")).await;
    bed.plane
        .apply(&rbac::manifests(|_, _| true).unwrap())
        .unwrap();
    for name in ["web", "late"] {
        annotated(&bed, name, None).await;
    }
    node.stop_agent().unwrap();
}
