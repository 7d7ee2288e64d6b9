//! What the plugin asks for.

use super::*;

#[tokio::test(start_paused = true)]
async fn the_plugin_waits_for_ztunnel_but_not_for_the_api() {
    let stage = Stage::new();
    stage.fail("tell", 3, true);
    stage.fail("annotate", 10_000, true);
    let mut new = pod("a");
    new.addresses.clear();
    let answer = stage
        .reconciler
        .add(&new, Some(&mesh()), 1, "s1", soon())
        .await;
    assert!(matches!(answer, Ok(Answer::Enrolled { .. })), "{answer:?}");
    let log: Vec<_> = stage.fake().log.lock().unwrap().drain(..).collect();
    assert_eq!(log[0], "attach shop/a");
    assert_eq!(
        log.iter().filter(|l| l.starts_with("tell")).count(),
        4,
        "{log:?}"
    );
    stage.fail("annotate", 0, true);
    assert_eq!(
        stage.after(Duration::from_secs(60)).await,
        ["annotate shop/a enabled"]
    );
}

#[tokio::test(start_paused = true)]
async fn a_pod_outside_the_mesh_starts_at_once() {
    let stage = Stage::new();
    let answer = stage
        .reconciler
        .add(&pod("a"), Some(&Namespace::default()), 1, "s1", soon())
        .await;
    assert!(matches!(answer, Ok(Answer::Outside(_))), "{answer:?}");
    assert!(stage.soon().await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_mesh_pod_that_cannot_be_served_does_not_start() {
    let stage = Stage::new();
    stage.fail("tell", 10_000, true);
    let answer = stage
        .reconciler
        .add(&pod("a"), Some(&mesh()), 1, "s1", soon())
        .await;
    assert!(answer.is_err(), "{answer:?}");
    // The runtime takes the sandbox down and nothing is left.
    assert!(stage.reconciler.del("s1"));
    stage.soon().await;
    assert!(stage.fake().captured.lock().unwrap().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_new_sandbox_under_the_same_uid_outlives_the_old_ones_del() {
    let stage = enrolled().await;
    stage.place("a", 2);
    let answer = stage
        .reconciler
        .add(&pod("a"), Some(&mesh()), 2, "s2", soon())
        .await;
    assert!(matches!(answer, Ok(Answer::Enrolled { .. })), "{answer:?}");
    assert_eq!(
        stage.soon().await,
        ["forget shop/a", "attach shop/a", "tell shop/a"]
    );
    assert!(!stage.reconciler.del("s1"));
    assert!(stage.soon().await.is_empty());
    assert!(stage.reconciler.del("s2"));
    assert_eq!(stage.soon().await, ["forget shop/a", "untell shop/a"]);
    // The pod is still in the API, labelled, and must not come back by itself: there is no other sandbox.
    assert!(stage.after(Duration::from_secs(120)).await.is_empty());
    let answer = stage
        .reconciler
        .add(&pod("a"), Some(&mesh()), 3, "s3", soon())
        .await;
    assert!(matches!(answer, Ok(Answer::Enrolled { .. })), "{answer:?}");
}

#[tokio::test(start_paused = true)]
async fn a_sandbox_that_nobody_brought_to_the_plugin_is_found() {
    let stage = enrolled().await;
    let add = stage
        .reconciler
        .add(&pod("a"), Some(&mesh()), 1, "s1", soon())
        .await;
    assert!(matches!(add, Ok(Answer::Enrolled { .. })), "{add:?}");
    assert!(stage.reconciler.del("s1"));
    assert_eq!(stage.soon().await, ["forget shop/a", "untell shop/a"]);
    // Its last processes are still there, in the namespace that was taken down.
    assert!(stage.after(Duration::from_secs(60)).await.is_empty());
    stage.place("a", 2);
    assert_eq!(
        stage.after(Duration::from_secs(11)).await,
        ["attach shop/a", "tell shop/a"]
    );
    // One that is being deleted, or has ended, gets no other.
    let report = stage.reconciler.report();
    assert_eq!(report[0].state, PodState::Enrolled);
    stage.edit("a", |pod| pod.deleting = true);
    let add = stage
        .reconciler
        .add(&pod("a"), Some(&mesh()), 2, "s2", soon())
        .await;
    assert!(matches!(add, Ok(Answer::Enrolled { .. })), "{add:?}");
    assert!(stage.reconciler.del("s2"));
    stage.place("a", 3);
    assert_eq!(
        stage.after(Duration::from_secs(60)).await,
        ["forget shop/a", "untell shop/a"]
    );
}

#[tokio::test(start_paused = true)]
async fn an_add_right_after_a_del_is_the_last_word() {
    let stage = enrolled().await;
    let (a, mesh) = (pod("a"), mesh());
    let add = |sandbox| stage.reconciler.add(&a, Some(&mesh), 1, sandbox, soon());
    assert!(matches!(add("s1").await, Ok(Answer::Enrolled { .. })));
    assert!(stage.reconciler.del("s1"));
    // Nobody has had a turn in between: the DEL is not acted upon yet.
    assert!(matches!(add("s2").await, Ok(Answer::Enrolled { .. })));
    assert!(stage.after(Duration::from_secs(120)).await.is_empty());
    assert!(!stage.reconciler.del("s1"));
    assert!(stage.reconciler.del("s2"));
    stage.soon().await;
    assert!(stage.fake().captured.lock().unwrap().is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_add_for_a_further_interface_does_nothing() {
    let stage = enrolled().await;
    let answer = stage
        .reconciler
        .add(&pod("a"), Some(&mesh()), 1, "s1", soon())
        .await;
    assert!(matches!(answer, Ok(Answer::Enrolled { .. })), "{answer:?}");
    assert!(stage.soon().await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_pod_the_watch_never_shows_is_let_go() {
    let stage = Stage::new();
    stage
        .reconciler
        .add(&pod("a"), Some(&mesh()), 1, "s1", soon())
        .await
        .unwrap();
    stage.soon().await;
    assert!(stage.after(Duration::from_secs(50)).await.is_empty());
    assert_eq!(
        stage.after(Duration::from_secs(30)).await,
        ["forget shop/a", "untell shop/a"]
    );
}

#[tokio::test(start_paused = true)]
async fn garbage_collection_lets_go_what_the_runtime_lost() {
    let stage = Stage::new();
    for (uid, place, sandbox) in [("a", 1, "s1"), ("b", 2, "s2")] {
        stage.edit(uid, |_| {});
        stage
            .reconciler
            .add(&pod(uid), Some(&mesh()), place, sandbox, soon())
            .await
            .unwrap();
    }
    stage.namespace("shop", Some("ambient"));
    stage.soon().await;
    assert_eq!(stage.reconciler.gc(|_| true, &["s2".to_owned()].into()), 1);
    assert_eq!(stage.soon().await, ["forget shop/a", "untell shop/a"]);
}

#[tokio::test(start_paused = true)]
async fn a_delete_for_an_unknown_pod_is_no_matter() {
    let stage = Stage::new();
    assert!(!stage.reconciler.del("nobody"));
}
