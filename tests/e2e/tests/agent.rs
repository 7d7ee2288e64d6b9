//! The agent at work on real namespaces: what labels and annotations say becomes so, and stays so.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use culvert_e2e::{LONG, eventually, governed::Governed, traffic::talk};
use culvert_lab::{Capture, Family, Ns, Server, connect, roundtrip};
use serde_json::json;

/// Talks to an echo server in another pod, and says whether ztunnel carried it.
fn carried(node: &Governed, from: &Ns, to: &Ns) -> Result<bool> {
    let server = Server::echo(to, to.at(Family::V4, 0)?)?;
    let before = node.stat(from, "outbound_accepts")?;
    talk(from, server.addr())?;
    Ok(node.stat(from, "outbound_accepts")? > before)
}

fn captured(node: &Governed, pod: &Ns) -> Result<bool> {
    let list = node
        .lab
        .culvert(&["-o", "json", "netns", "list"])?
        .ok()?
        .json()?;
    let pods = list["pods"].as_array().context("a list")?;
    let path = json!(pod.path());
    Ok(pods
        .iter()
        .any(|p| p["path"] == path && p["state"] == "enrolled"))
}

#[test]
fn a_namespace_label_enrols_and_releases_running_pods() -> Result<()> {
    let node = Governed::new("agent-label")?;
    let (a, b) = (node.pod("a")?, node.pod("b")?);
    let server = Server::echo(&b, b.at(Family::V4, 0)?)?;
    let old = connect(&a, server.addr(), LONG)?;
    roundtrip(&old, b"before")?;
    node.label(Some("ambient"))?;
    for pod in [&a, &b] {
        node.expect_state(pod, "enrolled")?;
        ensure!(node.show(pod)?["whole"] == true, "{}", node.show(pod)?);
    }
    roundtrip(&old, b"meanwhile")?;
    ensure!(
        carried(&node, &a, &b)?,
        "the pod's connection went past ztunnel"
    );
    let new = connect(&a, server.addr(), LONG)?;
    roundtrip(&new, b"through ztunnel")?;
    node.label(None)?;
    // The connection through ztunnel needs the rules as long as it lives.
    node.expect_state(&a, "draining")?;
    roundtrip(&new, b"still through ztunnel")?;
    drop(new);
    for pod in [&a, &b] {
        node.expect_state(pod, "none")?;
        ensure!(!captured(&node, pod)?);
    }
    roundtrip(&old, b"after")?;
    talk(&a, server.addr())
}

#[test]
fn a_pods_own_label_beats_its_namespaces() -> Result<()> {
    let node = Governed::new("agent-pod-label")?;
    node.label(Some("ambient"))?;
    let (a, b) = (node.lab.pod("a")?, node.lab.pod("b")?);
    node.options
        .pod(&a, &json!({"istio.io/dataplane-mode": "none"}), &json!({}))?;
    node.options.pod(&b, &json!({}), &json!({}))?;
    node.expect_state(&b, "enrolled")?;
    ensure!(!captured(&node, &a)?);
    node.label(None)?;
    node.options.pod(
        &b,
        &json!({"istio.io/dataplane-mode": "ambient"}),
        &json!({}),
    )?;
    node.options.pod(
        &a,
        &json!({"istio.io/dataplane-mode": "ambient"}),
        &json!({}),
    )?;
    node.expect_state(&a, "enrolled")?;
    node.expect_state(&b, "enrolled")
}

#[test]
fn an_annotation_acts_on_a_living_pod() -> Result<()> {
    let (node, [a, b]) = Governed::meshed("agent-annotation", ["a", "b"])?;
    let server = Server::echo(&b, b.at(Family::V4, 0)?)?;
    let old = connect(&a, server.addr(), LONG)?;
    roundtrip(&old, b"before")?;
    let port = server.addr().port().to_string();
    node.options.pod(
        &a,
        &json!({}),
        &json!({"culvert.dev/exclude-outbound-ports": port}),
    )?;
    eventually("the port is excluded", || {
        Ok(node.show(&a)?["policy"]["exclude_outbound_ports"] == json!([server.addr().port()]))
    })?;
    let before = node.stat(&a, "outbound_accepts")?;
    talk(&a, server.addr())?;
    ensure!(
        node.stat(&a, "outbound_accepts")? == before,
        "an excluded port went through ztunnel"
    );
    roundtrip(&old, b"after")?;
    Ok(())
}

