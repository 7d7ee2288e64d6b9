//! What changes after the snapshot: adds and removals, and what becomes of those who wait for them.

use std::{sync::Arc, time::Duration};

use culvert::{
    model::PodUid,
    zds::{AddError, Options, Workload},
};

use crate::peer::{Bench, LONG, SENT, brisk, inode, netns, workload};

#[tokio::test]
async fn an_add_waits_for_its_ack_and_carries_the_namespace() {
    let mut bench = Bench::new("add");
    bench.server.open();
    let ztunnel = bench.synced().await;
    let netns = netns();
    let adding = bench.adding_in("a", netns.clone());
    let (said, received) = ztunnel.next().await;
    assert_eq!((&*said, received), ("add a", Some(inode(&*netns))));
    assert!(!adding.is_finished());
    ztunnel.ack("").await;
    let acked = adding.await.unwrap().unwrap();
    assert_eq!(acked.pid, std::process::id());
    // Again, with another descriptor of the same namespace: known, and nothing is said.
    let again = Arc::new(netns.try_clone().unwrap());
    bench
        .server
        .add(PodUid::from("a"), workload("a"), again)
        .await
        .unwrap();
    let removing = bench.removing("a");
    ztunnel.obeys("del a").await;
    assert_eq!(removing.await.unwrap().acked, [std::process::id()]);
    assert_eq!(
        Arc::strong_count(&netns),
        1,
        "nothing holds the namespace of a pod that is gone"
    );
}

#[tokio::test]
async fn without_a_ztunnel_an_add_is_remembered_for_the_snapshot() {
    let bench = Bench::new("remembered");
    bench.server.open();
    let refused = bench.adding("a").await.unwrap().unwrap_err();
    assert_eq!(refused, AddError::NoZtunnel);
    let ztunnel = bench.ztunnel().await;
    ztunnel.obeys("add a").await;
    ztunnel.obeys(SENT).await;
}

#[tokio::test]
async fn a_nack_is_the_adds_error_and_a_call_tries_again_at_once() {
    let options = Options {
        retry: (LONG, LONG),
        ..brisk()
    };
    let mut bench = Bench::with("nack", options);
    bench.server.open();
    let ztunnel = bench.synced().await;
    let netns = netns();
    let adding = bench.adding_in("a", netns.clone());
    ztunnel.next().await;
    ztunnel.ack("too many open files").await;
    assert_eq!(
        adding.await.unwrap().unwrap_err(),
        AddError::Nacked("too many open files".into())
    );
    let adding = bench.adding_in("a", netns);
    ztunnel.obeys("add a").await;
    adding.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_dropped_add_leaves_the_order_of_acks_alone() {
    let mut bench = Bench::new("dropped");
    bench.server.open();
    let ztunnel = bench.synced().await;
    let dropped = bench.adding("a");
    assert_eq!(ztunnel.next().await.0, "add a");
    dropped.abort();
    assert!(dropped.await.unwrap_err().is_cancelled());
    let adding = bench.adding("b");
    // The ack of the dropped one must not pass for the next one's.
    ztunnel.ack("").await;
    assert_eq!(ztunnel.next().await.0, "add b");
    assert!(!adding.is_finished());
    ztunnel.ack("no").await;
    assert_eq!(
        adding.await.unwrap().unwrap_err(),
        AddError::Nacked("no".into())
    );
    assert_eq!(bench.server.status().peers[0].served, 1);
}

#[tokio::test]
async fn many_at_once_go_in_turn_and_all_arrive() {
    const PODS: usize = 250;
    let mut bench = Bench::new("many");
    bench.server.open();
    let ztunnel = bench.synced().await;
    let adding: Vec<_> = (0..PODS)
        .map(|pod| bench.adding(&format!("pod-{pod:03}")))
        .collect();
    let mut served: Vec<_> = ztunnel
        .obeys_all(Duration::from_millis(500))
        .await
        .into_iter()
        .collect();
    served.sort();
    served.dedup();
    assert_eq!(served.len(), PODS);
    for add in adding {
        add.await.unwrap().unwrap();
    }
    let status = bench.server.status();
    assert_eq!((status.peers[0].served, status.peers[0].pending), (PODS, 0));
}

#[tokio::test]
async fn a_removal_overtakes_an_add_that_was_not_sent() {
    let mut bench = Bench::new("overtakes");
    bench.server.open();
    let ztunnel = bench.synced().await;
    let first = bench.adding("a");
    assert_eq!(ztunnel.next().await.0, "add a");
    let second = bench.adding("b");
    while bench.server.status().pods != 2 {
        tokio::task::yield_now().await;
    }
    let removing = bench.removing("b");
    assert_eq!(
        second.await.unwrap().unwrap_err(),
        AddError::Superseded,
        "at once, not after the queue"
    );
    ztunnel.ack("").await;
    first.await.unwrap().unwrap();
    // All are told of every removal; for one that it never knew ztunnel does nothing.
    ztunnel.obeys("del b").await;
    assert_eq!(removing.await.unwrap().acked.len(), 1);
}

#[tokio::test]
async fn a_removal_waits_only_so_long() {
    let options = Options {
        ack: LONG,
        remove: Duration::from_millis(100),
        ..brisk()
    };
    let mut bench = Bench::with("removal", options);
    bench.server.open();
    let ztunnel = bench.synced().await;
    let adding = bench.adding("a");
    ztunnel.obeys("add a").await;
    adding.await.unwrap().unwrap();
    let removed = bench.removing("a").await.unwrap();
    assert_eq!(removed.unanswered, [std::process::id()]);
    // Nobody knows it: nobody is told.
    assert_eq!(bench.removing("x").await.unwrap().unanswered, [0; 0]);
}

#[tokio::test]
async fn another_identity_is_a_new_pod_to_ztunnel() {
    let mut bench = Bench::new("identity");
    bench.server.open();
    let ztunnel = bench.synced().await;
    let netns = netns();
    let adding = bench.adding_in("a", netns.clone());
    ztunnel.obeys("add a").await;
    adding.await.unwrap().unwrap();
    let server = bench.server.clone();
    let renamed = Workload {
        service_account: "another".into(),
        ..workload("a")
    };
    let adding = tokio::spawn(async move { server.add(PodUid::from("a"), renamed, netns).await });
    ztunnel.obeys("del a").await;
    assert_eq!(ztunnel.next_as("another").await.0, "add a");
    ztunnel.ack("").await;
    adding.await.unwrap().unwrap();
}

#[tokio::test]
async fn names_that_do_not_fit_into_a_packet_are_refused_here() {
    let mut bench = Bench::new("long");
    bench.server.open();
    let ztunnel = bench.synced().await;
    let long = "x".repeat(1024);
    assert!(matches!(
        bench.adding(&long).await.unwrap().unwrap_err(),
        AddError::TooLong(_)
    ));
    let error = bench
        .server
        .expect(PodUid::from(&*long), workload("a"))
        .unwrap_err();
    assert!(error.to_string().contains("shorter"), "{error}");
    // Not remembered, and nobody was told.
    assert_eq!(bench.server.status().pods, 0);
    let adding = bench.adding("a");
    ztunnel.obeys("add a").await;
    adding.await.unwrap().unwrap();
}
