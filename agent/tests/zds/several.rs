//! Several ztunnels at once, as in a rolling update, and ztunnels that go away.

use std::time::Duration;

use culvert::zds::{AddError, Event, Options};

use crate::peer::{Bench, LONG, SENT, brisk};

#[tokio::test]
async fn adds_go_to_the_newest_and_removals_to_all() {
    let mut bench = Bench::new("two");
    bench.server.open();
    let old = bench.synced().await;
    let adding = bench.adding("a");
    old.obeys("add a").await;
    adding.await.unwrap().unwrap();

    let new = bench.ztunnel().await;
    new.obeys("add a").await;
    // Until its snapshot is complete, the older one is the one.
    assert_eq!(new.next().await.0, SENT);
    let adding = bench.adding("b");
    old.obeys("add b").await;
    adding.await.unwrap().unwrap();
    new.ack("").await;
    new.obeys("add b").await;

    let adding = bench.adding("c");
    new.obeys("add c").await;
    adding.await.unwrap().unwrap();
    assert_eq!(old.next_within(Duration::from_millis(200)).await, None);

    for uid in ["a", "c"] {
        let removing = bench.removing(uid);
        new.obeys(&format!("del {uid}")).await;
        assert!(!removing.is_finished());
        old.obeys(&format!("del {uid}")).await;
        assert_eq!(removing.await.unwrap().acked.len(), 2);
    }
}

#[tokio::test]
async fn when_the_newest_goes_the_one_before_takes_over() {
    let mut bench = Bench::new("fallback");
    bench.server.open();
    let old = bench.synced().await;
    let new = bench.synced().await;
    let before = bench.adding("a");
    new.obeys("add a").await;
    before.await.unwrap().unwrap();
    // It vanishes between an Add and its ack.
    let during = bench.adding("b");
    assert_eq!(new.next().await.0, "add b");
    drop(new);
    let mut told = [old.next().await.0, String::new()];
    old.ack("").await;
    told[1] = old.next().await.0;
    old.ack("").await;
    told.sort();
    assert_eq!(told, ["add a", "add b"], "also what only the newest knew");
    during.await.unwrap().unwrap();
}

#[tokio::test]
async fn when_the_only_one_goes_the_add_fails_and_the_next_snapshot_has_it() {
    let mut bench = Bench::new("vanished");
    bench.server.open();
    let ztunnel = bench.synced().await;
    let adding = bench.adding("a");
    assert_eq!(ztunnel.next().await.0, "add a");
    drop(ztunnel);
    assert_eq!(adding.await.unwrap().unwrap_err(), AddError::Disconnected);
    let again = bench.ztunnel().await;
    again.obeys("add a").await;
    again.obeys(SENT).await;
}

#[tokio::test]
async fn one_that_does_not_read_holds_up_nobody_else() {
    const PODS: usize = 300;
    let options = Options {
        ack: LONG,
        ..brisk()
    };
    let mut bench = Bench::with("stuck", options);
    bench.server.open();
    let stuck = bench.synced().await;
    let adding = bench.adding("first");
    assert_eq!(stuck.next().await.0, "add first");
    // Never answered: the older one stays in the middle of its message, and everything piles up behind it.
    let new = bench.ztunnel().await;
    new.obeys("add first").await;
    new.obeys(SENT).await;
    adding.await.unwrap().unwrap();
    for pod in 0..PODS {
        let uid = format!("pod-{}", pod % 3);
        let adding = bench.adding(&uid);
        new.obeys(&format!("add {uid}")).await;
        adding.await.unwrap().unwrap();
        let removing = bench.removing(&uid);
        new.obeys(&format!("del {uid}")).await;
        removing.abort();
    }
    let pending = bench.server.status().peers[0].pending;
    assert!(
        pending <= 4,
        "{pending} messages wait: no more than the outstanding one and one for each pod"
    );
}

#[tokio::test]
async fn one_that_does_not_answer_is_hung_up_on_and_the_other_serves() {
    let mut bench = Bench::new("late-two");
    bench.server.open();
    let old = bench.synced().await;
    let new = bench.synced().await;
    let adding = bench.adding("a");
    assert_eq!(new.next().await.0, "add a");
    old.obeys("add a").await;
    adding.await.unwrap().unwrap();
    let reason = bench.disconnected().await;
    assert!(
        reason.contains("Add of pod a was not acknowledged"),
        "{reason}"
    );
    assert_eq!(new.next().await.0, "eof");
}

#[tokio::test]
async fn status_and_events_tell_of_each() {
    let mut bench = Bench::new("status");
    bench.server.open();
    let one = bench.synced().await;
    let two = bench.ztunnel().await;
    assert_eq!(two.next().await.0, SENT);
    let status = serde_json::to_value(bench.server.status()).unwrap();
    assert_eq!(status["peers"][0]["state"], "synced");
    assert_eq!(status["peers"][1]["state"], "snapshot");
    assert_eq!(status["peers"][0]["pid"], std::process::id());
    drop(one);
    let reason = bench.disconnected().await;
    assert_eq!(reason, "ztunnel has hung up");
    assert_eq!(bench.server.status().peers.len(), 1);
    let connected = bench.ztunnel().await;
    let pidfd = bench
        .event(|event| match event {
            Event::Connected { pidfd, .. } => Some(pidfd.clone()),
            _ => None,
        })
        .await;
    drop(connected);
    // Where the kernel has it (Linux 6.5), the process is told from a later one of its number.
    if let Some(pidfd) = pidfd {
        let info = std::os::fd::AsRawFd::as_raw_fd(&*pidfd);
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{info}")).unwrap();
        assert!(
            info.contains(&format!("Pid:\t{}", std::process::id())),
            "{info}"
        );
    }
}