#[test]
fn what_is_taken_away_by_hand_comes_back() -> Result<()> {
    let (node, [a, b]) = Governed::meshed("agent-repair", ["a", "b"])?;
    node.lab.detach(&a)?;
    eventually("a manual detach is repaired", || captured(&node, &a))?;
    eventually("the pod is whole", || Ok(node.show(&a)?["whole"] == true))?;
    a.set_sysctl("net/ipv4/tcp_fwmark_accept", "0")?;
    eventually("a sysctl is repaired", || {
        Ok(a.sysctl("net/ipv4/tcp_fwmark_accept")?.trim() == "1")
    })?;
    ensure!(
        carried(&node, &a, &b)?,
        "not through ztunnel after the repairs"
    );
    Ok(())
}

#[test]
fn the_nodes_programs_come_back() -> Result<()> {
    let (node, [a, b]) = Governed::meshed("agent-programs", ["a", "b"])?;
    let link = node.lab.bpffs().join("links/culvert_connect");
    let repaired = |at_least: f64| {
        let count = node.metric("culvert_repairs_total{kind=\"node_programs\"}")?;
        Ok(count >= at_least)
    };
    std::fs::remove_file(&link)?;
    eventually("the link is there again", || Ok(link.exists()))?;
    eventually("it is counted", || repaired(1.0))?;
    ensure!(carried(&node, &a, &b)?, "not through ztunnel");

    // All of it, with pods enrolled and the agent at work.
    node.lab.culvert(&["unload", "--force"])?.ok()?;
    eventually("it is counted", || repaired(2.0))?;
    for pod in [&a, &b] {
        eventually("the pod is whole", || Ok(node.show(pod)?["whole"] == true))?;
        node.expect_state(pod, "enrolled")?;
    }
    ensure!(
        carried(&node, &a, &b)?,
        "not through ztunnel after everything was taken away"
    );
    Ok(())
}

#[test]
fn a_pod_that_is_gone_leaves_nothing() -> Result<()> {
    let (node, [a, b]) = Governed::meshed("agent-gone", ["a", "b"])?;
    let pins = node.lab.pins()?.len();
    node.options.remove_pod(&a)?;
    node.expect_state(&a, "none")?;
    node.lab.delete(a)?;
    eventually("its pins are gone", || {
        Ok(node.lab.pins()?.len() == pins - 1)
    })?;
    node.expect_state(&b, "enrolled")
}

#[test]
fn an_agent_that_was_killed_is_followed_by_one_that_knows_everything() -> Result<()> {
    let (mut node, [a, b]) = Governed::meshed("agent-killed", ["a", "b"])?;
    let server = Server::echo(&b, b.at(Family::V4, 0)?)?;
    let old = connect(&a, server.addr(), LONG)?;
    roundtrip(&old, b"before")?;
    node.agent()?.kill()?;
    ensure!(
        carried(&node, &a, &b)?,
        "without an agent the pod is not captured"
    );
    // What changes meanwhile is seen when the next one comes.
    node.options
        .pod(&b, &json!({"istio.io/dataplane-mode": "none"}), &json!({}))?;
    node.start_agent()?;
    node.expect_state(&a, "enrolled")?;
    eventually("the pod that left meanwhile is let go", || {
        Ok(!captured(&node, &b)?)
    })?;
    roundtrip(&old, b"after")?;
    Ok(())
}

