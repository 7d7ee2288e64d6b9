//! `ipv6 = false`: pods are enrolled with IPv4 alone, what goes by IPv6 is as it would be without us, and the switch can be
//! turned under living pods.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use culvert_e2e::{LONG, eventually, governed::Governed, traffic::talk};
use culvert_lab::{Family, Lab, Ns, Server, connect, roundtrip};
use serde_json::json;

struct Stage {
    node: Governed,
    pod: Ns,
    outside: Ns,
    /// In the pod and outside of it, one of each family.
    inner: [Server; 2],
    outer: [Server; 2],
}

fn both(ns: &Ns) -> Result<[Server; 2]> {
    let [v4, v6] = Family::BOTH;
    Ok([
        Server::echo(ns, ns.at(v4, 0)?)?,
        Server::echo(ns, ns.at(v6, 0)?)?,
    ])
}

impl Stage {
    fn open(name: &str) -> Result<Self> {
        let node = Governed::with(name, |options| options.arg("--ipv6=false"))?;
        let pod = node.pod("a")?;
        let outside = node.lab.outside()?;
        node.label(Some("ambient"))?;
        node.expect_state(&pod, "enrolled")?;
        Ok(Self {
            inner: both(&pod)?,
            outer: both(&outside)?,
            node,
            pod,
            outside,
        })
    }

    /// Connections that ztunnel took from the pod, and for it, while both ends talked by this family.
    fn taken(&self, family: Family) -> Result<(u64, u64)> {
        let counts = || -> Result<(u64, u64)> {
            Ok((
                self.node.stat(&self.pod, "outbound_accepts")?,
                self.node.stat(&self.pod, "inbound_accepts")?,
            ))
        };
        let at = usize::from(family == Family::V6);
        let before = counts()?;
        talk(&self.pod, self.outer[at].addr())?;
        talk(&self.outside, self.inner[at].addr())?;
        // To itself, in both ways.
        talk(&self.pod, self.inner[at].addr())?;
        let after = counts()?;
        Ok((after.0 - before.0, after.1 - before.1))
    }

    fn restart(&mut self, args: &[&str]) -> Result<()> {
        let arg = |options: culvert_lab::AgentOptions, arg: &&str| options.arg(arg);
        let options = args.iter().fold(fresh(&self.node.lab), arg);
        self.node.agent()?.stop()?;
        self.node.options = options;
        self.node.start_agent()?;
        self.node.expect_state(&self.pod, "enrolled")
    }

    fn is_ipv4_only(&self, only: bool) -> Result<()> {
        eventually("the pod is whole, as it should be now", || {
            let shown = self.node.show(&self.pod)?;
            Ok(shown["whole"] == true && shown["policy"]["ipv4_only"] == only)
        })
    }
}

/// Options without the switch, for the same place.
fn fresh(lab: &Lab) -> culvert_lab::AgentOptions {
    culvert_lab::AgentOptions::new(lab)
}

#[test]
fn what_goes_by_ipv6_is_left_alone() -> Result<()> {
    let stage = Stage::open("ipv4-only")?;
    stage.is_ipv4_only(true)?;
    ensure!(stage.taken(Family::V4)? == (1, 1), "IPv4 is not captured");
    ensure!(stage.taken(Family::V6)? == (0, 0), "IPv6 is captured");
    let v6 = stage.pod.rules(Family::V6)?;
    ensure!(
        v6.len() == 2,
        "more IPv6 rules than the kernel's own: {v6:#?}"
    );
    // What an IPv6 socket says to an IPv4 address goes by IPv4.
    let mapped = |to: SocketAddr| -> Result<SocketAddr> {
        let IpAddr::V4(ip) = to.ip() else {
            anyhow::bail!("{to} is not IPv4");
        };
        Ok(SocketAddr::new(ip.to_ipv6_mapped().into(), to.port()))
    };
    let before = stage.node.stat(&stage.pod, "outbound_accepts")?;
    talk(&stage.pod, mapped(stage.outer[0].addr())?)?;
    ensure!(stage.node.stat(&stage.pod, "outbound_accepts")? == before + 1);
    // It stays so when something changes.
    stage
        .pod
        .add_addr("eth0", "fd77::4711/64".parse().context("a network")?)?;
    stage.is_ipv4_only(true)?;
    ensure!(stage.taken(Family::V6)? == (0, 0), "IPv6 is captured");
    ensure!(stage.pod.rules(Family::V6)?.len() == 2);
    Ok(())
}

#[test]
fn the_switch_is_turned_under_a_living_pod() -> Result<()> {
    let mut stage = Stage::open("ipv4-switch")?;
    let direct = connect(&stage.pod, stage.outer[1].addr(), LONG)?;
    roundtrip(&direct, b"before")?;
    stage.restart(&[])?;
    stage.is_ipv4_only(false)?;
    ensure!(stage.taken(Family::V6)? == (1, 1), "IPv6 is not captured");
    roundtrip(&direct, b"still direct")?;
    let carried = connect(&stage.pod, stage.outer[1].addr(), LONG)?;
    roundtrip(&carried, b"by ztunnel")?;
    stage.restart(&["--ipv6=false"])?;
    stage.is_ipv4_only(true)?;
    ensure!(stage.taken(Family::V6)? == (0, 0), "IPv6 is captured");
    ensure!(stage.taken(Family::V4)? == (1, 1), "IPv4 is not captured");
    roundtrip(&carried, b"still by ztunnel")?;
    roundtrip(&direct, b"still direct")?;
    // And nothing of it stays.
    stage.node.options.pod(
        &stage.pod,
        &json!({"istio.io/dataplane-mode": "none"}),
        &json!({}),
    )?;
    drop((carried, direct));
    stage.node.expect_state(&stage.pod, "none")?;
    ensure!(stage.pod.rules(Family::V6)?.len() == 2);
    Ok(())
}
