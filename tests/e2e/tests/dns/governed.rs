//! Lookups of pods that an agent looks after: what annotations, a pod's `dnsConfig` and its `resolv.conf` say.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;

use anyhow::{Context as _, Result};
use culvert_e2e::dns::{Resolver, ask, ask_connected, ask_tcp};
use culvert_e2e::eventually;
use culvert_e2e::governed::Governed;
use culvert_lab::{AgentOptions, Child, Family, Ns};
use serde_json::{Value, json};

use crate::{BY_OTHER, BY_RESOLVER, BY_ZTUNNEL};

pub(crate) const ANNOTATION: &str = "ambient.istio.io/dns-capture";
/// Where node-local DNS caches listen.
const NODE_LOCAL: Ipv4Addr = Ipv4Addr::new(169, 254, 20, 10);

pub(crate) struct Stage {
    pub(crate) node: Governed,
    pub(crate) resolver: Resolver,
    /// One that ztunnel never asks.
    other: Resolver,
}

impl Stage {
    pub(crate) fn open(
        name: &str,
        change: impl FnOnce(AgentOptions) -> AgentOptions,
    ) -> Result<Self> {
        let mut node = Governed::unserved(name, change)?;
        let outside = node.lab.outside()?;
        let resolver = Resolver::start(&outside, outside.ip(Family::V4)?, BY_RESOLVER)?;
        let gateway = node.lab.node();
        let other = Resolver::start(gateway, gateway.ip(Family::V4)?, BY_OTHER)?;
        for (key, value) in [
            ("--dns-name", format!("mesh.test={BY_ZTUNNEL}")),
            ("--dns-upstream", resolver.addr().to_string()),
        ] {
            node.peers = node.peers.clone().arg(key).arg(&value);
        }
        node.start_ztunnel()?;
        node.label(Some("ambient"))?;
        Ok(Self {
            node,
            resolver,
            other,
        })
    }

    pub(crate) fn pod(&self, name: &str, annotations: &Value, spec: &Value) -> Result<Ns> {
        let pod = self.node.lab.pod(name)?;
        self.node
            .options
            .pod_of(&pod, &json!({}), annotations, spec)?;
        self.node.expect_state(&pod, "enrolled")?;
        Ok(pod)
    }

    /// Waits until a lookup that asks there is answered by him.
    fn expect(&self, pod: &Ns, asked: SocketAddr, by: Ipv4Addr) {
        eventually(&format!("{by} answers who asks {asked}"), || {
            Ok(ask(pod, asked, "mesh.test")? == by)
        })
        .unwrap();
    }

    fn expect_resolvers(&self, pod: &Ns, resolvers: &[IpAddr]) {
        let wanted = json!(resolvers);
        eventually(&format!("lookups that ask {wanted} are captured"), || {
            Ok(self.node.show(pod)?["policy"]["dns_resolvers"] == wanted)
        })
        .unwrap();
    }
}

#[test]
fn an_annotation_switches_capture_under_a_living_pod() {
    let stage = Stage::open("dns-annotation", |options| options).unwrap();
    // On by default.
    let pod = stage.pod("a", &json!({}), &json!({})).unwrap();
    let resolver = stage.resolver.addr();
    stage.expect(&pod, resolver, BY_ZTUNNEL);
    for (says, by) in [("false", BY_RESOLVER), ("true", BY_ZTUNNEL)] {
        let annotations = json!({ ANNOTATION: says });
        stage
            .node
            .options
            .pod(&pod, &json!({}), &annotations)
            .unwrap();
        stage.expect(&pod, resolver, by);
    }
}

#[test]
fn an_annotation_beats_a_node_where_capture_is_off() {
    let off = |options: AgentOptions| options.arg("--dns-capture=false");
    let stage = Stage::open("dns-off", off).unwrap();
    let without = stage.pod("a", &json!({}), &json!({})).unwrap();
    let with = stage
        .pod("b", &json!({ANNOTATION: "true"}), &json!({}))
        .unwrap();
    let resolver = stage.resolver.addr();
    stage.expect(&with, resolver, BY_ZTUNNEL);
    stage.expect(&without, resolver, BY_RESOLVER);
}

fn polite(options: AgentOptions) -> AgentOptions {
    options.arg("--dns-scope=resolv-conf")
}

