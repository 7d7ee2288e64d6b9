//! Traces: a collector that is away holds nobody up, and one that is there sees what was done for a pod, from the plugin's
//! question to the last step out.
//!
//! The collector is OTLP's own gRPC service in the test's process (`culvert-collector`); agent, plugin and pods are real.

use std::{collections::BTreeSet, net::TcpListener};

use anyhow::{Context as _, Result, ensure};
use culvert_collector::{Collector, Seen};
use culvert_e2e::{
    eventually,
    governed::Governed,
    runtime::{Runtime, Sandbox},
};

/// Where the collector is, as the agent is told.
const COLLECTOR: &str = "127.0.0.1:4317";

fn collector(node: &Governed) -> Result<Collector> {
    let listener = node.lab.node().run(|| TcpListener::bind(COLLECTOR))?;
    Collector::serve(listener)
}

fn wait_for(collector: &Collector, name: &str) -> Result<Seen> {
    eventually(&format!("a span {name:?}"), || {
        Ok(collector.span(name).is_some())
    })
    .with_context(|| format!("spans: {:#?}", collector.seen()))?;
    collector.span(name).context("it was there")
}

fn names(parts: &[Seen]) -> Vec<&str> {
    parts.iter().map(|s| s.name.as_str()).collect()
}

#[test]
fn a_pods_way_into_the_mesh_and_out_of_it() -> Result<()> {
    let node = Governed::with("traces-pod", |options| {
        options.arg("--otlp-endpoint").arg(COLLECTOR)
    })?;
    let agent = node.agent()?;
    node.label(Some("ambient"))?;

    // Nobody collects: pods are enrolled all the same, and it is said.
    let early = node.pod("early")?;
    node.expect_state(&early, "enrolled")?;
    eventually("what is lost is counted", || {
        Ok(node.metric("culvert_trace_spans_total{result=\"lost\"}")? >= 1.0)
    })?;
    ensure!(
        agent
            .process()
            .stderr()
            .contains("the collector does not take traces"),
        "{}",
        agent.process().stderr()
    );

    // It comes, and learns of the plugin's next question.
    let collector = collector(&node)?;
    let runtime = Runtime::chained(&node, 20)?;
    node.options.scheduled_pod("default", "web")?;
    let sandbox = Sandbox::new(&node.lab, "c-web", "web")?;
    runtime.add(&node, &sandbox)?;
    let add = wait_for(&collector, "ADD")?;
    let about: BTreeSet<(&str, &str)> = add
        .attributes
        .iter()
        .map(|(k, v)| (k.as_str(), v.as_str()))
        .collect();
    for expected in [
        ("service.name", "culvert"),
        ("k8s.pod.name", "web"),
        ("k8s.namespace.name", "default"),
        ("k8s.pod.uid", "web"),
        ("container.id", "c-web"),
        ("culvert.outcome", "enrolled"),
    ] {
        ensure!(about.contains(&expected), "{expected:?}: {about:?}");
    }
    ensure!(add.parent.is_empty() && add.error.is_none(), "{add:?}");
    ensure!(
        add.attributes
            .get("culvert.netns")
            .is_some_and(|p| p.starts_with("/proc/")),
        "{about:?}"
    );
    let enrol = wait_for(&collector, "enrol default/web")?;
    ensure!(names(&collector.parts(&add)) == ["look up", "enrol default/web"]);
    let cookie = sandbox.ns.cookie().to_string();
    ensure!(enrol.attributes.get("culvert.netns.cookie") == Some(&cookie));
    let steps = collector.parts(&enrol);
    ensure!(
        names(&steps) == ["capture", "ztunnel ack", "annotate"],
        "{steps:#?}"
    );
    ensure!(steps.iter().all(|s| {
        s.start <= s.end && enrol.start <= s.start && s.end <= enrol.end && s.error.is_none()
    }));
    // Of what the runtime waits for nothing is left out.
    ensure!(add.start <= enrol.start && steps[1].end <= add.end);

    // Its sandbox is taken down; the other pod leaves the mesh.
    runtime.remove(&node, sandbox)?;
    let gone = wait_for(&collector, "let go default/web")?;
    ensure!(gone.parent.is_empty() && gone.trace != add.trace);
    ensure!(
        names(&collector.parts(&gone)).contains(&"clear away"),
        "{gone:?}"
    );
    node.label(None)?;
    let left = wait_for(&collector, "un-enrol default/early")?;
    let steps = collector.parts(&left);
    let expected = ["release", "annotate", "ztunnel lets go", "detach"];
    ensure!(names(&steps) == expected, "{steps:#?}");
    ensure!(
        agent
            .process()
            .stderr()
            .contains("the collector takes traces again")
    );
    Ok(())
}

#[test]
fn what_was_done_last_is_sent_before_the_agent_ends() -> Result<()> {
    let node = Governed::with("traces-end", |options| {
        options.arg("--otlp-endpoint").arg(COLLECTOR)
    })?;
    let collector = collector(&node)?;
    node.label(Some("ambient"))?;
    let pod = node.pod("last")?;
    node.expect_state(&pod, "enrolled")?;
    node.agent()?.stop()?;
    wait_for(&collector, "enrol default/last").map(drop)
}

#[test]
fn an_agent_without_a_collector_has_no_thread_for_one() -> Result<()> {
    let threads = |node: &Governed| -> Result<Vec<String>> {
        let dir = format!("/proc/{}/task", node.agent()?.pid());
        let mut names = Vec::new();
        for task in std::fs::read_dir(dir)? {
            names.push(std::fs::read_to_string(task?.path().join("comm"))?);
        }
        Ok(names)
    };
    let exports = |names: &[String]| names.iter().any(|n| n.starts_with("OpenTelemetry"));
    let without = Governed::new("traces-none")?;
    ensure!(!exports(&threads(&without)?), "{:?}", threads(&without)?);
    let with = Governed::with("traces-some", |options| {
        options.arg("--otlp-endpoint").arg(COLLECTOR)
    })?;
    ensure!(exports(&threads(&with)?), "{:?}", threads(&with)?);
    Ok(())
}
