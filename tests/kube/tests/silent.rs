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
    fs,
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use culvert::watch::client;
use culvert_kube_tests::{Bed, LONG, MODE, NODE, find, logs, mode, watch_with};
use culvert_lab::{Family, Lab, Ns};
use serde_json::json;

/// The promise.
const REPLACED: Duration = Duration::from_secs(15);

/// Carries connections from the lab's node to the API server, byte for byte.
struct Relay {
    at: SocketAddr,
    /// Ports of the clients, in order of arrival.
    clients: Arc<Mutex<Vec<u16>>>,
    /// Bytes that clients have sent.
    sent: Arc<AtomicU64>,
}

impl Relay {
    fn start(node: &Ns, to: SocketAddr) -> Self {
        let address = node.ip(Family::V4).unwrap();
        let listener = node.run(move || TcpListener::bind((address, 0)).unwrap());
        let at = listener.local_addr().unwrap();
        let relay = Self {
            at,
            clients: Arc::default(),
            sent: Arc::default(),
        };
        let (clients, sent) = (Arc::clone(&relay.clients), Arc::clone(&relay.sent));
        // Out of the lab's namespace again: sockets opened here reach the machine's loopback.
        thread::spawn(move || {
            while let Ok((client, from)) = listener.accept() {
                clients.lock().unwrap().push(from.port());
                let Ok(server) = TcpStream::connect(to) else {
                    continue;
                };
                let sent = Arc::clone(&sent);
                let (c, s) = (client.try_clone().unwrap(), server.try_clone().unwrap());
                thread::spawn(move || carry(&c, &s, Some(&sent)));
                thread::spawn(move || carry(&server, &client, None));
            }
        });
        relay
    }

    fn ports(&self) -> Vec<u16> {
        self.clients.lock().unwrap().clone()
    }
}

fn carry(mut from: &TcpStream, mut to: &TcpStream, count: Option<&AtomicU64>) {
    let mut buffer = vec![0; 65536];
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        if let Some(count) = count {
            count.fetch_add(n as u64, Ordering::Relaxed);
        }
        if to.write_all(&buffer[..n]).is_err() {
            break;
        }
    }
    let _gone = to.shutdown(Shutdown::Write);
}

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

/// The agent's kubeconfig with the relay in place of the server.
fn through(relay: SocketAddr, bed: &Bed, to: &Path) -> PathBuf {
    let text = fs::read_to_string(&bed.kubeconfig).unwrap();
    let url = bed.plane.url();
    let host: SocketAddr = url.trim_start_matches("https://").parse().unwrap();
    let text = text.replace(&url, &format!("https://{relay}"));
    let server = format!("https://{relay}");
    // The certificate is the server's, not the relay's.
    let name = format!("\"tls-server-name\":\"{}\",", host.ip());
    let text = if text.trim_start().starts_with('{') {
        text.replacen("\"server\":", &format!("{name}\"server\":"), 1)
    } else {
        let line = text.lines().find(|l| l.contains(&server)).unwrap();
        let indent = &line[..line.len() - line.trim_start().trim_start_matches("- ").len()];
        let more = format!(
            "{line}\n{}tls-server-name: {}",
            indent.replace('-', " "),
            host.ip()
        );
        text.replacen(line, &more, 1)
    };
    let path = to.join("kubeconfig");
    fs::write(&path, text).unwrap();
    path
}

fn server_of(bed: &Bed) -> SocketAddr {
    bed.plane
        .url()
        .trim_start_matches("https://")
        .parse()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn black_holed_connection_is_replaced() {
    logs();
    let bed = Bed::start("black-hole").await.unwrap();
    bed.namespace("test", json!({})).await.unwrap();
    bed.pod("test", "web", NODE, json!({})).await.unwrap();
    let lab = Lab::new("black-hole").unwrap();
    let relay = Relay::start(lab.node(), server_of(&bed));
    let kubeconfig = through(relay.at, &bed, lab.scratch());
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
        while all.dead_connections.get() < 3 {
            assert!(
                started.elapsed() < REPLACED,
                "each of the three watches is replaced"
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
