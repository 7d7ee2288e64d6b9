//! What is undone behind the agent's back, and what an agent finds that has just begun.

use super::*;
use crate::kernel::verify::Repair;

#[tokio::test(start_paused = true)]
async fn what_was_undone_behind_its_back_is_repaired_within_a_period() {
    let stage = enrolled().await;
    stage.fake().captured.lock().unwrap().clear();
    assert_eq!(
        stage.after(Duration::from_secs(5)).await,
        ["attach shop/a", "repaired shop/a", "tell shop/a"]
    );
}

#[tokio::test(start_paused = true)]
async fn an_annotation_that_somebody_removed_is_written_again() {
    let stage = enrolled().await;
    let write = |value: Option<&str>| {
        let value = value.map(str::to_owned);
        stage.edit("a", |pod| match value {
            Some(value) => drop(pod.annotations.insert(keys::REDIRECTION.into(), value)),
            None => drop(pod.annotations.remove(keys::REDIRECTION)),
        });
    };
    // Our own write comes back by the watch: nothing to do.
    write(Some("enabled"));
    assert!(stage.soon().await.is_empty());
    write(None);
    assert_eq!(
        stage.soon().await,
        ["reannotated shop/a", "annotate shop/a enabled"]
    );
}

#[tokio::test(start_paused = true)]
async fn what_was_put_back_in_a_namespace_is_said_about_the_pod_in_it() {
    let stage = enrolled().await;
    let rule = Repair {
        kind: Kind::Rule,
        what: "a rule".into(),
    };
    assert!(stage.reconciler.put_back(1, vec![rule.clone()]).await);
    assert_eq!(stage.soon().await, ["put back shop/a"]);
    assert!(!stage.reconciler.put_back(2, vec![rule]).await);
    assert!(stage.soon().await.is_empty());
}

fn remembered(uid: &str, cookie: u64) -> Remembered {
    Remembered {
        cookie,
        uid: uid.into(),
        static_uid: None,
        namespace: "shop".into(),
        name: uid.into(),
        service_account: "default".into(),
        sandbox: Some(format!("s-{uid}")),
        served: true,
        policy: None,
    }
}

#[tokio::test(start_paused = true)]
async fn pods_of_an_earlier_agent_are_taken_up_and_not_called_repaired() {
    let world = Fake::default();
    world.captured.lock().unwrap().insert(1, Policy::default());
    let stage = Stage::with(world);
    stage.place("a", 1);
    stage.edit("a", |pod| {
        pod.annotations
            .insert(keys::REDIRECTION.into(), "enabled".into());
    });
    stage.namespace("shop", Some("ambient"));
    assert_eq!(
        stage.after(Duration::from_secs(6)).await,
        ["attach shop/a", "tell shop/a"]
    );
}

#[tokio::test(start_paused = true)]
async fn while_the_api_is_away_what_is_undone_is_repaired_as_it_was() {
    let world = Fake::default();
    world.places.lock().unwrap().insert("a".into(), 1);
    world.captured.lock().unwrap().insert(1, Policy::default());
    let policy = Policy {
        exclude_outbound_ports: vec![5432],
        ..Policy::default()
    };
    let pod = Remembered {
        policy: Some(policy.clone()),
        ..remembered("a", 1)
    };
    let stage = Stage::from(world, false, vec![pod]);
    stage.reconciler.restore().await;
    // Attached anew, so that it is whole and followed, whatever happened to it between two agents.
    assert_eq!(stage.soon().await, ["attach shop/a", "tell shop/a"]);
    let captured = || stage.fake().captured.lock().unwrap().get(&1).cloned();
    assert_eq!(captured(), Some(policy.clone()));
    stage.fake().captured.lock().unwrap().clear();
    assert_eq!(
        stage.after(Duration::from_secs(6)).await,
        ["attach shop/a", "repaired shop/a", "tell shop/a"]
    );
    assert_eq!(captured(), Some(policy));
}

#[tokio::test(start_paused = true)]
async fn a_served_pod_waits_in_silence_for_the_next_ztunnel() {
    let stage = enrolled().await;
    let state = || stage.reconciler.report()[0].state;
    assert_eq!(state(), PodState::Enrolled);
    stage.reconciler.ztunnels_changed(false);
    assert!(stage.after(Duration::from_secs(600)).await.is_empty());
    assert_eq!(state(), PodState::Pending);
    stage.reconciler.ztunnels_changed(true);
    assert_eq!(stage.soon().await, ["tell shop/a"]);
    assert_eq!(state(), PodState::Enrolled);
    // With two of them it is asked whether the one that is left serves the pod.
    stage.reconciler.ztunnels_changed(true);
    assert_eq!(stage.soon().await, ["tell shop/a"]);
    assert_eq!(*stage.fake().announced.lock().unwrap(), 1);
}

#[tokio::test(start_paused = true)]
async fn while_the_api_is_away_the_pins_say_who_is_enrolled() {
    let world = Fake::default();
    let remembered = [("a", 1), ("gone", 2), ("released", 3)].map(|(uid, c)| remembered(uid, c));
    for (uid, place) in [("a", 1), ("released", 3)] {
        world.places.lock().unwrap().insert(uid.into(), place);
    }
    world.captured.lock().unwrap().insert(1, Policy::default());
    let stage = Stage::from(world, false, remembered.into());
    assert!(stage.soon().await.is_empty());
    stage.reconciler.restore().await;
    assert_eq!(stage.soon().await, ["tell shop/a"]);
    assert!(stage.after(Duration::from_secs(600)).await.is_empty());
    // The API server is back, and has forgotten the pod.
    stage.cluster.send_modify(|c| c.listed = true);
    assert_eq!(
        stage.after(Duration::from_secs(61)).await,
        ["forget shop/a", "untell shop/a"]
    );
}

#[tokio::test(start_paused = true)]
async fn what_is_captured_stays_while_nothing_can_be_said_about_the_pod() {
    let world = Fake::default();
    world.captured.lock().unwrap().insert(7, Policy::default());
    let stage = Stage::with(world);
    stage.place("a", 7);
    // Its namespace is not known.
    stage.edit("a", |_| {});
    assert!(stage.after(Duration::from_secs(60)).await.is_empty());
    assert!(stage.fake().captured.lock().unwrap().contains_key(&7));
    stage.namespace("shop", None);
    assert_eq!(
        stage.soon().await,
        ["release shop/a", "untell shop/a", "detach shop/a"]
    );
}
