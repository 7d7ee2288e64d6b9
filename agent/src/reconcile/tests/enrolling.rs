//! Enrolling a running pod: order, retries, and what ztunnel's answers lead to.

use super::*;

#[tokio::test(start_paused = true)]
async fn a_running_pod_is_enrolled_when_its_namespace_is_labelled() {
    let stage = Stage::new();
    stage.place("a", 1);
    stage.edit("a", |_| {});
    stage.namespace("shop", None);
    assert!(stage.soon().await.is_empty());
    stage.namespace("shop", Some("ambient"));
    assert_eq!(stage.soon().await, ENROLLED);
    assert!(stage.after(Duration::from_secs(60)).await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_failure_that_may_pass_is_tried_again() {
    let stage = Stage::new();
    stage.place("a", 1);
    stage.fail("attach", 2, true);
    stage.edit("a", |_| {});
    stage.namespace("shop", Some("ambient"));
    assert_eq!(stage.soon().await, ["attach shop/a failed"]);
    assert_eq!(stage.reconciler.report()[0].state, PodState::Failing);
    assert_eq!(
        stage.after(Duration::from_secs(2)).await,
        [
            "attach shop/a failed",
            "attach shop/a",
            "tell shop/a",
            "annotate shop/a enabled"
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn one_that_will_not_is_left_until_something_changes() {
    let stage = Stage::new();
    stage.place("a", 1);
    stage.fail("attach", 1, false);
    stage.edit("a", |_| {});
    stage.namespace("shop", Some("ambient"));
    assert_eq!(stage.soon().await, ["attach shop/a failed"]);
    assert!(stage.after(Duration::from_secs(600)).await.is_empty());
    stage.edit("a", |pod| {
        pod.addresses.insert("fd00::1".parse().unwrap());
    });
    assert_eq!(stage.soon().await, ENROLLED);
}

#[tokio::test(start_paused = true)]
async fn without_ztunnel_it_is_pending_then_enabled() {
    let stage = Stage::new();
    stage.place("a", 1);
    stage.fail("tell", 2, true);
    stage.edit("a", |_| {});
    stage.namespace("shop", Some("ambient"));
    assert_eq!(
        stage.soon().await,
        [
            "attach shop/a",
            "tell shop/a failed",
            "annotate shop/a pending"
        ]
    );
    assert_eq!(
        stage.after(Duration::from_secs(2)).await,
        [
            "tell shop/a failed",
            "tell shop/a",
            "annotate shop/a enabled"
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn an_ack_in_a_snapshot_counts() {
    let stage = Stage::new();
    stage.place("a", 1);
    stage.fail("tell", 100, true);
    stage.edit("a", |_| {});
    stage.namespace("shop", Some("ambient"));
    stage.after(Duration::from_secs(1)).await;
    stage.fail("tell", 0, true);
    stage.reconciler.acked(&"a".into());
    assert_eq!(
        stage.soon().await,
        ["tell shop/a", "annotate shop/a enabled"]
    );
    assert!(stage.after(Duration::from_secs(60)).await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_annotation_changes_a_living_pod() {
    let stage = enrolled().await;
    stage.edit("a", |pod| {
        drop(
            pod.annotations
                .insert(keys::BYPASS_INBOUND.into(), "true".into()),
        )
    });
    assert_eq!(stage.soon().await, ["attach shop/a"]);
    assert!(stage.fake().captured.lock().unwrap()[&1].bypass_inbound);
}

#[tokio::test(start_paused = true)]
async fn a_sandboxed_pod_is_refused_once() {
    let stage = Stage::new();
    stage.place("a", 1);
    stage.edit("a", |pod| pod.runtime_class = Some("gvisor".into()));
    stage.namespace("shop", Some("ambient"));
    assert_eq!(
        stage.after(Duration::from_secs(30)).await,
        ["refused shop/a"]
    );
    assert_eq!(stage.conditions(), ["shop/a Refused"]);
    stage.namespace("shop", None);
    stage.soon().await;
    assert_eq!(stage.conditions(), ["shop/a -"]);
    assert!(stage.reconciler.report().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_failure_that_lasts_becomes_a_condition_until_it_is_over() {
    let stage = Stage::new();
    stage.place("a", 1);
    stage.edit("a", |_| {});
    stage.fail("tell", 8, true);
    stage.fail("condition", 1, true);
    stage.namespace("shop", Some("ambient"));
    stage.after(Duration::from_secs(5)).await;
    assert!(stage.conditions().is_empty(), "it may pass by itself");
    stage.after(Duration::from_secs(20)).await;
    // Written again where the API server refused it, and not once for each try.
    assert_eq!(stage.conditions(), ["shop/a Failing"]);
    let log = stage.after(Duration::from_secs(180)).await;
    assert!(
        log.contains(&"annotate shop/a enabled".to_owned()),
        "{log:?}"
    );
    assert_eq!(stage.conditions(), ["shop/a -"]);
}

#[tokio::test(start_paused = true)]
async fn one_pod_that_fails_does_not_hold_up_the_rest() {
    let stage = Stage::new();
    stage.fail("attach", 1, true);
    for n in 0..50 {
        let uid = format!("p{n}");
        stage.place(&uid, n);
        stage.edit(&uid, |_| {});
    }
    stage.namespace("shop", Some("ambient"));
    let log = stage.soon().await;
    assert_eq!(log.iter().filter(|l| l.ends_with("enabled")).count(), 49);
}
