//! A connection that has died without a word, as after a restart of the node's CNI: noticed, replaced, counted, and all
//! of it without asking the API server anything while nothing happens.
//!
//! The agent's side runs in a network namespace of its own; between it and the API server stands a relay, and packet
//! filter rules that swallow, from some moment on, every packet of the connections there are. New ones pass.

#![expect(
    clippy::unwrap_used,
    reason = "test code: a step that fails is a test that fails"
)]

use std::{
    io::Write as _,
    process::{Command, Stdio},
    sync::atomic::Ordering,
    thread,
    time::{Duration, Instant},
};

use culvert::watch::client;
use culvert_kube_tests::{Bed, LONG, MODE, NODE, find, logs, mode, relay::Relay, watch_with};
use culvert_lab::{Lab, Ns};
use serde_json::json;

/// Pods of the node, namespaces, pods that ask for the mesh, network policies, Cilium's configuration: each has a connection
/// of its own.
const WATCHES: u64 = 5;
/// The promise.
const REPLACED: Duration = Duration::from_secs(15);

/// From now on, nothing of these connections passes, either way, and nobody is told.
fn swallow(node: &Ns, ports: &[u16]) {
    let list: Vec<String> = ports.iter().map(u16::to_string).collect();
    let list = list.join(", ");
    let rules = format!(
        "table inet hole {{\n chain in {{ type filter hook input priority 0; tcp sport {{ {list} }} drop; }}\n \
         chain out {{ type filter hook output priority 0; tcp dport {{ {list} }} drop; }}\n}}\n"
    );
    #[expect(clippy::disallowed_methods, reason = "a test's own tool")]
    node.run(|| {
        let mut nft = Command::new("nft")
            .args(["-f", "-"])
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        nft.stdin
            .take()
            .unwrap()
            .write_all(rules.as_bytes())
            .unwrap();
        assert!(nft.wait().unwrap().success());
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn black_holed_connection_is_replaced() {
    logs();
    let bed = Bed::start("black-hole").await.unwrap();
    bed.namespace("test", json!({})).await.unwrap();
    bed.pod("test", "web", NODE, json!({})).await.unwrap();
    let lab = Lab::new("black-hole").unwrap();
    let relay = Relay::start(lab.node(), &bed).unwrap();
    let kubeconfig = relay.kubeconfig(&bed, lab.scratch()).unwrap();
    let side = lab.pod("agent").unwrap();
    let (go, wait) = std::sync::mpsc::channel::<()>();
    let node = lab.node().clone();
    let agent = async move {
        let config = client::config(Some(&kubeconfig)).await.unwrap();
        let mut w = watch_with(client::connect(&config).unwrap());
        w.until("listed through the relay", |c| {
            c.listed && c.opted_in_listed && find(c, "test", "web").is_some()
        })
        .await
        .unwrap();

        // Nothing happens: nothing is asked. Keepalive has no bytes; the first seconds belong to what was begun before.
        tokio::time::sleep(Duration::from_secs(3)).await;
        let before = relay.sent.load(Ordering::Relaxed);
        tokio::time::sleep(Duration::from_secs(20)).await;
        assert_eq!(
            relay.sent.load(Ordering::Relaxed),
            before,
            "requests while idle"
        );
        assert_eq!(
            w.api.stats().dead_connections.get(),
            0,
            "keepalive holds what lives"
        );

        let old = relay.ports();
        swallow(&node, &old);
        let started = Instant::now();
        go.send(()).unwrap();
        let labelled = |c: &culvert::model::Cluster| c.namespaces["test"].labels.contains_key(MODE);
        let seen = w
            .within("seen in spite of the hole", LONG, labelled)
            .await
            .unwrap();
        println!("a change made in the hole was seen after {seen:?}");
        assert!(seen < REPLACED, "{seen:?}");
        let all = w.api.stats();
        while all.dead_connections.get() < WATCHES {
            assert!(
                started.elapsed() < REPLACED,
                "{} of {WATCHES} watches were replaced",
                all.dead_connections.get()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        println!("all watches replaced after {:?}", started.elapsed());
        assert!(relay.ports().len() > old.len());

        // A request over a pooled connection that died is repeated over another.
        w.api.get_pod("test", "web").await.unwrap().unwrap();
        swallow(&node, &relay.ports());
        let started = Instant::now();
        let pod = w.api.get_pod("test", "web").await.unwrap();
        println!(
            "a request into the hole was answered after {:?}",
            started.elapsed()
        );
        assert!(pod.is_some() && started.elapsed() < Duration::from_secs(7));
    };
    let inside = thread::spawn(move || {
        side.run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            runtime.unwrap().block_on(agent);
        });
    });
    // The label is put on by somebody whose connection is whole.
    let told = tokio::task::spawn_blocking(move || wait.recv())
        .await
        .unwrap();
    if told.is_ok() {
        bed.patch_namespace("test", json!({"metadata": {"labels": mode("ambient")}}))
            .await
            .unwrap();
    }
    tokio::task::spawn_blocking(|| inside.join().unwrap())
        .await
        .unwrap();
}
