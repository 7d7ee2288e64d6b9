//! Where the programs for lookups are, under an agent: beside others, in the cgroup of pods, and when they cannot be used.

use std::time::Duration;

use anyhow::{Context as _, Result};
use culvert_e2e::dns::{ask, ask_here};
use culvert_e2e::eventually;
use culvert_lab::{Family, Hooks, Server, roundtrip};
use serde_json::json;

use crate::governed::{ANNOTATION, Stage};
use crate::{BY_RESOLVER, BY_ZTUNNEL};

/// What the agent says of them for people to read; empty when there is nothing to say.
fn attention(stage: &Stage) -> Result<String> {
    let status = stage.node.agent()?.status()?;
    let tasks = status["readiness"]["tasks"].as_array().context("tasks")?;
    let task = tasks.iter().find(|t| t["name"] == "lookups");
    let task = task.context("no task of lookups")?;
    anyhow::ensure!(task["ready"] == true, "{task}");
    Ok(task["reason"].as_str().unwrap_or_default().to_owned())
}

fn often(options: culvert_lab::AgentOptions) -> culvert_lab::AgentOptions {
    options.arg("--reconcile-period=1s")
}

#[test]
fn who_comes_to_run_before_them_is_said_once() {
    let stage = Stage::open("dns-ahead", often).unwrap();
    let pod = stage.pod("a", &json!({}), &json!({})).unwrap();
    assert_eq!(attention(&stage).unwrap(), "");
    let first = Hooks::first(stage.node.lab.cgroup()).unwrap();
    eventually("it is in the status", || {
        let said = attention(&stage)?;
        Ok(said.contains("connect4: somebody_elses") && said.contains("recvmsg6: somebody_elses"))
    })
    .unwrap();
    // Some passes more.
    std::thread::sleep(Duration::from_secs(12));
    let log = stage.node.agent().unwrap().process().stderr();
    let warned = log.lines().filter(|line| {
        line.contains("connect4: somebody_elses runs before") && line.contains("WARN")
    });
    assert_eq!(warned.count(), 1, "{log}");
    // It is no fault of theirs that could be mended.
    assert_eq!(stage.node.show(&pod).unwrap()["whole"], true);
    assert!(!log.contains("were repaired"), "{log}");
    drop(first);
    eventually("it is gone from the status", || {
        Ok(attention(&stage)?.is_empty())
    })
    .unwrap();
}

#[test]
fn they_follow_pods_to_their_cgroup() {
    let stage = Stage::open("dns-moved", often).unwrap();
    let root = stage.node.lab.cgroup().to_owned();
    let pod = stage.pod("a", &json!({}), &json!({})).unwrap();
    let place = || stage.node.show(&pod).unwrap()["dns"]["cgroup"].clone();
    // There is no process of a pod yet.
    assert_eq!(place(), root.to_str().unwrap());
    let kubepods = root.join("kubepods");
    std::fs::create_dir(&kubepods).unwrap();
    std::fs::write(kubepods.join("cgroup.type"), "threaded").unwrap();
    let answer = pod.run(|| {
        let tid = nix::unistd::gettid().to_string();
        std::fs::write(kubepods.join("cgroup.threads"), &tid).unwrap();
        eventually("they are where pods are", || {
            Ok(place() == kubepods.to_str().unwrap())
        })
        .unwrap();
        let answer = ask_here(stage.resolver.addr(), "mesh.test");
        std::fs::write(root.join("cgroup.threads"), &tid).unwrap();
        answer
    });
    assert_eq!(answer.unwrap(), BY_ZTUNNEL);
    std::fs::remove_dir(&kubepods).unwrap();
    // And back, when it is gone with its pods.
    eventually("they are where pods are", || {
        Ok(ask(&pod, stage.resolver.addr(), "mesh.test")? == BY_ZTUNNEL)
    })
    .unwrap();
}

#[test]
fn a_place_that_is_gone_stops_neither_the_agent_nor_other_pods() {
    let scratch = culvert_lab::Lab::new("dns-gone-place").unwrap();
    let named = scratch.cgroup().join("pods");
    std::fs::create_dir(&named).unwrap();
    let place = format!("--dns-cgroup={}", named.display());
    let mut stage = Stage::open("dns-gone", |options| often(options).arg(&place)).unwrap();
    let before = stage.pod("a", &json!({}), &json!({})).unwrap();
    let without = json!({ANNOTATION: "false"});
    stage.node.agent.take().unwrap().kill().unwrap();
    std::fs::remove_dir(&named).unwrap();
    stage.node.start_agent().unwrap();
    // Nobody's lookups are captured, and it says why.
    let resolver = stage.resolver.addr();
    assert_eq!(ask(&before, resolver, "mesh.test").unwrap(), BY_RESOLVER);
    eventually("the status names the place", || {
        Ok(attention(&stage)?.contains(named.to_str().unwrap()))
    })
    .unwrap();
    // All else goes on, for pods from before and for new ones.
    stage.node.expect_state(&before, "enrolled").unwrap();
    let after = stage.pod("b", &without, &json!({})).unwrap();
    let outside = stage.node.lab.outside().unwrap();
    let server = Server::echo(&outside, outside.at(Family::V4, 8080).unwrap()).unwrap();
    for pod in [&before, &after] {
        let carried = || {
            let ztunnel = stage.node.ztunnel().unwrap();
            ztunnel.pod_stats(pod.name()).unwrap()["outbound_accepts"].as_u64()
        };
        let through = carried();
        let stream = culvert_lab::connect(pod, server.addr(), culvert_e2e::LONG).unwrap();
        roundtrip(&stream, b"through").unwrap();
        assert_eq!(carried(), through.map(|count| count + 1));
    }
    // By hand, too; but who asks for capture of lookups is told.
    let path = after.path().display().to_string();
    let culvert = |args: &[&str]| {
        let place = ["--dns-cgroup", named.to_str().unwrap()];
        let lab = &stage.node.lab;
        lab.culvert(&[place.as_slice(), args].concat()).unwrap()
    };
    let load = culvert(&["-o", "json", "load"]);
    let load = load.ok().unwrap().json().unwrap();
    let problem = load["dns_problem"].as_str().unwrap();
    assert!(problem.contains(named.to_str().unwrap()), "{problem}");
    let attach = ["netns", "attach", "--netns", &path];
    culvert(&attach).ok().unwrap();
    let refused = culvert(&[attach.as_slice(), &["--dns"]].concat());
    assert!(!refused.status.success(), "{}", refused.stdout);
    let said = &refused.stderr;
    assert!(said.contains(named.to_str().unwrap()), "{said}");
    // It needs nobody to go on from there.
    std::fs::create_dir(&named).unwrap();
    eventually("nothing is wrong any more", || {
        Ok(attention(&stage)?.is_empty())
    })
    .unwrap();
}
