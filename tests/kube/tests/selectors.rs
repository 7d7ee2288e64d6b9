//! Enablement selectors in place of the label, on a real API server: who they match is in the mesh, and leaves it when the
//! labels that matched go, whichever object carried them.

#![expect(
    clippy::unwrap_used,
    reason = "test code: a step that fails is a test that fails"
)]

use culvert_kube_tests::{
    Bed, NODE, eventually, logs, mode,
    node::{Node, running},
};
use culvert_lab::Ns;
use serde_json::{Value, json};

/// As istio-cni takes them: one of these, and in it both parts.
const SELECTORS: &str = "\
- podSelector: {matchLabels: {mesh: in}}
- podSelector: {matchExpressions: [{key: mesh, operator: NotIn, values: [out]}]}
  namespaceSelector: {matchLabels: {team: blue}}
";

async fn pod(bed: &Bed, node: &mut Node, namespace: &str, name: &str, labels: Value) -> Ns {
    let ns = node.lab.pod(name).unwrap();
    let more = json!({"metadata": {"labels": labels}});
    let pod = bed.pod(namespace, name, NODE, more).await.unwrap();
    let uid = pod.metadata.uid.unwrap();
    node.container(&uid, "app", &ns).unwrap();
    let status = running(&ns).unwrap();
    bed.status(namespace, name, status).await.unwrap();
    ns
}

/// In the mesh or not: in the kernel and by its annotation.
async fn is(bed: &Bed, node: &Node, namespace: &str, name: &str, ns: &Ns, inside: bool) {
    let what = format!("{name} in: {inside}");
    node.until(&what, || Ok(node.whole(ns)? == inside)).unwrap();
    eventually(&what, || async {
        let pod = bed.pods(namespace).get(name).await?;
        let annotations = pod.metadata.annotations.unwrap_or_default();
        let enabled = annotations.get("ambient.istio.io/redirection");
        Ok(enabled.map(String::as_str) == inside.then_some("enabled"))
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_selected_is_in_and_out_again_on_a_change() {
    logs();
    let bed = Bed::start("selectors").await.unwrap();
    bed.namespace("blue", json!({"team": "blue"}))
        .await
        .unwrap();
    // The label that counts without selectors.
    bed.namespace("plain", mode("ambient")).await.unwrap();
    let mut node = Node::new("selectors", &bed).unwrap();
    node.start_agent(&["--enablement-selectors", SELECTORS])
        .unwrap();
    node.until("ready", || Ok(node.status(&[])?.status.success()))
        .unwrap();
    node.start_ztunnel().unwrap();

    let by_pod = pod(&bed, &mut node, "plain", "by-pod", json!({"mesh": "in"})).await;
    let by_team = pod(&bed, &mut node, "blue", "by-team", json!({})).await;
    let opted_out = pod(&bed, &mut node, "blue", "opted-out", json!({"mesh": "out"})).await;
    let by_label = pod(&bed, &mut node, "plain", "by-label", json!({})).await;
    is(&bed, &node, "plain", "by-pod", &by_pod, true).await;
    is(&bed, &node, "blue", "by-team", &by_team, true).await;
    is(&bed, &node, "blue", "opted-out", &opted_out, false).await;
    // Only the selectors count.
    is(&bed, &node, "plain", "by-label", &by_label, false).await;

    // The pods' own labels change.
    let label = |value: Value| json!({"labels": {"mesh": value}});
    bed.patch_pod("plain", "by-pod", label(Value::Null))
        .await
        .unwrap();
    bed.patch_pod("blue", "opted-out", label(json!("maybe")))
        .await
        .unwrap();
    is(&bed, &node, "plain", "by-pod", &by_pod, false).await;
    is(&bed, &node, "blue", "opted-out", &opted_out, true).await;
    is(&bed, &node, "blue", "by-team", &by_team, true).await;

    // The namespaces' labels change.
    let team = |value: Value| json!({"metadata": {"labels": {"team": value}}});
    bed.patch_namespace("blue", team(json!("red")))
        .await
        .unwrap();
    bed.patch_namespace("plain", team(json!("blue")))
        .await
        .unwrap();
    for (namespace, name, ns, inside) in [
        ("blue", "by-team", &by_team, false),
        ("blue", "opted-out", &opted_out, false),
        ("plain", "by-pod", &by_pod, true),
        ("plain", "by-label", &by_label, true),
    ] {
        is(&bed, &node, namespace, name, ns, inside).await;
    }
    node.stop_agent().unwrap();
}
