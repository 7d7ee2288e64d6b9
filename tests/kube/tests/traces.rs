//! An API server that was away leaves a trace at the collector, as long as it was away.

use std::{net::TcpListener, time::Duration};

use culvert_collector::Collector;
use culvert_kube_tests::{Bed, logs, mode, node::Node};

const COLLECTOR: &str = "127.0.0.1:4317";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_api_server_that_was_away() {
    logs();
    let bed = Bed::start("traces").await.unwrap();
    bed.namespace("mesh", mode("ambient")).await.unwrap();
    let mut node = Node::new("traces", &bed).unwrap();
    let listener = node.lab.node().run(|| TcpListener::bind(COLLECTOR));
    let collector = Collector::serve(listener.unwrap()).unwrap();
    node.start_agent(&["--otlp-endpoint", COLLECTOR]).unwrap();
    node.until("ready", || Ok(node.status(&[])?.status.success()))
        .unwrap();
    assert!(collector.span("API server away").is_none());
    bed.plane.stop_api_server().unwrap();
    node.until("interrupted", || {
        Ok(node.log().contains("watch interrupted"))
    })
    .unwrap();
    std::thread::sleep(Duration::from_secs(1));
    bed.plane.start_api_server().unwrap();
    // Something to hear of.
    bed.namespace("more", mode("ambient")).await.unwrap();
    let namespaces = || {
        let mut seen = collector.seen().into_iter();
        seen.find(|s| {
            s.name == "API server away"
                && s.attributes.get("culvert.watched").map(String::as_str) == Some("namespaces")
        })
    };
    node.until("its trace", || Ok(namespaces().is_some()))
        .unwrap();
    let away = namespaces().unwrap();
    assert!(away.end - away.start >= 1_000_000_000, "{away:?}");
    assert!(
        away.error.as_ref().is_some_and(|e| !e.is_empty()),
        "{away:?}"
    );
    assert_eq!(
        away.attributes.get("k8s.node.name").map(String::as_str),
        Some(culvert_kube_tests::NODE)
    );
    node.stop_agent().unwrap();
}
