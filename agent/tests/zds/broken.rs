//! Peers that do not keep to the protocol: each is hung up on, with a reason that says what to look at.

use std::time::Duration;

use culvert::zds::{AddError, Options, messages::ZdsHello};
use prost::Message as _;

use crate::peer::{Bench, Peer, SENT, brisk};

#[tokio::test]
async fn no_hello() {
    let options = Options {
        hello: Duration::from_millis(100),
        ..brisk()
    };
    let mut bench = Bench::with("no-hello", options);
    bench.server.open();
    let silent = Peer::connect(&bench.path);
    let reason = bench.disconnected().await;
    assert!(reason.starts_with("no hello within 100ms"), "{reason}");
    assert_eq!(silent.next().await.0, "eof");
    assert_eq!(bench.server.status().timeouts, 1);
}

#[tokio::test]
async fn a_hello_of_another_version() {
    let mut bench = Bench::new("version");
    bench.server.open();
    let newer = Peer::connect(&bench.path);
    newer.say(&ZdsHello { version: 2 }.encode_to_vec()).await;
    let reason = bench.disconnected().await;
    assert!(reason.contains("version 2, not 1"), "{reason}");
    assert_eq!(newer.next().await.0, "eof");
}

#[tokio::test]
async fn garbage_for_a_hello_and_for_an_answer() {
    let mut bench = Bench::new("garbage");
    bench.server.open();
    let stranger = Peer::connect(&bench.path);
    stranger.say(b"\xff\xff\xff").await;
    let reason = bench.disconnected().await;
    assert!(reason.contains("its hello cannot be read"), "{reason}");

    for (answer, complaint) in [
        (
            &b"\xff\xff\xff"[..],
            "its answer to SnapshotSent cannot be read",
        ),
        (b"\x52\x03new", "its answer to SnapshotSent is no ack"),
    ] {
        let ztunnel = bench.ztunnel().await;
        assert_eq!(ztunnel.next().await.0, SENT);
        ztunnel.say(answer).await;
        let reason = bench.disconnected().await;
        assert!(reason.contains(complaint), "{reason}");
        assert_eq!(ztunnel.next().await.0, "eof");
    }
}

#[tokio::test]
async fn an_oversized_packet() {
    let mut bench = Bench::new("oversized");
    bench.server.open();
    let ztunnel = bench.ztunnel().await;
    assert_eq!(ztunnel.next().await.0, SENT);
    ztunnel.ack(&"x".repeat(1024)).await;
    let reason = bench.disconnected().await;
    assert!(reason.contains("more than 1024 bytes"), "{reason}");
}

#[tokio::test]
async fn an_empty_packet_is_the_end() {
    let mut bench = Bench::new("empty");
    bench.server.open();
    let ztunnel = bench.synced().await;
    ztunnel.say(b"").await;
    assert_eq!(bench.disconnected().await, "ztunnel has hung up");
}

#[tokio::test]
async fn a_descriptor_where_none_belongs_is_never_taken_in() {
    let mut bench = Bench::new("descriptor");
    bench.server.open();
    let ztunnel = bench.ztunnel().await;
    assert_eq!(ztunnel.next().await.0, SENT);
    ztunnel.say_with(b"\x0a\x00", &[1]).await;
    let reason = bench.disconnected().await;
    assert!(reason.contains("a descriptor beside a message"), "{reason}");
}

#[tokio::test]
async fn an_answer_that_nobody_asked_for() {
    let mut bench = Bench::new("unasked");
    bench.server.open();
    let ztunnel = bench.synced().await;
    ztunnel.ack("").await;
    let reason = bench.disconnected().await;
    assert!(reason.contains("nobody asked"), "{reason}");
}

#[tokio::test]
async fn the_end_of_the_snapshot_refused() {
    let mut bench = Bench::new("refused-end");
    bench.server.open();
    let ztunnel = bench.ztunnel().await;
    assert_eq!(ztunnel.next().await.0, SENT);
    ztunnel.ack("pod snapshot received already").await;
    let reason = bench.disconnected().await;
    assert!(
        reason.contains("refused the end of its snapshot"),
        "{reason}"
    );
}

#[tokio::test]
async fn an_ack_that_comes_too_late() {
    let options = Options {
        ack: Duration::from_millis(300),
        ..brisk()
    };
    let mut bench = Bench::with("late", options);
    bench.server.open();
    let ztunnel = bench.ztunnel().await;
    ztunnel.obeys(SENT).await;
    let adding = bench.adding("a");
    assert_eq!(ztunnel.next().await.0, "add a");
    let reason = bench.disconnected().await;
    assert!(
        reason.contains("Add of pod a was not acknowledged within 300ms"),
        "{reason}"
    );
    assert_eq!(adding.await.unwrap().unwrap_err(), AddError::TimedOut);
    // In its buffer is the end, not the next message: the order would be ambiguous.
    assert_eq!(ztunnel.next().await.0, "eof");
    let again = bench.ztunnel().await;
    again.obeys("add a").await;
    again.obeys(SENT).await;
    assert_eq!(bench.server.status().timeouts, 1);
}
