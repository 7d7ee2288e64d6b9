//! What the picture makes of an API server that goes, comes back, forgets, or is asked for a lot at once.

use std::time::{Duration, Instant};

use culvert_kube_tests::{Bed, MODE, NODE, find, logs, mode};
use serde_json::json;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn api_server_restarted() {
    logs();
    let bed = Bed::start("restarted").await.unwrap();
    bed.namespace("test", mode("ambient")).await.unwrap();
    for name in ["stays", "goes"] {
        bed.pod("test", name, NODE, json!({})).await.unwrap();
    }
    let mut w = bed.watcher().await.unwrap();
    w.until("all", |c| c.listed && c.pods.len() == 2)
        .await
        .unwrap();
    // From here on the picture may never be emptier than what is true: a watcher of each change checks it.
    let mut each = w.cluster.clone();
    let watchdog = tokio::spawn(async move {
        loop {
            let whole = |c: &culvert::model::Cluster| {
                c.listed && find(c, "test", "stays").is_some() && c.namespaces.contains_key("test")
            };
            if !whole(&each.borrow_and_update()) {
                return;
            }
            if each.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    });
    tokio::task::block_in_place(|| bed.plane.stop_api_server()).unwrap();
    let interrupted = w.api.stats();
    let started = Instant::now();
    while interrupted.interruptions.get() < 4 {
        assert!(
            started.elapsed() < Duration::from_secs(30),
            "tries again and again"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(w.cluster.borrow().pods.len(), 2, "what is known stays");
    let error = w.api.get_pod("test", "stays").await.unwrap_err();
    assert!(
        error.retryable && error.to_string().contains("can be reached"),
        "{error}"
    );
    tokio::task::block_in_place(|| bed.plane.start_api_server()).unwrap();
    bed.delete_pod("test", "goes").await.unwrap();
    bed.pod("test", "comes", NODE, json!({})).await.unwrap();
    bed.patch_namespace("test", json!({"metadata": {"labels": {MODE: "none"}}}))
        .await
        .unwrap();
    w.until("caught up", |c| {
        find(c, "test", "comes").is_some()
            && find(c, "test", "goes").is_none()
            && c.namespaces["test"].labels[MODE] == "none"
    })
    .await
    .unwrap();
    assert!(
        !watchdog.is_finished(),
        "the picture was emptied for a moment"
    );
    watchdog.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_missed_for_good_come_with_a_new_list() {
    logs();
    let bed = Bed::start("compacted").await.unwrap();
    bed.namespace("test", mode("ambient")).await.unwrap();
    bed.pod("test", "goes", NODE, json!({})).await.unwrap();
    bed.pod(
        "test",
        "elsewhere",
        "there",
        json!({"metadata": {"labels": mode("ambient")}}),
    )
    .await
    .unwrap();
    let mut w = bed.watcher().await.unwrap();
    w.until("all", |c| c.listed && c.opted_in.get("test") == Some(&1))
        .await
        .unwrap();
    let lists = w.api.stats().lists.get();
    // Without history, to go on from where the watch was is refused (410). Something else has to happen meanwhile: else
    // the watch is where history begins.
    for name in ["a", "b", "c"] {
        bed.plane.kubectl(&["create", "configmap", name]).unwrap();
    }
    tokio::task::block_in_place(|| bed.plane.stop_api_server()).unwrap();
    bed.plane.forget_history().unwrap();
    tokio::task::block_in_place(|| bed.plane.start_api_server()).unwrap();
    bed.delete_pod("test", "goes").await.unwrap();
    bed.delete_pod("test", "elsewhere").await.unwrap();
    w.until("both gone", |c| c.pods.is_empty() && c.opted_in.is_empty())
        .await
        .unwrap();
    assert!(
        w.api.stats().lists.get() > lists,
        "not resumed but listed anew"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn burst_of_250_pods() {
    logs();
    let bed = Bed::start("burst").await.unwrap();
    bed.namespace("many", json!({})).await.unwrap();
    let mut w = bed.watcher().await.unwrap();
    w.until("listed", |c| c.listed).await.unwrap();
    bed.many_pods("many", NODE, 250).await.unwrap();
    let last = w
        .within("all seen", Duration::from_secs(30), |c| c.pods.len() == 250)
        .await
        .unwrap();
    println!("250 pods seen {last:?} after the last was made");
    // One label moves them all: it must arrive at once, with nothing read anew.
    let objects = w.api.stats().objects.get();
    let started = Instant::now();
    bed.patch_namespace("many", json!({"metadata": {"labels": mode("ambient")}}))
        .await
        .unwrap();
    w.until("flipped", |c| {
        c.namespaces["many"].labels.contains_key(MODE)
    })
    .await
    .unwrap();
    println!("label seen {:?} after it was asked for", started.elapsed());
    assert_eq!(w.api.stats().objects.get(), objects + 1);
    // A list in several pages shows the same.
    let mut fresh = bed.watcher().await.unwrap();
    fresh
        .until("listed in pages", |c| c.listed && c.pods.len() == 250)
        .await
        .unwrap();
    assert_eq!(fresh.cluster.borrow().pods, w.cluster.borrow().pods);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn namespace_deleted_before_its_pods() {
    logs();
    let bed = Bed::start("ns-first").await.unwrap();
    bed.namespace("doomed", mode("ambient")).await.unwrap();
    bed.pod("doomed", "last", NODE, json!({})).await.unwrap();
    bed.status(
        "doomed",
        "last",
        json!({"phase": "Running", "podIP": "11.1.1.12"}),
    )
    .await
    .unwrap();
    let mut w = bed.watcher().await.unwrap();
    w.until("in", |c| c.listed && find(c, "doomed", "last").is_some())
        .await
        .unwrap();
    // Without the namespace controller, a namespace whose finalizer is taken away is gone while its pods are left: the
    // order that the agent sees when events of the two watches overtake each other.
    bed.plane
        .kubectl(&["delete", "namespace", "doomed", "--wait=false"])
        .unwrap();
    let done = r#"{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"doomed"},"spec":{"finalizers":[]}}"#;
    let finalize = [
        "replace",
        "--raw",
        "/api/v1/namespaces/doomed/finalize",
        "-f",
        "-",
    ];
    bed.plane.admin().run_with(&finalize, done).unwrap();
    w.until("namespace gone", |c| !c.namespaces.contains_key("doomed"))
        .await
        .unwrap();
    let pod = w.find("doomed", "last").unwrap();
    let settings = culvert::plan::membership::Settings::default();
    let got = culvert::plan::membership::decide(&pod, None, &settings);
    // It stays as it is, in the mesh, until it is gone itself.
    use culvert::plan::membership::{Membership, Waiting};
    assert_eq!(got, Membership::Wait(Waiting::Namespace));
    bed.delete_pod("doomed", "last").await.unwrap();
    w.until("gone", |c| c.pods.is_empty()).await.unwrap();
}
