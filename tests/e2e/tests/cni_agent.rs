//! The real plugin, the real agent and a ztunnel: a pod of the mesh is safe before its first instruction, and what the
//! runtime asks later is answered by what is so.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use culvert_e2e::cni::PluginError;
use culvert_e2e::eventually;
use culvert_e2e::governed::Governed;
use culvert_e2e::runtime::{FIRST_WORDS, Runtime, Sandbox, first_act};
use culvert_lab::{Capture, Family, Ns, Rule, Server};
use serde_json::{Value, json};

/// How long the plugin may take.
const BUDGET: u64 = 20;

fn refused(result: Result<impl Sized>) -> Result<Value> {
    let error = result.err().context("the plugin agreed")?;
    let error: PluginError = error.downcast()?;
    ensure!(error.plugin == "culvert-cni", "{error}");
    Ok(error.error)
}

/// A node with a server pod of the mesh, and a runtime.
fn node(name: &str) -> Result<(Governed, Ns, Runtime)> {
    let (node, [server]) = Governed::meshed(name, ["server"])?;
    let runtime = Runtime::chained(&node, BUDGET)?;
    Ok((node, server, runtime))
}

fn enrolled(node: &Governed) -> Result<usize> {
    let list = node.lab.culvert(&["-o", "json", "netns", "list"])?.ok()?;
    Ok(list.json()?["pods"].as_array().context("a list")?.len())
}

#[test]
fn a_pod_is_safe_before_its_first_instruction() -> Result<()> {
    let (node, server, runtime) = node("cni-first")?;
    let servers = Family::BOTH
        .into_iter()
        .map(|family| Server::echo(&server, server.at(family, 0)?))
        .collect::<Result<Vec<_>>>()?;
    // Whatever a pod says to the server comes by here.
    let wire = Capture::outside(node.lab.node(), &server)?;
    let add = |pod: String| -> Result<Sandbox> {
        node.options.scheduled_pod("default", &pod)?;
        let sandbox = Sandbox::new(&node.lab, &format!("c-{pod}"), &pod)?;
        runtime.add(&node, &sandbox)?;
        for server in &servers {
            first_act(&sandbox.ns, server.addr())?;
        }
        Ok(sandbox)
    };
    let mut sandboxes = Vec::new();
    for n in 0..6 {
        sandboxes.push(add(format!("one-{n}"))?);
    }
    let together = std::thread::scope(|scope| {
        let starting: Vec<_> = (0..8)
            .map(|n| scope.spawn(move || add(format!("all-{n}"))))
            .collect();
        let joined = starting.into_iter().map(|thread| thread.join());
        joined
            .map(|result| result.unwrap_or_else(|_| anyhow::bail!("a pod's thread panicked")))
            .collect::<Result<Vec<_>>>()
    })?;
    sandboxes.extend(together);
    ensure!(
        !wire.contains(FIRST_WORDS)?,
        "plaintext:\n{}",
        wire.describe()
    );
    for n in 0..6 {
        let stats = node.ztunnel()?.pod_stats(&format!("one-{n}"))?;
        ensure!(stats["outbound_accepts"] == 2, "{stats}");
    }
    // The wire would have shown it: a pod outside the mesh is heard.
    node.options.namespace("plain", None)?;
    node.options.scheduled_pod("plain", "plain")?;
    let ns = node.lab.pod_builder("c-plain").no_interface().build()?;
    let plain = Sandbox::around(ns, "c-plain", "plain", "plain");
    runtime.add(&node, &plain)?;
    first_act(&plain.ns, servers[0].addr())?;
    ensure!(wire.contains(FIRST_WORDS)?, "the capture sees nothing");

    // And all of it goes again.
    for sandbox in sandboxes {
        runtime.remove(&node, sandbox)?;
    }
    eventually("only the server is left", || Ok(enrolled(&node)? == 1))?;
    eventually("ztunnel serves the server alone", || {
        let stats = node.ztunnel()?.stats()?;
        Ok(stats["pods"].as_array().is_some_and(|pods| pods.len() == 1))
    })
}

#[test]
fn check_names_what_is_wrong_and_del_lets_go() -> Result<()> {
    let (node, server, runtime) = node("cni-check")?;
    let echo = Server::echo(&server, server.at(Family::V4, 0)?)?;
    node.options.scheduled_pod("default", "a")?;
    let sandbox = Sandbox::new(&node.lab, "c-a", "a")?;
    let result = runtime.add(&node, &sandbox)?;
    runtime.check(&node, &sandbox, &result)?;

    // Everything is repaired within moments: hit until a CHECK comes in between.
    let caught = |what: &str, words: &str, hit: &dyn Fn() -> Result<()>| -> Result<()> {
        let mut said = Value::Null;
        eventually(what, || {
            hit()?;
            let Some(error) = runtime.check(&node, &sandbox, &result).err() else {
                return Ok(false);
            };
            said = error.downcast::<PluginError>()?.error;
            ensure!(said["code"] == 101, "{said}");
            Ok(said["msg"].as_str().is_some_and(|m| m.contains(words)))
        })
        .with_context(|| format!("CHECK said last: {said}"))?;
        eventually("it is repaired", || {
            Ok(runtime.check(&node, &sandbox, &result).is_ok())
        })
    };
    caught("a manual detach", "not enrolled", &|| {
        node.lab.detach(&sandbox.ns).map(drop)
    })?;
    caught("a rule that is gone", "rule", &|| {
        // It may be gone already, or not be back yet.
        let turn = Rule {
            fwmark: Some((0x111, 0xff5)),
            ..Rule::fwmark(Family::V4, 0x111, 15001)
        };
        drop(sandbox.ns.del_rule(&turn));
        Ok(())
    })?;
    caught("a sysctl", "tcp_fwmark_accept", &|| {
        sandbox.ns.set_sysctl("net/ipv4/tcp_fwmark_accept", "0")
    })?;
    first_act(&sandbox.ns, echo.addr())?;

    // Another namespace than the one that was added.
    let other = node.lab.pod("elsewhere")?;
    let wrong = Sandbox::around(other, "c-a", "default", "a");
    let error = refused(Runtime::alone(&node, BUDGET)?.check(
        &node,
        &wrong,
        &json!({"cniVersion": "1.1.0"}),
    ))?;
    ensure!(
        error["msg"]
            .as_str()
            .is_some_and(|m| m.contains("another network namespace")),
        "{error}"
    );

    runtime.del(&node, &sandbox)?;
    eventually("let go", || Ok(enrolled(&node)? == 1))?;
    // DEL may come again, and for what never was.
    runtime.del(&node, &sandbox)?;
    runtime.del(&node, &Sandbox::new(&node.lab, "never", "never")?)
}

