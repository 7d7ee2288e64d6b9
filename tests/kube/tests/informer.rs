//! istio-cni's informer cases, as far as they are about seeing and deciding, against a real API server: what is done to
//! objects there has to arrive in the picture, and lead to the right decision.

use culvert::{
    model::{Cluster, Phase, PodUid},
    plan::membership::{Membership, Reason, Settings, Waiting, decide},
};
use culvert_kube_tests::{Bed, MODE, NODE, find, logs, mode};
use serde_json::json;

fn decided(cluster: &Cluster, namespace: &str, name: &str) -> Option<Membership> {
    let pod = find(cluster, namespace, name)?;
    let namespace = cluster.namespaces.get(namespace);
    Some(decide(pod, namespace, &Settings::default()))
}

fn is_in(cluster: &Cluster, namespace: &str, name: &str) -> bool {
    matches!(decided(cluster, namespace, name), Some(Membership::In(_)))
}

fn is_out(cluster: &Cluster, namespace: &str, name: &str, why: Reason) -> bool {
    decided(cluster, namespace, name) == Some(Membership::Out(why))
}

const V4: &str = "11.1.1.12";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn informer_table() {
    logs();
    let bed = Bed::start("informer").await.unwrap();
    let mut w = bed.watcher().await.unwrap();
    w.until("listed", |c| c.listed && c.opted_in_listed)
        .await
        .unwrap();
    bed.namespace("test", json!({})).await.unwrap();
    bed.pod("test", "web", NODE, json!({})).await.unwrap();
    w.until("seen", |c| is_out(c, "test", "web", Reason::NotSelected))
        .await
        .unwrap();

    // Added when its namespace is labelled; waits for an address.
    bed.patch_namespace("test", json!({"metadata": {"labels": {MODE: "ambient"}}}))
        .await
        .unwrap();
    w.until("waits for an address", |c| {
        matches!(
            decided(c, "test", "web"),
            Some(Membership::Wait(Waiting::Address(_)))
        )
    })
    .await
    .unwrap();
    bed.status(
        "test",
        "web",
        json!({"phase": "Running", "podIP": V4, "podIPs": [{"ip": V4}]}),
    )
    .await
    .unwrap();
    w.until("in", |c| is_in(c, "test", "web")).await.unwrap();
    // Dual stack.
    bed.status(
        "test",
        "web",
        json!({"podIPs": [{"ip": V4}, {"ip": "2001:db8::12"}]}),
    )
    .await
    .unwrap();
    w.until("two addresses", |c| {
        find(c, "test", "web").unwrap().addresses.len() == 2
    })
    .await
    .unwrap();
    // Removed by its own label, and back.
    bed.patch_pod("test", "web", json!({"labels": {MODE: "none"}}))
        .await
        .unwrap();
    w.until("opted out", |c| is_out(c, "test", "web", Reason::OptedOut))
        .await
        .unwrap();
    bed.patch_pod("test", "web", json!({"labels": {MODE: null}}))
        .await
        .unwrap();
    w.until("back", |c| is_in(c, "test", "web")).await.unwrap();
    // Removed by its namespace's label.
    bed.patch_namespace("test", json!({"metadata": {"labels": {MODE: null}}}))
        .await
        .unwrap();
    w.until("out with its namespace", |c| {
        is_out(c, "test", "web", Reason::NotSelected)
    })
    .await
    .unwrap();
    // In by its own label alone.
    bed.patch_pod("test", "web", json!({"labels": {MODE: "ambient"}}))
        .await
        .unwrap();
    w.until("in by itself", |c| is_in(c, "test", "web"))
        .await
        .unwrap();
    w.until("counted", |c| c.opted_in.get("test") == Some(&1))
        .await
        .unwrap();
    // Annotations change a living pod.
    let annotations = json!({"annotations": {
        "ambient.istio.io/bypass-inbound-capture": "true", "culvert.dev/exclude-outbound-ports": "5432",
        "unrelated": "x".repeat(1000)}});
    bed.patch_pod("test", "web", annotations).await.unwrap();
    w.until("bypass", |c| {
        let Some(Membership::In(wanted)) = decided(c, "test", "web") else {
            return false;
        };
        wanted.bypass_inbound && wanted.exclude_outbound_ports.contains(&5432)
    })
    .await
    .unwrap();
    assert_eq!(
        w.find("test", "web").unwrap().annotations.len(),
        2,
        "others are dropped"
    );
    bed.patch_namespace(
        "test",
        json!({"metadata": {"annotations": {"culvert.dev/exclude-inbound-ports": "9090"}}}),
    )
    .await
    .unwrap();
    w.until("of its namespace", |c| {
        matches!(decided(c, "test", "web"), Some(Membership::In(w)) if w.exclude_inbound_ports.contains(&9090))
    })
    .await
    .unwrap();

    // A Job's pod that ends is out, and stays known.
    bed.status("test", "web", json!({"phase": "Succeeded"}))
        .await
        .unwrap();
    w.until("ended", |c| is_out(c, "test", "web", Reason::Ended))
        .await
        .unwrap();
    assert_eq!(w.find("test", "web").unwrap().phase, Phase::Succeeded);

    // Being deleted: still in, until it is gone.
    bed.namespace("drain", mode("ambient")).await.unwrap();
    let slow = json!({"metadata": {"finalizers": ["culvert.dev/test"]}});
    bed.pod("drain", "slow", NODE, slow).await.unwrap();
    bed.status("drain", "slow", json!({"phase": "Running", "podIP": V4}))
        .await
        .unwrap();
    w.until("in", |c| is_in(c, "drain", "slow")).await.unwrap();
    bed.delete_pod("drain", "slow").await.unwrap();
    w.until("deleting", |c| {
        find(c, "drain", "slow").is_some_and(|p| p.deleting)
    })
    .await
    .unwrap();
    assert!(is_in(&w.cluster.borrow(), "drain", "slow"));
    bed.patch_pod("drain", "slow", json!({"finalizers": null}))
        .await
        .unwrap();
    w.until("gone", |c| find(c, "drain", "slow").is_none())
        .await
        .unwrap();

    // A successor of the same name is another pod.
    bed.pod("drain", "again", NODE, json!({})).await.unwrap();
    w.until("first", |c| find(c, "drain", "again").is_some())
        .await
        .unwrap();
    let first = w.reference("drain", "again").unwrap();
    bed.delete_pod("drain", "again").await.unwrap();
    bed.pod("drain", "again", NODE, json!({})).await.unwrap();
    w.until("second", |c| {
        find(c, "drain", "again").is_some_and(|p| p.uid != first.uid)
            && !c.pods.contains_key(&first.uid)
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_never_is_in_the_mesh() {
    logs();
    let bed = Bed::start("never").await.unwrap();
    let mut w = bed.watcher().await.unwrap();
    bed.namespace("mesh", mode("ambient")).await.unwrap();
    bed.namespace("istio-system", mode("ambient"))
        .await
        .unwrap();
    bed.patch_namespace(
        "kube-system",
        json!({"metadata": {"labels": mode("ambient")}}),
    )
    .await
    .unwrap();
    let plane = json!({"metadata": {"labels": {"app": "ztunnel"}}});
    for (namespace, name, more, why) in [
        (
            "mesh",
            "host",
            json!({"spec": {"hostNetwork": true}}),
            Reason::HostNetwork,
        ),
        (
            "mesh",
            "sidecar",
            json!({"metadata": {"annotations": {"sidecar.istio.io/status": "{}"}}}),
            Reason::Sidecar,
        ),
        (
            "kube-system",
            "excluded",
            json!({"metadata": {"labels": mode("ambient")}}),
            Reason::ExcludedNamespace,
        ),
        ("istio-system", "ztunnel-x", plane, Reason::Ztunnel),
    ] {
        bed.pod(namespace, name, NODE, more).await.unwrap();
        bed.status(namespace, name, json!({"phase": "Running", "podIP": V4}))
            .await
            .unwrap();
        w.until(name, |c| is_out(c, namespace, name, why))
            .await
            .unwrap();
    }
    // A pod of another node is none of ours, but its wish is counted.
    bed.pod(
        "default",
        "elsewhere",
        "there",
        json!({"metadata": {"labels": mode("ambient")}}),
    )
    .await
    .unwrap();
    w.until("counted", |c| c.opted_in.get("default") == Some(&1))
        .await
        .unwrap();
    assert!(w.find("default", "elsewhere").is_none());
    bed.patch_pod("default", "elsewhere", json!({"labels": {MODE: null}}))
        .await
        .unwrap();
    w.until("no longer", |c| !c.opted_in.contains_key("default"))
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn static_pods_and_pods_not_shown_yet() {
    logs();
    let bed = Bed::start("static").await.unwrap();
    bed.namespace("test", json!({})).await.unwrap();
    let hash = json!({"metadata": {"annotations": {"kubernetes.io/config.hash": "0123abcd"}}});
    let made = bed.pod("test", "mirror", NODE, hash).await.unwrap();
    // No run(): the watch has shown nothing, as when an ADD comes before it.
    let config = culvert::watch::client::config(Some(&bed.kubeconfig))
        .await
        .unwrap();
    let options = culvert::watch::Options {
        node: NODE.into(),
        instance: "x".into(),
        opt_in: [].into(),
    };
    let api = culvert::watch::Api::new(culvert::watch::client::connect(&config).unwrap(), options);
    let pod = api.get_pod("test", "mirror").await.unwrap().unwrap();
    assert!(pod.is_called(&PodUid::from("0123abcd")));
    assert!(pod.is_called(&PodUid::from(made.metadata.uid.unwrap().as_str())));
    assert!(!pod.is_called(&PodUid::from("other")));
    assert!(api.get_pod("test", "nobody").await.unwrap().is_none());
    assert!(api.get_pod("nowhere", "nobody").await.unwrap().is_none());
}
