//! What the watch weighs, measured from outside on a process of its own: pods of other nodes must not weigh anything.

#![expect(
    clippy::unwrap_used,
    reason = "test code: a step that fails is a test that fails"
)]

use std::{
    io::{BufRead as _, BufReader, Write as _},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use culvert_kube_tests::{Bed, NODE, logs, mode};
use futures::{StreamExt as _, stream};
use serde_json::{Value, json};

struct Process {
    child: Child,
    ask: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Process {
    #[expect(clippy::disallowed_methods, reason = "a test's own program")]
    fn start(bed: &Bed) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_watcher"))
            .arg(&bed.kubeconfig)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Self {
            ask: child.stdin.take().unwrap(),
            answers: BufReader::new(child.stdout.take().unwrap()),
            child,
        }
    }

    fn report(&mut self) -> Value {
        self.ask.write_all(b"\n").unwrap();
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    fn until(&mut self, holds: impl Fn(&Value) -> bool) -> Value {
        let started = Instant::now();
        loop {
            let report = self.report();
            if report["listed"] == true && holds(&report) {
                return report;
            }
            assert!(started.elapsed() < Duration::from_secs(60), "{report}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreign_pods_weigh_nothing() {
    logs();
    let bed = Bed::start("memory").await.unwrap();
    stream::iter(0..1000)
        .map(|i| {
            let bed = &bed;
            async move {
                bed.namespace(&format!("ns-{i}"), mode("none"))
                    .await
                    .unwrap()
            }
        })
        .buffer_unordered(16)
        .collect::<Vec<()>>()
        .await;
    bed.many_pods("ns-1", NODE, 250).await.unwrap();
    let mut early = Process::start(&bed);
    let before = early.until(|r| r["pods"] == 250 && r["namespaces"].as_u64() >= Some(1000));
    println!("250 pods, 1,000 namespaces: {before}");

    bed.many_pods("ns-2", "there", 5000).await.unwrap();
    bed.pod("ns-3", "last", NODE, json!({})).await.unwrap();
    let after = early.until(|r| r["pods"] == 251);
    println!("5,000 pods elsewhere, seen being made: {after}");
    // Not one of them even came over the wire.
    assert_eq!(
        after["objects"].as_u64().unwrap(),
        before["objects"].as_u64().unwrap() + 1
    );
    let grown = after["rss_kib"]
        .as_u64()
        .unwrap()
        .saturating_sub(before["rss_kib"].as_u64().unwrap());
    assert!(grown < 1024, "grew by {grown} KiB");

    let mut late = Process::start(&bed);
    let listed = late.until(|r| r["pods"] == 251);
    println!("the same, listed: {listed}");
    // The agent has 20 MiB in all; optimised it takes less than here, where the program is not.
    let peak = listed["peak_kib"].as_u64().unwrap();
    assert!(peak < 40 * 1024, "{peak} KiB at most");
}
