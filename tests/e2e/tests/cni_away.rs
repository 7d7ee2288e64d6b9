//! The plugin while the agent is away, stopped, or killed in the middle of an ADD: a pod of the mesh starts whole or not
//! at all, others start, and nothing is left over.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use culvert_e2e::cni::PluginError;
use culvert_e2e::governed::Governed;
use culvert_e2e::runtime::{FIRST_WORDS, Runtime, Sandbox, first_act};
use culvert_e2e::{bpf, eventually};
use culvert_lab::{Capture, Family, Ns, Server, Signal};
use serde_json::Value;

/// It failed, with "try again later".
fn later(result: Result<Value>) -> Result<String> {
    let error = result.err().context("the pod started")?;
    let error: PluginError = error.downcast()?;
    let said = error.error["msg"].as_str().unwrap_or_default().to_owned();
    ensure!(
        error.plugin == "culvert-cni" && error.error["code"] == 11,
        "{error}"
    );
    Ok(said)
}

/// A node with a server pod of the mesh, and a namespace outside of it that the decision file knows.
fn node(name: &str) -> Result<(Governed, Ns, Server)> {
    let (node, [pod]) = Governed::meshed(name, ["server"])?;
    node.options.namespace("plain", None)?;
    eventually("the decision file knows it", || {
        let text = std::fs::read(node.options.decisions()).unwrap_or_default();
        let file: Value = serde_json::from_slice(&text).unwrap_or_default();
        Ok(file["namespaces"]["plain"] == "outside")
    })?;
    let server = Server::echo(&pod, pod.at(Family::V4, 0)?)?;
    Ok((node, pod, server))
}

/// No entry of a map is about another namespace than this one's.
fn nothing_but(node: &Governed, pod: &Ns) -> Result<bool> {
    const BY_COOKIE: [&str; 6] = [
        "PODS",
        "POD_ADDRS",
        "ROLES",
        "LISTENERS",
        "RECORDS",
        "COUNTERS",
    ];
    let own = pod.cookie().to_ne_bytes();
    let keys = bpf::keys(&node.lab)?;
    let mut about = keys
        .iter()
        .filter(|(name, _)| BY_COOKIE.contains(&name.as_str()));
    Ok(about.all(|(_, keys)| keys.iter().all(|key| key.starts_with(&own))))
}

/// The runtime comes again with the mesh's pod: it starts, captured from its first act, and both go without a trace.
fn comes_again(
    node: &Governed,
    (server_pod, server): (&Ns, &Server),
    wire: &Capture,
    meshed: Sandbox,
    plain: Sandbox,
) -> Result<()> {
    let runtime = Runtime::chained(node, 20)?;
    let result = runtime.add(node, &meshed)?;
    first_act(&meshed.ns, server.addr())?;
    runtime.check(node, &meshed, &result)?;
    ensure!(
        !wire.contains(FIRST_WORDS)?,
        "plaintext:\n{}",
        wire.describe()
    );
    runtime.remove(node, plain)?;
    runtime.remove(node, meshed)?;
    eventually("nothing is left over", || nothing_but(node, server_pod))
}

#[test]
fn without_an_agent_only_pods_outside_the_mesh_start() -> Result<()> {
    let (mut node, server_pod, server) = node("cni-absent")?;
    let runtime = Runtime::chained(&node, 2)?;
    let wire = Capture::outside(node.lab.node(), &server_pod)?;
    node.options.scheduled_pod("default", "a")?;
    node.agent()?.kill()?;
    let sandbox = Sandbox::new(&node.lab, "c-a", "a")?;
    let said = later(runtime.add(&node, &sandbox))?;
    ensure!(said.contains("agent"), "{said}");
    runtime.del(&node, &sandbox)?;
    ensure!(sandbox.ns.ifindex("eth0").is_err());

    let ns = node.lab.pod_builder("c-plain").no_interface().build()?;
    let plain = Sandbox::around(ns, "c-plain", "plain", "p");
    runtime.add(&node, &plain)?;
    ensure!(plain.ns.ifindex("eth0").is_ok());
    // Of a namespace that the file does not know nothing is known.
    let ns = node.lab.pod_builder("c-new").no_interface().build()?;
    let new = Sandbox::around(ns, "c-new", "new", "p");
    later(runtime.add(&node, &new))?;
    runtime.del(&node, &new)?;

    node.start_agent()?;
    comes_again(&node, (&server_pod, &server), &wire, sandbox, plain)
}

#[test]
fn an_agent_that_does_not_answer_is_none() -> Result<()> {
    let (node, server_pod, server) = node("cni-stopped")?;
    let runtime = Runtime::chained(&node, 2)?;
    let wire = Capture::outside(node.lab.node(), &server_pod)?;
    node.options.scheduled_pod("default", "a")?;
    let sandbox = Sandbox::new(&node.lab, "c-a", "a")?;
    node.agent()?.process().signal(Signal::SIGSTOP)?;
    later(runtime.add(&node, &sandbox))?;
    let ns = node.lab.pod_builder("c-plain").no_interface().build()?;
    let plain = Sandbox::around(ns, "c-plain", "plain", "p");
    runtime.add(&node, &plain)?;
    runtime.del(&node, &sandbox)?;
    node.agent()?.process().signal(Signal::SIGCONT)?;
    // What it finds in its socket's queue by now is from plugins that have given up.
    comes_again(&node, (&server_pod, &server), &wire, sandbox, plain)
}

