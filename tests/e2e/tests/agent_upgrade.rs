//! Another build of the agent takes over, and the first one after it again, under a stream of new connections: none is
//! lost, none is in plaintext, and those that were open stay open. ztunnel goes on as if nothing had happened.

use std::net::TcpStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use culvert_e2e::{
    LONG, bpf, eventually,
    governed::Governed,
    load::{ANSWERED, under_load},
};
use culvert_lab::{Family, Server, connect, roundtrip};

/// Ends the agent as an upgrade does, and starts this build in its place.
fn follow(node: &mut Governed, build: Option<PathBuf>) -> Result<()> {
    let maps = bpf::map_ids(&node.lab)?;
    let before = bpf::programs_using(&maps)?;
    let code = bpf::program_tags(&before)?;
    node.agent()?.stop()?;
    node.agent = None;
    node.options = node.options.clone().binary(build);
    node.start_agent()?;
    // ztunnel connects to the new one by itself.
    let pid = node.ztunnel()?.pid();
    eventually("the agent after it is told by ztunnel", || {
        let status = node.agent()?.status()?;
        let mut known = status["ztunnels"].as_array().into_iter().flatten();
        Ok(known.any(|z| z["pid"] == pid && z["snapshot_sent"] == true))
    })?;
    ensure!(bpf::map_ids(&node.lab)? == maps, "maps are made anew");
    let after = bpf::programs_using(&maps)?;
    // What stays is each pod's own jump, which never changes while the pod lives.
    let kept = before.intersection(&after).count();
    ensure!(
        after.len() > kept && kept == 2,
        "{kept} programs kept, of {before:?}, now {after:?}"
    );
    // No other program of the one build is, instruction by instruction, one of the other's.
    let new = bpf::program_tags(&(&after - &before))?;
    ensure!(
        new.len() > 1 && new.is_disjoint(&code),
        "the same code: {new:02x?} of {code:02x?}"
    );
    Ok(())
}

#[test]
fn an_upgrade_and_a_downgrade_under_load_lose_no_connection() -> Result<()> {
    let (mut node, [a, b]) = Governed::meshed("agent-upgrade", ["a", "b"])?;
    let another = node.lab.another_build()?;
    let ztunnel = node.ztunnel()?.pid();
    let servers = Family::BOTH
        .into_iter()
        .map(|family| Server::echo(&b, b.at(family, 0)?))
        .collect::<Result<Vec<_>>>()?;
    let open: Vec<TcpStream> = servers
        .iter()
        .cycle()
        .take(20)
        .map(|server| connect(&a, server.addr(), LONG))
        .collect::<std::io::Result<_>>()?;
    let alive = |open: &[TcpStream]| -> Result<()> {
        for stream in open {
            let said = roundtrip(stream, b"still here").context("a connection from before")?;
            ensure!(said == b"still here");
        }
        Ok(())
    };
    alive(&open)?;
    let began = Instant::now();
    let mut changes = 0;
    let came = under_load(
        &mut node,
        [&a, &b],
        ANSWERED,
        Duration::from_secs(20),
        |node| {
            // To the other build and back, at least twice each, however slow the machine is.
            while changes < 4 || began.elapsed() < Duration::from_secs(20) {
                let build = (changes % 2 == 0).then(|| another.clone());
                follow(node, build)?;
                alive(&open)?;
                for pod in [&a, &b] {
                    node.expect_state(pod, "enrolled")?;
                }
                changes += 1;
            }
            Ok(())
        },
    )?;
    eprintln!("{changes} changes of build");
    ensure!(came.lost == 0, "{came:?}");
    alive(&open)?;
    for pod in [&a, &b] {
        eventually("the pod is whole", || Ok(node.show(pod)?["whole"] == true))?;
    }
    ensure!(node.ztunnel()?.pid() == ztunnel && node.ztunnel()?.process().status().is_none());
    Ok(())
}
