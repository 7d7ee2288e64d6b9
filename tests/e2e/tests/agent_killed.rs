//! `kill -9`, again and again, under a stream of new connections: of the agent, of ztunnel, of both. No plaintext byte on
//! the wire; with the agent alone no connection lost; and afterwards everything is whole by itself.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use culvert_e2e::{
    eventually,
    governed::Governed,
    load::{ANSWERED, CUT, Came, under_load},
    traffic::talk,
};
use culvert_lab::{Family, Ns, Server, Ztunnel};

/// Pause between two kills. The stand-in serves its pods a hundredth of a second after its start when there is an agent to
/// name them, so each has something to lose.
const PAUSE: Duration = Duration::from_millis(200);
/// How long it goes on.
const TIME: Duration = Duration::from_secs(60);
/// Once nobody is killed any more.
const WHOLE_AGAIN: Duration = Duration::from_secs(3);
/// Of the connections that were begun, how many have to be made while ztunnel is killed: else there was nothing to cut. Those
/// that find nobody as often as the kernel asks are lost.
const MADE: f64 = 0.1;
/// The same while the agent is killed with it: that takes most of the pause to start, and ztunnel waits for it.
const MADE_WITHOUT_EITHER: f64 = 0.01;

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Each test alone is all the load that a small machine can carry.
fn alone() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

fn whole(node: &Governed, pods: [&Ns; 2]) -> Result<()> {
    for pod in pods {
        node.expect_state(pod, "enrolled")?;
        eventually("the pod is whole", || Ok(node.show(pod)?["whole"] == true))?;
    }
    Ok(())
}

fn launch_agent(node: &mut Governed) -> Result<()> {
    node.agent = Some(node.options.launch(&node.lab)?);
    Ok(())
}

fn launch_ztunnel(node: &mut Governed) -> Result<()> {
    let ztunnel = Ztunnel::launch_at(&node.lab, &node.options.zds(), &node.peers)?;
    node.ztunnel = Some(ztunnel);
    Ok(())
}

/// While connections were cut, others were made.
fn there_was_something_to_cut(came: &Came, made: f64) -> Result<()> {
    ensure!(
        came.made as f64 > came.begun as f64 * made && came.lost > 0,
        "{came:?}"
    );
    Ok(())
}

#[test]
fn an_agent_that_is_killed_costs_no_connection() -> Result<()> {
    let _alone = alone();
    let (mut node, [a, b]) = Governed::meshed("agent-kill", ["a", "b"])?;
    let came = under_load(&mut node, [&a, &b], ANSWERED, TIME, |node| {
        node.agent()?.kill()?;
        launch_agent(node)?;
        std::thread::sleep(PAUSE);
        Ok(())
    })?;
    ensure!(came.lost == 0, "{came:?}");
    node.agent()?.kill()?;
    node.start_agent()?;
    whole(&node, [&a, &b])
}

#[test]
fn a_ztunnel_that_is_killed_lets_no_plaintext_out() -> Result<()> {
    let _alone = alone();
    let (mut node, [a, b]) = Governed::meshed("ztunnel-kill", ["a", "b"])?;
    let came = under_load(&mut node, [&a, &b], CUT, TIME, |node| {
        node.ztunnel()?.kill()?;
        launch_ztunnel(node)?;
        std::thread::sleep(PAUSE);
        Ok(())
    })?;
    there_was_something_to_cut(&came, MADE)?;
    whole(&node, [&a, &b])?;
    let came = under_load(
        &mut node,
        [&a, &b],
        ANSWERED,
        Duration::from_secs(1),
        |_| {
            std::thread::sleep(PAUSE);
            Ok(())
        },
    )?;
    ensure!(came.lost == 0, "{came:?}");
    Ok(())
}

#[test]
fn both_killed_together_let_no_plaintext_out() -> Result<()> {
    let _alone = alone();
    let (mut node, [a, b]) = Governed::meshed("both-kill", ["a", "b"])?;
    let came = under_load(&mut node, [&a, &b], CUT, TIME, |node| {
        node.agent()?.kill()?;
        node.ztunnel()?.kill()?;
        launch_agent(node)?;
        launch_ztunnel(node)?;
        std::thread::sleep(PAUSE);
        Ok(())
    })?;
    there_was_something_to_cut(&came, MADE_WITHOUT_EITHER)?;
    node.agent()?.kill()?;
    node.ztunnel()?.kill()?;
    let server = Server::echo(&b, b.at(Family::V4, 0)?)?;
    let began = Instant::now();
    launch_agent(&mut node)?;
    launch_ztunnel(&mut node)?;
    eventually("both pods are enrolled", || {
        let agent = node.agent()?;
        // It may not listen yet.
        let enrolled = |pod| agent.state(pod).is_ok_and(|state| state == "enrolled");
        Ok(enrolled(&a) && enrolled(&b))
    })?;
    talk(&a, server.addr())?;
    let took = began.elapsed();
    eprintln!("whole again {took:?} after both were started");
    ensure!(took < WHOLE_AGAIN, "whole again after {took:?}");
    ensure!(
        node.stat(&a, "outbound_accepts")? > 0,
        "not through ztunnel"
    );
    whole(&node, [&a, &b])
}
