//! A pod that leaves the mesh while its peers have not heard of it: what they send it by HBONE arrives for as long as
//! ztunnel serves it, and afterwards they are refused at once instead of being left waiting.

use std::io::{Read as _, Write as _};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use culvert_e2e::{LONG, eventually, governed::Governed, picture, traffic::talk};
use culvert_lab::{Capture, Family, Server, connect, roundtrip};
use serde_json::json;

/// Much less than it takes to give a connection up that nobody answers.
const SOON: Duration = Duration::from_secs(5);

#[test]
fn peers_that_have_not_heard_reach_a_pod_that_drains() -> Result<()> {
    let (node, [a, b]) = Governed::meshed("leaving", ["a", "b"])?;
    let outside = node.lab.outside()?;
    let servers = Family::BOTH
        .into_iter()
        .map(|family| Server::echo(&b, b.at(family, 0)?))
        .collect::<Result<Vec<_>>>()?;
    let world = Server::echo(&outside, outside.at(Family::V4, 0)?)?;
    let old = connect(&a, servers[0].addr(), LONG)?;
    roundtrip(&old, b"before")?;
    node.options
        .pod(&b, &json!({"istio.io/dataplane-mode": "none"}), &json!({}))?;
    node.expect_state(&b, "draining")?;

    // ztunnel was told nothing: it goes on speaking HBONE to the pod.
    let wire = Capture::outside(node.lab.node(), &b)?;
    for server in &servers {
        for _ in 0..5 {
            let before = node.stat(&b, "hbone_in")?;
            talk(&a, server.addr())?;
            ensure!(node.stat(&b, "hbone_in")? == before + 1, "not by HBONE");
        }
    }
    ensure!(!wire.contains(b"a word")?, "plaintext on the wire");
    // Whoever has heard, or never was in the mesh, reaches it as any pod; and what it sends goes direct.
    let (inbound, outbound) = (
        node.stat(&b, "inbound_accepts")?,
        node.stat(&b, "outbound_accepts")?,
    );
    for server in &servers {
        talk(&outside, server.addr())?;
        talk(&b, server.addr())?;
    }
    talk(&b, world.addr())?;
    ensure!(wire.contains(b"a word")?, "the capture sees nothing");
    ensure!(
        (
            node.stat(&b, "inbound_accepts")?,
            node.stat(&b, "outbound_accepts")?
        ) == (inbound, outbound),
        "captured while it drains"
    );
    roundtrip(&old, b"still here")?;
    drop(old);
    node.expect_state(&b, "none")?;

    // From now on nobody takes HBONE there. That is said at once.
    for server in &servers {
        let began = Instant::now();
        let mut answer = Vec::new();
        let failed = connect(&a, server.addr(), LONG)
            .and_then(|mut stream| {
                stream.set_read_timeout(Some(LONG))?;
                stream.write_all(b"anybody?")?;
                stream.read_to_end(&mut answer)
            })
            .map_or(true, |read| read == 0);
        ensure!(failed, "answered {answer:?}");
        ensure!(
            began.elapsed() < SOON,
            "left waiting for {:?}",
            began.elapsed()
        );
    }
    Ok(())
}

#[test]
fn a_pod_that_comes_back_while_it_drains_is_captured_again() -> Result<()> {
    let (node, [a, b]) = Governed::meshed("leaving-back", ["a", "b"])?;
    let server = Server::echo(&b, b.at(Family::V4, 0)?)?;
    let held = connect(&a, server.addr(), LONG)?;
    roundtrip(&held, b"before")?;
    let before = picture::of(&b)?;
    for _ in 0..3 {
        node.label(None)?;
        node.expect_state(&b, "draining")?;
        node.label(Some("ambient"))?;
        for pod in [&a, &b] {
            node.expect_state(pod, "enrolled")?;
            eventually("the pod is whole", || Ok(node.show(pod)?["whole"] == true))?;
        }
        let policy = node.show(&b)?["policy"].clone();
        ensure!(
            policy["exclude_outbound_cidrs"] == json!([]) && policy["bypass_inbound"] == false,
            "{policy}"
        );
        let accepts = node.stat(&a, "outbound_accepts")?;
        talk(&a, server.addr())?;
        ensure!(node.stat(&a, "outbound_accepts")? == accepts + 1);
    }
    roundtrip(&held, b"after")?;
    picture::same(&before, &picture::of(&b)?)
}
