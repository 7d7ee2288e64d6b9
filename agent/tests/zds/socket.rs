//! The socket's file and who may use it.

use std::{
    os::unix::{
        fs::{MetadataExt, PermissionsExt},
        net::UnixListener,
    },
    path::PathBuf,
};

use culvert::zds::{Error, Event, Options, Server};

use crate::peer::{Bench, Peer, SENT, brisk};

fn scratch(name: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("culvert-zds-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    dir.join("zds.sock")
}

#[tokio::test]
async fn a_live_socket_is_refused_and_its_owner_named() {
    let bench = Bench::new("live");
    bench.server.open();
    let error = Server::bind(&bench.path, brisk()).unwrap_err();
    assert!(
        matches!(&error, Error::InUse { pid, .. } if pid.cast_unsigned() == std::process::id()),
        "{error}"
    );
    // It was asked, and goes on.
    let ztunnel = bench.ztunnel().await;
    ztunnel.obeys(SENT).await;

    let stream = scratch("live-stream");
    let _other_type = UnixListener::bind(&stream).unwrap();
    let error = Server::bind(&stream, brisk()).unwrap_err();
    assert!(matches!(error, Error::InUse { .. }), "{error}");
}

#[tokio::test]
async fn a_stale_socket_is_replaced() {
    let path = scratch("stale");
    drop(UnixListener::bind(&path).unwrap());
    let (server, _events) = Server::bind(&path, brisk()).unwrap();
    server.open();
    let ztunnel = Peer::connect(&path);
    ztunnel.hello().await;
    ztunnel.obeys(SENT).await;
}

#[tokio::test]
async fn what_is_no_socket_stays() {
    let path = scratch("file");
    std::fs::write(&path, "precious").unwrap();
    let error = Server::bind(&path, brisk()).unwrap_err();
    assert!(matches!(error, Error::NotASocket { .. }), "{error}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
}

#[tokio::test]
async fn only_the_owner_may_connect() {
    let bench = Bench::new("mode");
    let meta = std::fs::metadata(&bench.path).unwrap();
    assert_eq!(meta.permissions().mode() & 0o777, 0o600);
    assert_eq!(meta.uid(), nix::unistd::geteuid().as_raw());
}

#[tokio::test]
async fn another_user_is_refused_and_counted() {
    let options = Options {
        uid: nix::unistd::geteuid().as_raw() + 1,
        ..brisk()
    };
    let mut bench = Bench::with("user", options);
    bench.server.open();
    let stranger = Peer::connect(&bench.path);
    let (uid, why) = bench
        .event(|event| match event {
            Event::Refused { uid, why, .. } => Some((*uid, *why)),
            _ => None,
        })
        .await;
    assert_eq!(uid, nix::unistd::geteuid().as_raw());
    assert!(why.contains("user"), "{why}");
    assert_eq!(stranger.next().await.0, "eof");
    let status = bench.server.status();
    assert_eq!((status.refused, status.peers.len()), (1, 0));
}

#[tokio::test]
async fn more_than_so_many_are_refused() {
    let options = Options {
        peers: 2,
        ..brisk()
    };
    let mut bench = Bench::with("crowd", options);
    let crowd: Vec<_> = (0..3).map(|_| Peer::connect(&bench.path)).collect();
    bench
        .event(|event| matches!(event, Event::Refused { .. }).then_some(()))
        .await;
    assert_eq!(crowd[2].next().await.0, "eof");
    assert_eq!(bench.server.status().peers.len(), 2);
}

#[tokio::test]
async fn with_the_last_handle_the_tasks_end_and_the_socket_goes() {
    let path = scratch("dropped");
    let (server, mut events) = Server::bind(&path, brisk()).unwrap();
    let second = server.clone();
    server.open();
    let ztunnel = Peer::connect(&path);
    ztunnel.hello().await;
    ztunnel.obeys(SENT).await;
    drop(server);
    assert!(path.exists(), "there is another handle");
    drop(second);
    assert_eq!(ztunnel.next().await.0, "eof");
    // The channel closes when the last task has ended.
    while events.recv().await.is_some() {}
    assert!(!path.exists());
}
