//! Letting a pod go, living or dead.

use super::*;

#[tokio::test(start_paused = true)]
async fn it_leaves_when_the_label_goes() {
    let stage = enrolled().await;
    stage.namespace("shop", None);
    assert_eq!(
        stage.soon().await,
        [
            "release shop/a",
            "annotate shop/a -",
            "untell shop/a",
            "detach shop/a"
        ]
    );
    assert!(stage.reconciler.report().is_empty());
}

#[tokio::test(start_paused = true)]
async fn letting_go_is_tried_again_too() {
    let stage = enrolled().await;
    stage.fail("annotate", 1, true);
    stage.namespace("shop", None);
    assert_eq!(
        stage.after(Duration::from_secs(2)).await,
        [
            "release shop/a",
            "annotate shop/a - failed",
            "untell shop/a",
            "detach shop/a",
            "annotate shop/a -"
        ]
    );
    assert!(stage.reconciler.report().is_empty());
}

#[tokio::test(start_paused = true)]
async fn old_connections_keep_ztunnel_in_the_pod() {
    let stage = enrolled().await;
    *stage.fake().connections.lock().unwrap() = 3;
    stage.namespace("shop", None);
    let log = stage.after(Duration::from_secs(12)).await;
    assert_eq!(log[..2], ["release shop/a", "annotate shop/a -"]);
    assert!(log.len() > 2, "{log:?}");
    assert!(log[2..].iter().all(|l| l == "release shop/a"), "{log:?}");
    assert_eq!(stage.reconciler.report()[0].state, PodState::Draining);
    *stage.fake().connections.lock().unwrap() = 0;
    assert_eq!(
        stage.after(Duration::from_secs(6)).await,
        ["release shop/a", "untell shop/a", "detach shop/a"]
    );
}

#[tokio::test(start_paused = true)]
async fn one_that_comes_back_while_it_drains_is_whole_again() {
    let stage = enrolled().await;
    *stage.fake().connections.lock().unwrap() = 3;
    stage.namespace("shop", None);
    stage.after(Duration::from_secs(12)).await;
    stage.namespace("shop", Some("ambient"));
    assert_eq!(
        stage.soon().await,
        ["attach shop/a", "annotate shop/a enabled"]
    );
    assert_eq!(stage.reconciler.report()[0].state, PodState::Enrolled);
}

#[tokio::test(start_paused = true)]
async fn a_force_deleted_pod_is_captured_until_its_processes_have_ended() {
    let stage = enrolled().await;
    let world = stage.fake();
    let place = world.places.lock().unwrap()[&PodUid::from("a")];
    world.inhabited.lock().unwrap().insert(place);
    stage.cluster.send_modify(|c| c.pods.clear());
    assert!(stage.after(Duration::from_secs(60)).await.is_empty());
    assert!(world.captured.lock().unwrap().contains_key(&place));
    world.inhabited.lock().unwrap().clear();
    assert_eq!(
        stage.after(Duration::from_secs(2)).await,
        ["forget shop/a", "untell shop/a"]
    );
}

#[tokio::test(start_paused = true)]
async fn a_deleted_pod_is_forgotten_without_a_word_to_the_api() {
    let stage = enrolled().await;
    stage.edit("a", |pod| pod.deleting = true);
    assert!(stage.soon().await.is_empty(), "it drains through the mesh");
    stage.cluster.send_modify(|c| c.pods.clear());
    assert_eq!(stage.soon().await, ["forget shop/a", "untell shop/a"]);
    assert!(stage.reconciler.report().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_job_that_ended_is_let_go() {
    let stage = enrolled().await;
    stage.edit("a", |pod| pod.phase = Phase::Succeeded);
    assert_eq!(
        stage.soon().await,
        ["forget shop/a", "untell shop/a", "annotate shop/a -"]
    );
    assert!(stage.reconciler.report().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_ended_because_it_is_deleted_is_forgotten_without_a_word_to_the_api() {
    let stage = enrolled().await;
    stage.edit("a", |pod| {
        pod.deleting = true;
        pod.phase = Phase::Succeeded;
    });
    assert_eq!(stage.soon().await, ["forget shop/a", "untell shop/a"]);
    assert!(stage.after(Duration::from_secs(60)).await.is_empty());
    stage.cluster.send_modify(|c| c.pods.clear());
    assert!(stage.soon().await.is_empty());
    assert!(stage.reconciler.report().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_job_that_ended_while_no_agent_ran_loses_its_annotation() {
    let stage = Stage::new();
    stage.fail("annotate", 1, true);
    stage.namespace("shop", Some("ambient"));
    stage.edit("a", |pod| {
        pod.phase = Phase::Failed;
        drop(
            pod.annotations
                .insert(keys::REDIRECTION.into(), "enabled".into()),
        );
    });
    assert_eq!(
        stage.after(Duration::from_secs(2)).await,
        ["annotate shop/a - failed", "annotate shop/a -"]
    );
}

#[tokio::test(start_paused = true)]
async fn a_job_whose_sandbox_went_first_loses_its_annotation() {
    let stage = enrolled().await;
    let added = stage
        .reconciler
        .add(&pod("a"), Some(&mesh()), 1, "s1", soon())
        .await;
    assert!(matches!(added, Ok(Answer::Enrolled { .. })), "{added:?}");
    stage.soon().await;
    assert!(stage.reconciler.del("s1"));
    assert_eq!(stage.soon().await, ["forget shop/a", "untell shop/a"]);
    stage.edit("a", |pod| pod.phase = Phase::Succeeded);
    assert_eq!(stage.soon().await, ["annotate shop/a -"]);
}

#[tokio::test(start_paused = true)]
async fn a_namespace_deleted_before_its_pods_changes_nothing_for_them() {
    let stage = enrolled().await;
    stage.cluster.send_modify(|c| c.namespaces.clear());
    assert!(stage.soon().await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_left_while_no_agent_ran_is_let_go() {
    let world = Fake::default();
    world.captured.lock().unwrap().insert(7, Policy::default());
    let stage = Stage::with(world);
    stage.place("a", 7);
    stage.namespace("shop", None);
    stage.edit("a", |pod| {
        drop(
            pod.annotations
                .insert(keys::REDIRECTION.into(), "enabled".into()),
        )
    });
    let log = stage.after(Duration::from_secs(6)).await;
    assert!(log.contains(&"detach shop/a".to_owned()), "{log:?}");
    assert!(log.contains(&"annotate shop/a -".to_owned()), "{log:?}");
    assert!(stage.fake().captured.lock().unwrap().is_empty());
}
