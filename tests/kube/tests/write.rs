//! What the agent writes: the annotation that istiod reads, events, and the question whether it is still wanted.

use std::time::{Duration, Instant};

use culvert::{
    model::{PodRef, PodUid, Redirection, keys},
    watch::{About, Kind, Notice, Standing, Written},
};
use culvert_cluster::IN_TIME;
use culvert_kube_tests::{Bed, NODE, eventually, find, logs};
use k8s_openapi::api::events::v1::Event;
use kube::api::ListParams;
use serde_json::json;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redirection_is_annotated_for_that_pod_alone() {
    logs();
    let bed = Bed::start("annotate").await.unwrap();
    bed.namespace("test", json!({})).await.unwrap();
    bed.pod(
        "test",
        "web",
        NODE,
        json!({"metadata": {"annotations": {"theirs": "kept"}}}),
    )
    .await
    .unwrap();
    let mut w = bed.watcher().await.unwrap();
    w.until("seen", |c| c.listed && find(c, "test", "web").is_some())
        .await
        .unwrap();
    let pod = w.reference("test", "web").unwrap();

    // `pending`, then `enabled`, then none; each comes back by the watch.
    for to in [Some(Redirection::Pending), Some(Redirection::Enabled), None] {
        assert_eq!(
            w.api.set_redirection(&pod, to).await.unwrap(),
            Written::Done
        );
        w.until("annotated", |c| {
            find(c, "test", "web").unwrap().redirection() == to.map(Redirection::as_str)
        })
        .await
        .unwrap();
    }
    // Taking away what is not there is no error, and nothing of others is touched.
    assert_eq!(
        w.api.set_redirection(&pod, None).await.unwrap(),
        Written::Done
    );
    let seen = bed.pods("test").get("web").await.unwrap();
    assert_eq!(seen.metadata.annotations.unwrap()["theirs"], "kept");

    // A successor of the same name is not written to.
    bed.delete_pod("test", "web").await.unwrap();
    bed.pod("test", "web", NODE, json!({})).await.unwrap();
    let late = w
        .api
        .set_redirection(&pod, Some(Redirection::Enabled))
        .await
        .unwrap();
    assert_eq!(late, Written::Gone);
    let successor = bed.pods("test").get("web").await.unwrap();
    assert!(
        successor
            .metadata
            .annotations
            .is_none_or(|a| !a.contains_key(keys::REDIRECTION))
    );

    // Nor is there anything to write to for one that is gone, with or without its namespace.
    bed.delete_pod("test", "web").await.unwrap();
    let nowhere = PodRef {
        uid: PodUid::from("x"),
        namespace: "nowhere".into(),
        name: "web".into(),
    };
    for gone in [&pod, &nowhere] {
        assert_eq!(
            w.api.set_redirection(gone, None).await.unwrap(),
            Written::Gone
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_annotations_at_once() {
    logs();
    let bed = Bed::start("annotate-many").await.unwrap();
    bed.namespace("many", json!({})).await.unwrap();
    bed.many_pods("many", NODE, 250).await.unwrap();
    let mut w = bed.watcher().await.unwrap();
    w.until("seen", |c| c.listed && c.pods.len() == 250)
        .await
        .unwrap();
    let pods: Vec<PodRef> = w
        .cluster
        .borrow()
        .pods
        .values()
        .map(|p| p.reference())
        .collect();
    let started = Instant::now();
    let writes = pods
        .iter()
        .map(|p| w.api.set_redirection(p, Some(Redirection::Enabled)));
    for written in futures::future::join_all(writes).await {
        assert_eq!(written.unwrap(), Written::Done);
    }
    println!("250 annotations written in {:?}", started.elapsed());
    w.until("all annotated", |c| {
        c.pods.values().all(|p| p.redirection() == Some("enabled"))
    })
    .await
    .unwrap();
}

fn notice(about: About, note: &str) -> Notice {
    Notice {
        about,
        kind: Kind::Warning,
        reason: "EnrolFailed",
        action: "Enrol",
        note: note.into(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_are_shown_where_people_look_and_do_not_flood() {
    logs();
    let bed = Bed::start("events").await.unwrap();
    bed.namespace("test", json!({})).await.unwrap();
    bed.pod("test", "web", NODE, json!({})).await.unwrap();
    let mut w = bed.watcher().await.unwrap();
    w.until("seen", |c| c.listed && find(c, "test", "web").is_some())
        .await
        .unwrap();
    let pod = w.reference("test", "web").unwrap();
    w.api.event(notice(
        About::Pod(pod.clone()),
        "no network namespace was found",
    ));
    w.api
        .event(notice(About::Node, "the CNI configuration was overwritten"));
    let kubectl = |args: &'static [&'static str]| {
        let said = bed.plane.kubectl(args);
        async move { said }
    };
    eventually("the pod's description shows it", || async {
        let text = kubectl(&["describe", "pod", "web", "-n", "test"]).await?;
        Ok(text.contains("no network namespace was found") && text.contains("EnrolFailed"))
    })
    .await
    .unwrap();
    eventually("the node's description shows it", || async {
        Ok(kubectl(&["describe", "node", NODE])
            .await?
            .contains("configuration was overwritten"))
    })
    .await
    .unwrap();

    // The same failure every 20 ms for 12 s: still one event, with a count that has been written once more.
    let started = Instant::now();
    let mut sent = 1;
    while started.elapsed() < Duration::from_secs(12) {
        w.api.event(notice(
            About::Pod(pod.clone()),
            &format!("attempt {sent} failed"),
        ));
        sent += 1;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let events = kube::Api::<Event>::namespaced(bed.admin.clone(), "test");
    let list = events.list(&ListParams::default()).await.unwrap().items;
    let [event] = list.as_slice() else {
        panic!("{list:#?}");
    };
    let series = event.series.as_ref().unwrap();
    assert!(
        series.count > 100 && series.count <= sent,
        "{} of {sent}",
        series.count
    );
    assert_eq!(
        event.reporting_controller.as_deref(),
        Some("culvert.dev/agent")
    );
    assert_eq!(
        event.regarding.as_ref().unwrap().uid.as_deref(),
        Some(pod.uid.as_str())
    );

    // A thousand pods failing at once are a burst, not a thousand requests; sending never blocked anybody.
    let started = Instant::now();
    for i in 0..1000 {
        let other = PodRef {
            uid: PodUid::from(format!("u-{i}").as_str()),
            namespace: "test".into(),
            name: format!("p-{i}"),
        };
        w.api.event(notice(About::Pod(other), "x"));
    }
    assert!(started.elapsed() < Duration::from_secs(1));
    eventually("the rest is dropped", || async {
        Ok(w.api.stats().events_suppressed.get() >= 900)
    })
    .await
    .unwrap();
    let count = events
        .list(&ListParams::default())
        .await
        .unwrap()
        .items
        .len();
    assert!((10..100).contains(&count), "{count}");
    assert_eq!(w.api.stats().events_failed.get(), 0);
}

fn daemonset(selector: &str) -> String {
    format!(
        "apiVersion: apps/v1\nkind: DaemonSet\nmetadata: {{name: culvert, namespace: culvert-system}}\nspec:\n  \
         selector: {{matchLabels: {{a: b}}}}\n  template:\n    metadata: {{labels: {{a: b}}}}\n    spec:\n      \
         nodeSelector: {{{selector}}}\n      containers: [{{name: a, image: 'a:1'}}]\n"
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn upgrade_or_removal() {
    logs();
    let bed = Bed::start("standing").await.unwrap();
    let w = bed.watcher().await.unwrap();
    let ask = || w.api.standing("culvert-system", "culvert");
    let removed =
        |s: &Standing, why: &str| matches!(s, Standing::Removed(said) if said.contains(why));
    assert!(removed(&ask().await, "DaemonSet is gone"));
    bed.plane.apply(&daemonset("mesh: 'yes'")).unwrap();
    assert!(removed(&ask().await, "no longer selects"));
    bed.plane
        .kubectl(&["label", "node", NODE, "mesh=yes"])
        .unwrap();
    assert_eq!(ask().await, Standing::Stays);
    assert_eq!(w.api.node_labels().await.unwrap()["mesh"], "yes");
    bed.plane
        .kubectl(&["label", "node", NODE, "mesh=no", "--overwrite"])
        .unwrap();
    assert!(removed(&ask().await, "no longer selects"));
    bed.plane
        .kubectl(&["label", "node", NODE, "mesh=yes", "--overwrite"])
        .unwrap();
    assert_eq!(ask().await, Standing::Stays);
    // Its pods go before its DaemonSet does; here nobody deletes what is in it.
    bed.plane
        .kubectl(&["delete", "namespace", "culvert-system", "--wait=false"])
        .unwrap();
    assert!(removed(&ask().await, "namespace is being deleted"));
    // Being deleted, held by a finalizer.
    let hold = r#"{"metadata":{"finalizers":["culvert.dev/test"]}}"#;
    let daemonset = ["daemonset", "culvert", "-n", "culvert-system"];
    let with = |verb: &'static str, more: &[&'static str]| {
        let args: Vec<&str> = [verb]
            .into_iter()
            .chain(daemonset)
            .chain(more.iter().copied())
            .collect();
        bed.plane.kubectl(&args).unwrap();
    };
    with("patch", &["--type=merge", "-p", hold]);
    with("delete", &["--wait=false", "--cascade=orphan"]);
    assert!(removed(&ask().await, "DaemonSet is being deleted"));
    // No answer is no removal.
    tokio::task::block_in_place(|| bed.plane.stop_api_server()).unwrap();
    assert!(matches!(ask().await, Standing::Unknown(_)));
    tokio::task::block_in_place(|| bed.plane.start_api_server()).unwrap();
    // Our own account gone: everything was removed at once.
    bed.plane
        .kubectl(&[
            "delete",
            "serviceaccount",
            "culvert",
            "-n",
            "culvert-system",
            IN_TIME,
        ])
        .unwrap();
    eventually("the token is refused", || async {
        Ok(removed(&ask().await, "account is gone"))
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cilium_configuration_is_read() {
    logs();
    let bed = Bed::start("cilium-config").await.unwrap();
    let w = bed.watcher().await.unwrap();
    assert_eq!(w.api.cilium_config().await.unwrap(), None);
    let args = [
        "create",
        "configmap",
        "cilium-config",
        "-n",
        "kube-system",
        "--from-literal=cni-exclusive=true",
    ];
    bed.plane.kubectl(&args).unwrap();
    assert_eq!(
        w.api.cilium_config().await.unwrap().unwrap()["cni-exclusive"],
        "true"
    );
}
