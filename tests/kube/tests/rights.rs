//! The rights in `culvert::watch::rbac` are enough, and each of them is needed: without it something fails, and the error
//! says what to grant.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "test code: a step that fails is a test that fails"
)]

use std::time::{Duration, Instant};

use culvert::{
    model::{PodRef, Redirection},
    watch::{About, Error, Kind, Notice, Standing, rbac::RULES},
};
use culvert_kube_tests::{Bed, HOME, LONG, NODE, Watcher, find, logs, node::Node, rbac};
use serde_json::json;

fn notice(pod: &PodRef) -> Notice {
    Notice {
        about: About::Pod(pod.clone()),
        kind: Kind::Normal,
        reason: "Tried",
        action: "Try",
        note: "x".into(),
    }
}

/// Whether what needs that right fails for want of it, and nothing else.
async fn fails(bed: &Bed, pod: &PodRef, resource: &str, verb: &str) -> bool {
    let forbidden = |e: Error| {
        assert!(e.to_string().contains("ClusterRole lists"), "{e}");
        e.code == 403
    };
    let mut w = bed.watcher().await.unwrap();
    let api = &w.api;
    match (resource, verb) {
        ("pods", "get") => api
            .get_pod(&pod.namespace, &pod.name)
            .await
            .is_err_and(forbidden),
        ("pods" | "namespaces", "list") => interrupted(&w).await && !w.cluster.borrow().listed,
        ("pods" | "namespaces", "watch") => {
            interrupted(&w).await && w.until("listed all the same", |c| c.listed).await.is_ok()
        }
        ("pods/status", "patch") => api
            .set_redirection(pod, Some(Redirection::Pending))
            .await
            .is_err_and(forbidden),
        ("events", "create") => {
            api.event(notice(pod));
            event_failed(&w).await
        }
        ("events", "patch") => {
            api.event(notice(pod));
            tokio::time::sleep(Duration::from_millis(10_500)).await;
            api.event(notice(pod));
            event_failed(&w).await
        }
        ("nodes", "get") => {
            let labels = api.node_labels().await.is_err_and(forbidden);
            let standing = api.standing("culvert-system", "culvert").await;
            labels && matches!(standing, Standing::Unknown(why) if why.contains("nodes"))
        }
        ("daemonsets", "get") => {
            let standing = api.standing("culvert-system", "culvert").await;
            matches!(standing, Standing::Unknown(why) if why.contains("daemonsets"))
        }
        ("networkpolicies" | "configmaps", "list" | "watch") => interrupted(&w).await,
        ("configmaps", "get") => api.cilium_config().await.is_err_and(forbidden),
        other => panic!("{other:?} has no test here: add what needs it"),
    }
}

async fn interrupted(w: &Watcher) -> bool {
    settled(|| w.api.stats().interruptions.get() > 0).await
}

async fn event_failed(w: &Watcher) -> bool {
    settled(|| w.api.stats().events_failed.get() > 0).await
}

async fn settled(mut holds: impl FnMut() -> bool) -> bool {
    let started = Instant::now();
    while !holds() && started.elapsed() < Duration::from_secs(2) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    holds()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn listed_rights_are_enough_and_each_is_needed() {
    logs();
    let bed = Bed::start("rights").await.unwrap();
    bed.namespace("test", json!({})).await.unwrap();
    bed.pod("test", "web", NODE, json!({})).await.unwrap();
    bed.plane
        .apply(
            "apiVersion: apps/v1\nkind: DaemonSet\nmetadata: {name: culvert, namespace: culvert-system}\nspec:\n  \
             selector: {matchLabels: {a: b}}\n  template:\n    metadata: {labels: {a: b}}\n    spec: {containers: \
             [{name: a, image: 'a:1'}]}\n",
        )
        .unwrap();
    let mut w = bed.watcher().await.unwrap();
    w.until("all", |c| {
        c.listed && c.opted_in_listed && find(c, "test", "web").is_some()
    })
    .await
    .unwrap();
    let pod = w.reference("test", "web").unwrap();
    drop(w);
    for rule in &RULES {
        for verb in rule.verbs {
            assert!(
                !fails(&bed, &pod, rule.resource, verb).await,
                "{rule}: works with all rights"
            );
        }
    }
    for rule in &RULES {
        for verb in rule.verbs {
            let without = rbac::manifests(|r, v| r != rule || v != *verb).unwrap();
            bed.plane.apply(&without).unwrap();
            // The authoriser learns of it a moment later.
            let started = Instant::now();
            while !fails(&bed, &pod, rule.resource, verb).await {
                assert!(
                    started.elapsed() < LONG,
                    "{rule}: nothing fails without {verb}"
                );
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_right_that_an_agent_lacks_is_named_by_it() {
    logs();
    let bed = Bed::start("rights-named").await.unwrap();
    let mut node = Node::new("rights-named", &bed).unwrap();
    let own = ["--daemonset-namespace", HOME.0];
    let refused = |node: &Node| -> anyhow::Result<String> {
        let text = node.page(8000, "/readyz")?;
        let line = text.lines().find(|line| line.contains("  rights  "));
        Ok(line.unwrap_or_default().to_owned())
    };
    for rule in &RULES {
        for verb in rule.verbs {
            let without = rbac::manifests(|r, v| r != rule || v != *verb).unwrap();
            bed.plane.apply(&without).unwrap();
            node.start_agent(&own).unwrap();
            let named = format!("{verb} {}", rule.resource);
            node.until(&format!("{named}: named"), || {
                let line = refused(&node)?;
                let others = RULES.iter().filter(|other| other.resource != rule.resource);
                Ok(line.contains(&named)
                    && line.contains(rule.why)
                    && line.contains("the chart's roles list what is needed")
                    && others.filter(|other| line.contains(other.why)).count() == 0)
            })
            .unwrap();
            assert!(node.log().contains(&named), "{}", node.log());
            node.stop_agent().unwrap();
        }
    }
    // Granted to one that runs.
    let without = rbac::manifests(|r, _| r.resource != "pods/status");
    bed.plane.apply(&without.unwrap()).unwrap();
    node.start_agent(&own).unwrap();
    node.until("one is missed", || {
        Ok(refused(&node)?.contains("pods/status"))
    })
    .unwrap();
    bed.plane
        .apply(&rbac::manifests(|_, _| true).unwrap())
        .unwrap();
    node.until("nothing is missed", || {
        let line = refused(&node)?;
        Ok(line.starts_with("ok") && !line.contains("refuses"))
    })
    .unwrap();
    node.stop_agent().unwrap();
}