#[test]
fn the_same_sandbox_can_be_added_again_at_once() -> Result<()> {
    let (node, server, _) = node("cni-again")?;
    // Without other plugins' work in between the second ADD comes as soon as it can.
    let runtime = Runtime::alone(&node, BUDGET)?;
    let echo = Server::echo(&server, server.at(Family::V4, 0)?)?;
    let wire = Capture::outside(node.lab.node(), &server)?;
    node.options.scheduled_pod("default", "a")?;
    let sandbox = Sandbox::around(node.lab.pod("a")?, "c-a", "default", "a");
    for n in 0..8 {
        let result = runtime.add(&node, &sandbox)?;
        first_act(&sandbox.ns, echo.addr())?;
        // Whatever the agent still had to do for the one before, it does not do to this one.
        node.options
            .namespace("other", (n % 2 == 0).then_some("ambient"))?;
        for _ in 0..4 {
            std::thread::sleep(Duration::from_millis(20));
            runtime.check(&node, &sandbox, &result)?;
            ensure!(enrolled(&node)? == 2, "let go of a pod that runs");
        }
        first_act(&sandbox.ns, echo.addr())?;
        runtime.del(&node, &sandbox)?;
    }
    ensure!(
        !wire.contains(FIRST_WORDS)?,
        "plaintext:\n{}",
        wire.describe()
    );
    Ok(())
}

#[test]
fn a_sandbox_made_anew_under_the_same_uid_takes_over() -> Result<()> {
    let (node, server, runtime) = node("cni-anew")?;
    let echo = Server::echo(&server, server.at(Family::V4, 0)?)?;
    let wire = Capture::outside(node.lab.node(), &server)?;
    node.options.scheduled_pod("default", "a")?;
    let first = Sandbox::new(&node.lab, "c-1", "a")?;
    runtime.add(&node, &first)?;
    first_act(&first.ns, echo.addr())?;
    let second = Sandbox::new(&node.lab, "c-2", "a")?;
    let result = runtime.add(&node, &second)?;
    first_act(&second.ns, echo.addr())?;
    let stats = node.ztunnel()?.pod_stats("a")?;
    ensure!(stats["netns_inode"] == second.ns.inode()?, "{stats}");
    // The old one's DEL comes late and is about the old one.
    runtime.remove(&node, first)?;
    runtime.check(&node, &second, &result)?;
    first_act(&second.ns, echo.addr())?;
    ensure!(
        !wire.contains(FIRST_WORDS)?,
        "plaintext:\n{}",
        wire.describe()
    );
    runtime.remove(&node, second)?;
    eventually("only the server is left", || Ok(enrolled(&node)? == 1))
}

#[test]
fn gc_status_and_version() -> Result<()> {
    let (node, _server, _) = node("cni-gc")?;
    let runtime = Runtime::alone(&node, BUDGET)?;
    let at = node.lab.node();
    let versions = runtime.network().versions(at)?;
    let known = versions[0]["supportedVersions"]
        .as_array()
        .context("a list")?;
    ensure!(
        known.contains(&json!("0.3.1")) && known.contains(&json!("1.1.0")),
        "{versions:?}"
    );
    runtime.network().status(at)?;
    let mut sandboxes = Vec::new();
    for pod in ["stays", "goes"] {
        node.options.scheduled_pod("default", pod)?;
        let ns = node.lab.pod(pod)?;
        let sandbox = Sandbox::around(ns, &format!("c-{pod}"), "default", pod);
        runtime.add(&node, &sandbox)?;
        sandboxes.push(sandbox);
    }
    ensure!(enrolled(&node)? == 3);
    runtime.network().gc(at, &[sandboxes[0].name()])?;
    eventually("one is let go", || Ok(enrolled(&node)? == 2))?;
    let result = json!({"cniVersion": "1.1.0"});
    runtime.check(&node, &sandboxes[0], &result)?;
    // Without an agent none of these fails: that would make the node NotReady, or keep sandboxes from going.
    node.agent()?.kill()?;
    runtime.network().status(at)?;
    runtime.network().gc(at, &[])?;
    runtime.del(&node, &sandboxes[0])
}