#[test]
fn a_pod_with_dns_config_alone_asks_its_node_local_resolver() {
    let stage = Stage::open("dns-config", polite).unwrap();
    let gateway = stage.node.lab.node();
    gateway
        .add_addr("lo", format!("{NODE_LOCAL}/32").parse().unwrap())
        .unwrap();
    let local = Resolver::start(gateway, NODE_LOCAL.into(), BY_OTHER).unwrap();
    let spec = json!({"dnsPolicy": "None", "dnsConfig": {"nameservers": [NODE_LOCAL]}});
    let pod = stage.pod("a", &json!({}), &spec).unwrap();
    // No process of the pod has run yet.
    stage.expect_resolvers(&pod, &[NODE_LOCAL.into()]);
    stage.expect(&pod, local.addr(), BY_ZTUNNEL);
    stage.expect(&pod, stage.resolver.addr(), BY_RESOLVER);
    let off = json!({ANNOTATION: "false"});
    stage
        .node
        .options
        .pod_of(&pod, &json!({}), &off, &spec)
        .unwrap();
    stage.expect(&pod, local.addr(), BY_OTHER);
}

#[expect(clippy::disallowed_methods, reason = "tests run real programs")]
fn living(pod: &Ns, resolv_conf: &Path) -> Result<Child> {
    let mut command = std::process::Command::new("unshare");
    let script = "mount --bind \"$1\" /etc/resolv.conf && echo mounted && exec sleep 600";
    command
        .args(["--mount", "sh", "-c", script, "sh"])
        .arg(resolv_conf);
    let child = pod.spawn(command)?;
    child
        .wait_for_output("mounted", culvert_e2e::LONG)
        .context("a process with its own resolv.conf")?;
    Ok(child)
}

#[test]
fn changes_of_resolv_conf_are_followed() {
    let stage = Stage::open("dns-changed", |options| {
        polite(options).arg("--reconcile-period=1s")
    })
    .unwrap();
    let file = stage.node.lab.scratch().join("resolv.conf");
    let name = |resolver: SocketAddr| {
        // As kubelets and programs do it: the same file with other content, since it is mounted.
        std::fs::write(&file, format!("nameserver {}\n", resolver.ip())).unwrap();
    };
    let (first, second) = (stage.resolver.addr(), stage.other.addr());
    name(first);
    let pod = stage.pod("a", &json!({}), &json!({})).unwrap();
    let _living = living(&pod, &file).unwrap();
    stage.expect_resolvers(&pod, &[first.ip()]);
    stage.expect(&pod, first, BY_ZTUNNEL);
    stage.expect(&pod, second, BY_OTHER);
    name(second);
    stage.expect_resolvers(&pod, &[second.ip()]);
    stage.expect(&pod, second, BY_ZTUNNEL);
    stage.expect(&pod, first, BY_RESOLVER);
}

#[test]
fn an_agent_that_is_away_changes_nothing() {
    let mut stage = Stage::open("dns-agentless", |options| options).unwrap();
    let pod = stage.pod("a", &json!({}), &json!({})).unwrap();
    let resolver = stage.resolver.addr();
    stage.expect(&pod, resolver, BY_ZTUNNEL);
    stage.node.agent.take().unwrap().kill().unwrap();
    for _ in 0..20 {
        assert_eq!(ask(&pod, resolver, "mesh.test").unwrap(), BY_ZTUNNEL);
        assert_eq!(ask(&pod, resolver, "else.test").unwrap(), BY_RESOLVER);
    }
    stage.node.start_agent().unwrap();
    stage.node.expect_state(&pod, "enrolled").unwrap();
    assert_eq!(ask(&pod, resolver, "mesh.test").unwrap(), BY_ZTUNNEL);
}

#[test]
fn with_ipv6_off_its_lookups_are_left_alone() {
    let stage = Stage::open("dns-ipv6-off", |options| options.arg("--ipv6=false")).unwrap();
    let pod = stage.pod("a", &json!({}), &json!({})).unwrap();
    stage.expect(&pod, stage.resolver.addr(), BY_ZTUNNEL);
    let outside = stage.node.lab.outside().unwrap();
    let v6 = Resolver::start(&outside, outside.ip(Family::V6).unwrap(), BY_RESOLVER).unwrap();
    for asking in [ask, ask_connected, ask_tcp] {
        assert_eq!(asking(&pod, v6.addr(), "mesh.test").unwrap(), BY_RESOLVER);
    }
    let counters = &stage.node.show(&pod).unwrap()["counters"];
    assert_eq!(counters["dns_left_udp6"], 2);
    assert_eq!(counters["to_dns_udp6"], 0);
}
