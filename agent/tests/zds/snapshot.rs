//! From the connection to the end of the snapshot: who is answered when, and what changes meanwhile.

use std::time::Duration;

use culvert::{
    model::PodUid,
    zds::{Event, PeerState},
};

use crate::peer::{Bench, SENT, netns, workload};

/// Long enough for an answer that is not to come, short enough to stay below the ack's deadline.
const QUIET: Duration = Duration::from_millis(200);

#[tokio::test]
async fn nobody_is_answered_before_the_pods_are_known() {
    let bench = Bench::new("held");
    let ztunnel = bench.ztunnel().await;
    assert_eq!(ztunnel.next_within(QUIET).await, None);
    assert_eq!(bench.server.status().peers[0].state, PeerState::Held);
    bench
        .server
        .expect(PodUid::from("a"), workload("a"))
        .unwrap();
    bench.server.open();
    ztunnel.obeys("keep a").await;
    ztunnel.obeys(SENT).await;
}

#[tokio::test]
async fn a_pod_with_a_namespace_is_added_and_one_without_is_kept() {
    let mut bench = Bench::new("snapshot");
    bench
        .server
        .expect(PodUid::from("b"), workload("b"))
        .unwrap();
    assert!(bench.adding("a").await.unwrap().is_err(), "not open yet");
    bench.server.open();
    let ztunnel = bench.ztunnel().await;
    ztunnel.obeys("add a").await;
    ztunnel.obeys("keep b").await;
    ztunnel.obeys(SENT).await;
    let (uid, pid) = bench
        .event(|event| match event {
            Event::Acked { uid, pid } => Some((uid.to_string(), *pid)),
            _ => None,
        })
        .await;
    assert_eq!((&*uid, pid), ("a", std::process::id()));
    // What was kept is owed its namespace, or its end.
    let adding = bench.adding("b");
    ztunnel.obeys("add b").await;
    adding.await.unwrap().unwrap();
}

#[tokio::test]
async fn what_was_kept_and_is_gone_gets_its_del() {
    let bench = Bench::new("kept-gone");
    bench
        .server
        .expect(PodUid::from("a"), workload("a"))
        .unwrap();
    bench.server.open();
    let ztunnel = bench.ztunnel().await;
    ztunnel.obeys("keep a").await;
    ztunnel.obeys(SENT).await;
    let removing = bench.removing("a");
    ztunnel.obeys("del a").await;
    assert_eq!(removing.await.unwrap().acked.len(), 1);
}

#[tokio::test]
async fn each_message_waits_for_the_ack_of_the_one_before() {
    let bench = Bench::new("outstanding");
    for uid in ["a", "b"] {
        assert!(bench.adding(uid).await.unwrap().is_err(), "not open yet");
    }
    bench.server.open();
    let ztunnel = bench.ztunnel().await;
    for what in ["add a", "add b", SENT] {
        assert_eq!(ztunnel.next().await.0, what);
        assert_eq!(ztunnel.next_within(QUIET).await, None, "before its ack");
        ztunnel.ack("").await;
    }
}

#[tokio::test]
async fn what_changes_while_the_snapshot_is_sent_follows_it() {
    let mut bench = Bench::new("meanwhile");
    for uid in ["a", "b"] {
        assert!(bench.adding(uid).await.unwrap().is_err(), "not open yet");
    }
    bench.server.open();
    let ztunnel = bench.ztunnel().await;
    assert_eq!(ztunnel.next().await.0, "add a");
    let removing = bench.removing("a");
    // Not named yet, so there is nothing to take back.
    assert_eq!(bench.removing("b").await.unwrap().acked, [0; 0]);
    let adding = bench.adding("c");
    while bench.server.status().pods != 1 {
        tokio::task::yield_now().await;
    }
    ztunnel.ack("").await;
    ztunnel.obeys(SENT).await;
    bench
        .event(|event| matches!(event, Event::Synced { .. }).then_some(()))
        .await;
    let mut later = [ztunnel.next().await.0, String::new()];
    ztunnel.ack("").await;
    later[1] = ztunnel.next().await.0;
    ztunnel.ack("").await;
    later.sort();
    assert_eq!(later, ["add c", "del a"]);
    assert_eq!(removing.await.unwrap().acked.len(), 1);
    adding.await.unwrap().unwrap();
    assert_eq!(ztunnel.next_within(QUIET).await, None);
}

#[tokio::test]
async fn a_nack_in_the_snapshot_is_reported_and_said_again_after_it() {
    let mut bench = Bench::new("nacked-snapshot");
    for uid in ["a", "b"] {
        assert!(bench.adding(uid).await.unwrap().is_err(), "not open yet");
    }
    bench.server.open();
    let ztunnel = bench.ztunnel().await;
    assert_eq!(ztunnel.next().await.0, "add a");
    ztunnel.ack("address already in use").await;
    ztunnel.obeys("add b").await;
    ztunnel.obeys(SENT).await;
    let (uid, error) = bench
        .event(|event| match event {
            Event::Nacked { uid, error, .. } => Some((uid.to_string(), error.clone())),
            _ => None,
        })
        .await;
    assert_eq!((&*uid, &*error), ("a", "address already in use"));
    // And again, until it works.
    assert_eq!(ztunnel.next().await.0, "add a");
    ztunnel.ack("address already in use").await;
    assert_eq!(ztunnel.next().await.0, "add a");
    let status = bench.server.status();
    assert_eq!((status.nacks, status.peers[0].served), (2, 1));
    ztunnel.ack("").await;
    while bench.server.status().peers[0].served != 2 {
        tokio::task::yield_now().await;
    }
    assert_eq!(bench.server.status().peers[0].nacked, 0);
}

#[tokio::test]
async fn a_pod_refused_in_the_snapshot_is_let_go_when_it_ends() {
    let bench = Bench::new("nacked-gone");
    assert!(bench.adding("a").await.unwrap().is_err(), "not open yet");
    bench.server.open();
    let ztunnel = bench.ztunnel().await;
    assert_eq!(ztunnel.next().await.0, "add a");
    ztunnel.ack("no").await;
    ztunnel.obeys(SENT).await;
    let removing = bench.removing("a");
    // Its retry may have been quicker.
    let mut said = ztunnel.next().await.0;
    if said == "add a" {
        ztunnel.ack("no").await;
        said = ztunnel.next().await.0;
    }
    assert_eq!(said, "del a");
    ztunnel.ack("").await;
    assert_eq!(removing.await.unwrap().acked.len(), 1);
    assert_eq!(
        ztunnel.next_within(QUIET * 3).await,
        None,
        "no retry is left"
    );
}

#[tokio::test]
async fn the_same_uid_in_another_namespace_is_added_again() {
    let mut bench = Bench::new("another");
    bench.server.open();
    let ztunnel = bench.synced().await;
    for netns in [netns(), netns()] {
        let adding = bench.adding_in("a", netns.clone());
        let (said, inode) = ztunnel.next().await;
        assert_eq!(
            (&*said, inode),
            ("add a", Some(crate::peer::inode(&*netns)))
        );
        ztunnel.ack("").await;
        adding.await.unwrap().unwrap();
    }
}
