//! An agent of another ABI version takes over what the one before it left: no moment without programs, no connection lost,
//! and a pod that is let go later is as it was before either of them.

use std::collections::BTreeSet;
use std::fs;
use std::net::TcpStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use culvert_e2e::{
    LONG, bpf, eventually,
    governed::Governed,
    load::{ANSWERED, under_load},
    picture,
    traffic::talk,
    version::restamp,
};
use culvert_lab::{Family, Lab, Ns, Server, connect, roundtrip};

/// Ends the agent; what it leaves says that it is another version's. The maps, by id.
fn leave(node: &mut Governed, step: i32) -> Result<BTreeSet<u32>> {
    node.agent()?.stop()?;
    node.agent = None;
    restamp(&node.lab, step)?;
    bpf::map_ids(&node.lab)
}

/// Starts this version's agent in its place, and sees that nothing of the other's is left.
fn follow(node: &mut Governed, maps: &BTreeSet<u32>, pods: &[&Ns]) -> Result<()> {
    let programs = bpf::programs_using(maps)?;
    node.start_agent()?;
    for pod in pods {
        node.expect_state(pod, "enrolled")?;
        eventually("the pod is whole", || Ok(node.show(pod)?["whole"] == true))?;
    }
    ensure!(earlier(&node.lab)?.is_empty(), "set aside, and still there");
    ensure!(
        bpf::map_ids(&node.lab)?.is_disjoint(maps),
        "maps of the other version are used on"
    );
    // The kernel frees them a moment after their last link.
    eventually("the other version's programs are gone", || {
        let there = bpf::programs_using(maps)?;
        Ok(there.is_disjoint(&programs))
    })
}

/// What is set aside.
fn earlier(lab: &Lab) -> Result<Vec<String>> {
    let entries = fs::read_dir(lab.bpffs())?;
    let names = entries.map(|e| Ok(e?.file_name().to_string_lossy().into_owned()));
    let names: Vec<String> = names.collect::<Result<_>>()?;
    Ok(names
        .into_iter()
        .filter(|name| name.starts_with("before-"))
        .collect())
}

#[test]
fn a_newer_and_an_older_version_take_over_under_load_and_lose_no_connection() -> Result<()> {
    let (mut node, [a, b]) = Governed::meshed("agent-abi", ["a", "b"])?;
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
        Duration::from_secs(15),
        |node| {
            while changes < 4 || began.elapsed() < Duration::from_secs(15) {
                // What is there is an older version's, or a newer one's.
                let maps = leave(node, if changes % 2 == 0 { -1 } else { 1 })?;
                follow(node, &maps, &[&a, &b])?;
                alive(&open)?;
                changes += 1;
            }
            Ok(())
        },
    )?;
    eprintln!("{changes} changes of version, {came:?}");
    ensure!(came.lost == 0, "{came:?}");
    alive(&open)?;
    ensure!(node.ztunnel()?.pid() == ztunnel && node.ztunnel()?.process().status().is_none());
    Ok(())
}

/// Renames a part of the pins as a start that was killed half-way would have left it.
fn move_aside(lab: &Lab, parts: &[&str]) -> Result<()> {
    let before = lab.bpffs().join("before-1");
    fs::create_dir(&before)?;
    for part in parts {
        fs::rename(lab.bpffs().join(part), before.join(part))
            .with_context(|| format!("moving {part}"))?;
    }
    Ok(())
}

#[test]
fn what_a_killed_start_left_is_completed_and_pods_end_as_they_were() -> Result<()> {
    // Nothing yet; cut off between two steps; all set aside and no maps made.
    for (round, parts) in [
        &[][..],
        &["pods"],
        &["pods", "links"],
        &["pods", "links", "maps"],
    ]
    .into_iter()
    .enumerate()
    {
        let mut node = Governed::new(&format!("agent-abi{round}"))?;
        let (a, b) = (node.pod("a")?, node.pod("b")?);
        let clean = picture::settled(&node.lab, &[&a, &b])?;
        let clean: Vec<_> = clean
            .into_iter()
            .filter(|l| !l.starts_with("pin "))
            .collect();
        node.label(Some("ambient"))?;
        for pod in [&a, &b] {
            node.expect_state(pod, "enrolled")?;
        }
        let server = Server::echo(&b, b.at(Family::V4, 0)?)?;
        let maps = leave(&mut node, -1)?;
        if !parts.is_empty() {
            move_aside(&node.lab, parts)?;
        }
        // Half set aside or not, what the other version attached goes on.
        let outbound = node.stat(&a, "outbound_accepts")?;
        talk(&a, server.addr())?;
        ensure!(node.stat(&a, "outbound_accepts")? == outbound + 1);

        follow(&mut node, &maps, &[&a, &b])?;
        let outbound = node.stat(&a, "outbound_accepts")?;
        talk(&a, server.addr())?;
        ensure!(node.stat(&a, "outbound_accepts")? == outbound + 1);

        node.label(None)?;
        for pod in [&a, &b] {
            node.expect_state(pod, "none")?;
        }
        let after = picture::settled(&node.lab, &[&a, &b])?;
        let after: Vec<_> = after
            .into_iter()
            .filter(|l| !l.starts_with("pin "))
            .collect();
        picture::same(&clean, &after).with_context(|| format!("{parts:?} were set aside"))?;
    }
    Ok(())
}

#[test]
fn pods_that_are_set_aside_are_not_unloaded_by_accident() -> Result<()> {
    let (mut node, [a, _]) = Governed::meshed("agent-abi-unload", ["a", "b"])?;
    leave(&mut node, 1)?;
    move_aside(&node.lab, &["pods", "links", "maps"])?;
    let refused = node.lab.culvert(&["unload"])?;
    ensure!(
        !refused.status.success() && refused.stderr.contains("2 pods are enrolled"),
        "{refused:?}"
    );
    let outside = node.lab.outside()?;
    let server = Server::echo(&outside, outside.at(Family::V4, 0)?)?;
    let outbound = node.stat(&a, "outbound_accepts")?;
    talk(&a, server.addr())?;
    ensure!(node.stat(&a, "outbound_accepts")? == outbound + 1);
    node.lab.culvert(&["unload", "--force"])?.ok()?;
    let left = Path::new(node.lab.bpffs()).exists() && !node.lab.pins()?.is_empty();
    ensure!(!left, "{:?}", node.lab.pins()?);
    Ok(())
}
