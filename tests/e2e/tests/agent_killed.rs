//! `kill -9`, again and again, under a stream of new connections: of the agent, of ztunnel, of both. No plaintext byte on
//! the wire; with the agent alone no connection lost; and afterwards everything is whole by itself.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use culvert_e2e::{eventually, governed::Governed, load::under_load, traffic::talk};
use culvert_lab::{Family, Ns, Server, Ztunnel};

/// Pause between two kills.
const PAUSE: Duration = Duration::from_millis(200);

fn whole(node: &Governed, pods: [&Ns; 2]) -> Result<()> {
    for pod in pods {
        node.expect_state(pod, "enrolled")?;
        eventually("the pod is whole", || Ok(node.show(pod)?["whole"] == true))?;
    }
    Ok(())
}

fn kill_agent(node: &mut Governed) -> Result<()> {
    node.agent()?.kill()?;
    node.agent = Some(node.options.launch(&node.lab)?);
    std::thread::sleep(PAUSE);
    Ok(())
}

fn kill_ztunnel(node: &mut Governed) -> Result<()> {
    node.ztunnel()?.kill()?;
    node.ztunnel = Some(Ztunnel::launch_at(
        &node.lab,
        &node.options.zds(),
        &node.peers,
    )?);
    // Time to be told of the pods and to carry something, else nothing is ever there to be killed.
    std::thread::sleep(5 * PAUSE);
    Ok(())
}

#[test]
fn an_agent_that_is_killed_costs_no_connection() -> Result<()> {
    let (mut node, [a, b]) = Governed::meshed("agent-kill", ["a", "b"])?;
    let (_, lost) = under_load(&mut node, [&a, &b], Duration::from_secs(60), kill_agent)?;
    ensure!(lost == 0, "{lost} connections were lost");
    node.agent()?.kill()?;
    node.start_agent()?;
    whole(&node, [&a, &b])
}

#[test]
fn a_ztunnel_that_is_killed_lets_no_plaintext_out() -> Result<()> {
    let (mut node, [a, b]) = Governed::meshed("ztunnel-kill", ["a", "b"])?;
    under_load(&mut node, [&a, &b], Duration::from_secs(20), kill_ztunnel)?;
    whole(&node, [&a, &b])?;
    under_load(&mut node, [&a, &b], Duration::from_secs(1), |_| {
        std::thread::sleep(PAUSE);
        Ok(())
    })
    .map(drop)
}

#[test]
fn both_killed_together_let_no_plaintext_out() -> Result<()> {
    let (mut node, [a, b]) = Governed::meshed("both-kill", ["a", "b"])?;
    under_load(&mut node, [&a, &b], Duration::from_secs(20), |node| {
        kill_agent(node)?;
        kill_ztunnel(node)
    })?;
    node.agent()?.kill()?;
    node.ztunnel()?.kill()?;
    let server = Server::echo(&b, b.at(Family::V4, 0)?)?;
    let began = Instant::now();
    node.agent = Some(node.options.launch(&node.lab)?);
    node.ztunnel = Some(Ztunnel::launch_at(
        &node.lab,
        &node.options.zds(),
        &node.peers,
    )?);
    eventually("both pods are enrolled", || {
        let agent = node.agent()?;
        // It may not listen yet.
        let enrolled = |pod| agent.state(pod).is_ok_and(|state| state == "enrolled");
        Ok(enrolled(&a) && enrolled(&b))
    })?;
    talk(&a, server.addr())?;
    eprintln!("whole again {:?} after both were started", began.elapsed());
    ensure!(
        node.stat(&a, "outbound_accepts")? > 0,
        "not through ztunnel"
    );
    whole(&node, [&a, &b])
}
