//! A node for the benchmark of the agent: the real agent with its manifests, the stand-in ztunnel, a process that passes
//! for the kubelet, and pods that are network namespaces. It times nothing and judges nothing.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use culvert_cni::decisions::Decisions;
use culvert_e2e::{LONG, bpf};
use culvert_lab::{
    Agent, AgentOptions, Child, Family, Lab, Ns, Server, Ztunnel, ZtunnelOptions, connect,
    roundtrip,
};
use serde_json::{Value, json};

use crate::interrupt;

/// How long anything may take before it is given up.
const PATIENCE: Duration = Duration::from_secs(120);
/// How often the agent is asked how far it is. Asking costs it time as well.
const LOOK: Duration = Duration::from_millis(20);

/// The node. Its fields are dropped in this order: who uses namespaces goes before them.
pub(super) struct Site {
    pub(super) agent: Agent,
    pub(super) ztunnel: Ztunnel,
    _kubelet: Child,
    pub(super) options: AgentOptions,
    pub(super) lab: Lab,
}

impl Site {
    /// A node with so many namespaces, none of them in the mesh, and no pod.
    pub(super) fn new(namespaces: usize) -> Result<Self> {
        let lab = Lab::new("bench-agent")?;
        let options = AgentOptions::new(&lab);
        let many: Vec<Value> = (0..namespaces)
            .map(|i| namespace(&format!("other-{i}"), None))
            .collect();
        options.write(
            "namespaces",
            &json!({"apiVersion": "v1", "kind": "List", "items": many}),
        )?;
        let kubelet = kubelet(&lab)?;
        let agent = options.start(&lab)?;
        let ztunnel = Ztunnel::launch_at(&lab, &options.zds(), &ZtunnelOptions::new())?;
        let site = Self {
            agent,
            ztunnel,
            _kubelet: kubelet,
            options,
            lab,
        };
        site.until("ztunnel has had its snapshot", || {
            let status = site.agent.status()?;
            Ok(status["ztunnels"][0]["snapshot_sent"] == true)
        })?;
        site.knows_namespace(&format!("other-{}", namespaces.saturating_sub(1)))?;
        Ok(site)
    }

    /// Waits until the agent has read the manifest of a namespace, and with it all written before.
    pub(super) fn knows_namespace(&self, name: &str) -> Result<()> {
        let path = self.options.decisions();
        self.until(&format!("the agent knows namespace {name}"), || {
            Ok(Decisions::read(&path).is_ok_and(|d| d.namespaces.contains_key(name)))
        })
    }

    /// Asks until it holds.
    pub(super) fn until(&self, what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
        let started = Instant::now();
        while !holds()? {
            interrupt::check()?;
            if let Some(status) = self.agent.process().status() {
                anyhow::bail!(
                    "the agent ended with {status}:\n{}",
                    self.agent.process().stderr()
                );
            }
            ensure!(
                started.elapsed() < PATIENCE,
                "{what}: not within {PATIENCE:?}"
            );
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    /// How many pods the agent calls enrolled, of how many it speaks of.
    pub(super) fn enrolled(&self) -> Result<(usize, usize)> {
        let status = self.agent.status()?;
        let pods = status["pods"].as_array().context("no pods in the status")?;
        let enrolled = pods.iter().filter(|p| p["state"] == "enrolled").count();
        Ok((enrolled, pods.len()))
    }

    /// How many pods the kernel captures, by its own map.
    pub(super) fn captured(&self) -> Result<usize> {
        bpf::Map::pinned(&self.lab.bpffs().join("maps/PODS"))?
            .keys()
            .map(|keys| keys.len())
    }

    /// How many pods ztunnel serves, by its own account.
    pub(super) fn served(&self) -> Result<usize> {
        let stats = self.ztunnel.stats()?;
        Ok(stats["pods"].as_array().map_or(0, Vec::len))
    }

    /// Whether a connection from one pod to another goes through ztunnel, counted by ztunnel.
    pub(super) fn through_ztunnel(&self, from: &Ns, to: &Ns) -> Result<bool> {
        // Nobody serves a pod that is not in the mesh.
        let accepts = || -> Result<u64> {
            let stats = self.ztunnel.stats()?;
            let pods = stats["pods"].as_array().context("no pods in the stats")?;
            let pod = pods.iter().find(|p| p["uid"] == from.name());
            Ok(pod
                .and_then(|p| p["outbound_accepts"].as_u64())
                .unwrap_or(0))
        };
        let server = Server::echo(to, to.at(Family::V4, 0)?)?;
        let before = accepts()?;
        let stream = connect(from, server.addr(), LONG)?;
        ensure!(
            roundtrip(&stream, b"a word")? == b"a word",
            "another answer"
        );
        Ok(accepts()? > before)
    }
}

impl Site {
    /// Bytes of the agent's heap that are in use, by its own account; none where its allocator does not count.
    pub(super) fn heap_in_use(&self) -> Result<Option<f64>> {
        let ask = || -> Result<String> {
            let mut stream = TcpStream::connect(("127.0.0.1", 15014))?;
            stream.set_read_timeout(Some(LONG))?;
            stream
                .write_all(b"GET /metrics HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n")?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text)
        };
        let text = self
            .lab
            .node()
            .run(ask)
            .context("asking the agent for metrics")?;
        let mut lines = text.lines();
        let value = lines.find_map(|line| line.strip_prefix("culvert_heap_in_use_bytes "));
        Ok(value.and_then(|v| v.trim().parse().ok()))
    }
}

/// A Namespace's manifest.
pub(super) fn namespace(name: &str, mode: Option<&str>) -> Value {
    let mut labels = json!({"kubernetes.io/metadata.name": name, "team": "bench"});
    if let Some(mode) = mode {
        labels["istio.io/dataplane-mode"] = json!(mode);
    }
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
}

/// A Pod's manifest as the API has it before its sandbox is there (`ip` false) and once it runs. Its UID is its name.
pub(super) fn pod(name: &str, namespace: &str, running: Option<&Ns>) -> Value {
    let addresses: Vec<Value> = running.map_or_else(Vec::new, |ns| {
        let known = Family::BOTH.iter().filter_map(|f| ns.ip(*f).ok());
        known.map(|ip| json!({"ip": ip})).collect()
    });
    let phase = if running.is_some() {
        "Running"
    } else {
        "Pending"
    };
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": name, "namespace": namespace, "uid": name,
            "labels": {"app": "bench", "pod-template-hash": "5d8f7c9b6"},
        },
        "spec": {"serviceAccountName": "bench"},
        "status": {"phase": phase, "podIPs": addresses},
    })
}

/// Without one the agent would look for it again and again, which no real node makes it do.
#[expect(
    clippy::disallowed_methods,
    reason = "something has to be called kubelet"
)]
fn kubelet(lab: &Lab) -> Result<Child> {
    let program = lab.scratch().join("kubelet");
    fs::copy("/bin/sleep", &program).with_context(|| format!("making {}", program.display()))?;
    let mut command = Command::new(&program);
    command.arg("infinity");
    lab.node().spawn(command)
}