#[test]
fn an_agent_killed_in_the_middle_of_an_add() -> Result<()> {
    const POINTS: u32 = 20;
    let (mut node, server_pod, server) = node("cni-killed")?;
    let pins = node.lab.pins()?;
    let wire = Capture::outside(node.lab.node(), &server_pod)?;
    let patient = Runtime::alone(&node, 25)?;
    let hasty = Runtime::alone(&node, 1)?;
    let (mut whole, mut closed) = (0, 0);
    for point in 0..POINTS {
        let pod = format!("p{point}");
        node.options.scheduled_pod("default", &pod)?;
        let sandbox = Sandbox::around(node.lab.pod(&pod)?, &format!("c-{pod}"), "default", &pod);
        // Every other time there is a new agent before the plugin has lost its patience.
        let follows = point % 2 == 1;
        let runtime = if follows { &patient } else { &hasty };
        let agent = node.agent.take().context("an agent")?;
        if point == 0 {
            // However fast the machine is, this one comes too late for the ADD.
            agent.kill()?;
        }
        let (options, lab) = (&node.options, &node.lab);
        let (added, next) = std::thread::scope(|scope| -> Result<_> {
            let adding = scope.spawn(|| runtime.network().add(lab.node(), &sandbox.attachment()));
            std::thread::sleep(Duration::from_millis(3) * point);
            agent.kill()?;
            let next = follows.then(|| options.start(lab)).transpose()?;
            let added = adding.join();
            Ok((added.map_err(|_| anyhow::anyhow!("panicked"))?, next))
        })?;
        node.agent = next;
        let result = match added {
            Ok(result) => {
                whole += 1;
                // At once, whether there is an agent or not.
                first_act(&sandbox.ns, server.addr())?;
                result
            }
            Err(error) => {
                closed += 1;
                later(Err(error))?;
                runtime.del(&node, &sandbox)?;
                Value::Null
            }
        };
        if node.agent.is_none() {
            node.start_agent()?;
        }
        let result = if result.is_null() {
            patient.add(&node, &sandbox)?
        } else {
            result
        };
        first_act(&sandbox.ns, server.addr())?;
        eventually("the agent says so too", || {
            Ok(patient.check(&node, &sandbox, &result).is_ok())
        })?;
        node.options.remove_pod(&sandbox.ns)?;
        patient.remove(&node, sandbox)?;
    }
    eprintln!("{whole} whole, {closed} closed");
    ensure!(whole > 0 && closed > 0, "{whole} whole, {closed} closed");
    ensure!(
        !wire.contains(FIRST_WORDS)?,
        "plaintext:\n{}",
        wire.describe()
    );
    eventually("no entry is left over", || nothing_but(&node, &server_pod))?;
    eventually("no pin is left over", || Ok(node.lab.pins()? == pins))?;
    eventually("ztunnel serves the server alone", || {
        let stats = node.ztunnel()?.stats()?;
        Ok(stats["pods"].as_array().is_some_and(|pods| pods.len() == 1))
    })
}

#[test]
fn a_pods_new_address_is_as_good_as_its_first() -> Result<()> {
    let (node, server_pod, server) = node("cni-moves")?;
    let runtime = Runtime::chained(&node, 20)?;
    let wire = Capture::outside(node.lab.node(), &server_pod)?;
    node.options.scheduled_pod("default", "a")?;
    let sandbox = Sandbox::new(&node.lab, "c-a", "a")?;
    let result = runtime.add(&node, &sandbox)?;
    let addresses = result["ips"].as_array().context("addresses")?;
    let old = addresses
        .iter()
        .filter_map(|ip| ip["address"].as_str())
        .find(|address| address.starts_with("10.66."));
    // The old one first: what is added beside it would go with it.
    sandbox
        .ns
        .del_addr("eth0", old.context("an address")?.parse()?)?;
    let new = "10.66.0.200/24".parse()?;
    sandbox.ns.add_addr("eth0", new)?;
    sandbox
        .ns
        .add_route(&culvert_lab::Route::default_via("10.66.0.1".parse()?))?;
    eventually("the new address is known", || {
        let shown = node.show(&sandbox.ns)?;
        let known = shown["addresses"].to_string();
        Ok(known.contains("10.66.0.200") && shown["whole"] == true)
    })?;
    first_act(&sandbox.ns, server.addr())?;
    ensure!(
        !wire.contains(FIRST_WORDS)?,
        "plaintext:\n{}",
        wire.describe()
    );
    let own = Server::echo(&sandbox.ns, "10.66.0.200:8080".parse()?)?;
    let before = node.ztunnel()?.pod_stats("a")?["inbound_accepts"].clone();
    first_act(&node.lab.outside()?, own.addr())?;
    let after = node.ztunnel()?.pod_stats("a")?["inbound_accepts"].clone();
    ensure!(after != before, "plaintext came in past ztunnel");
    ensure!(own.count() == 1, "{}", own.count());
    Ok(())
}
