//! What changes after the snapshot: adds and removals, and what becomes of those who wait for them.

use crate::peer::{Bench, SENT, inode, netns, workload};
use culvert::{model::PodUid, zds::AddError};

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
    let again = std::sync::Arc::new(netns.try_clone().unwrap());
    bench
        .server
        .add(PodUid::from("a"), workload("a"), again)
        .await
        .unwrap();
    let removing = bench.removing("a");
    ztunnel.obeys("del a").await;
    assert_eq!(removing.await.unwrap().acked, [std::process::id()]);
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