#[test]
fn an_agent_without_manifests_keeps_what_is_captured() -> Result<()> {
    let (mut node, [a, b]) = Governed::meshed("agent-blind", ["a", "b"])?;
    node.agent()?.kill()?;
    node.ztunnel()?.kill()?;
    let wire = Capture::start(node.lab.node(), a.host_ifname())?;
    node.start_agent()?;
    node.start_ztunnel()?;
    node.expect_state(&a, "enrolled")?;
    ensure!(carried(&node, &a, &b)?, "not through ztunnel");
    ensure!(!wire.contains(b"a word")?, "plaintext on the wire");
    Ok(())
}

#[test]
fn after_a_reboot_the_annotation_is_no_proof() -> Result<()> {
    let (mut node, [a, b]) = Governed::meshed("agent-reboot", ["a", "b"])?;
    node.agent()?.stop()?;
    node.ztunnel()?.kill()?;
    // bpffs and the run directory do not survive; manifests, annotations in them, do.
    node.lab.culvert(&["unload", "--force"])?.ok()?;
    std::fs::remove_dir_all(node.options.run_dir())?;
    node.options.pod(
        &a,
        &json!({}),
        &json!({"ambient.istio.io/redirection": "enabled"}),
    )?;
    node.start_agent()?;
    node.start_ztunnel()?;
    for pod in [&a, &b] {
        node.expect_state(pod, "enrolled")?;
        ensure!(node.show(pod)?["whole"] == true);
    }
    ensure!(carried(&node, &a, &b)?, "not through ztunnel");
    Ok(())
}

#[test]
fn without_ztunnel_a_pod_is_pending_and_nothing_leaves() -> Result<()> {
    let mut node = Governed::new("agent-pending")?;
    node.ztunnel()?.kill()?;
    node.ztunnel = None;
    let (a, b) = (node.pod("a")?, node.pod("b")?);
    node.label(Some("ambient"))?;
    eventually("captured, and not served", || {
        let status = node.agent()?.status()?;
        let pods = status["pods"].as_array().context("pods")?;
        Ok(pods.len() == 2 && pods.iter().all(|p| p["redirection"] == "pending"))
    })?;
    let server = Server::echo(&b, b.at(Family::V4, 0)?)?;
    let wire = Capture::start(node.lab.node(), a.host_ifname())?;
    ensure!(
        connect(&a, server.addr(), Duration::from_millis(300)).is_err(),
        "connected without ztunnel"
    );
    ensure!(
        !wire.any(|p| p.has_port(server.addr().port()))?,
        "something left"
    );
    node.start_ztunnel()?;
    node.expect_state(&a, "enrolled")?;
    node.expect_state(&b, "enrolled")?;
    let status = node.agent()?.status()?;
    ensure!(status["pods"][0]["redirection"] == "enabled", "{status}");
    ensure!(carried(&node, &a, &b)?, "not through ztunnel");
    Ok(())
}

#[test]
fn who_was_served_is_served_by_the_next_ztunnel_and_shown_as_pending_until_then() -> Result<()> {
    let (mut node, [a, b]) = Governed::meshed("agent-next", ["a", "b"])?;
    let enrolments = r#"culvert_enrolments_total{result="success"}"#;
    let before = node.metric(enrolments)?;
    node.ztunnel()?.kill()?;
    node.ztunnel = None;
    for pod in [&a, &b] {
        node.expect_state(pod, "pending")?;
    }
    ensure!(node.metric("culvert_enrolled_pods")? == 0.0);
    let status = node.agent()?.status()?;
    ensure!(
        status["pods"][0]["last_error"]
            .as_str()
            .is_some_and(|why| why.contains("no ztunnel")),
        "{status}"
    );
    ensure!(
        status["pods"][0]["redirection"] == "enabled",
        "peers fall back to plaintext"
    );
    node.start_ztunnel()?;
    for pod in [&a, &b] {
        node.expect_state(pod, "enrolled")?;
    }
    ensure!(carried(&node, &a, &b)?, "not through ztunnel");
    ensure!(
        node.metric(enrolments)? == before,
        "nobody was enrolled anew"
    );
    Ok(())
}
