//! The plugin as a container runtime runs it: a process for each call, the configuration on its stdin. Here is what a
//! call takes, from before the process is made until it has been waited for.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use culvert_lab::{Ns, plugin_binary};
use serde_json::{Value, json};

use super::site::Site;
use crate::worker::Worker;

/// Name of the network.
const NETWORK: &str = "bench";

/// Runs the plugin on a site's node.
pub(super) struct Plugin {
    worker: Worker,
    binary: PathBuf,
    socket: PathBuf,
    decisions: PathBuf,
    log: PathBuf,
}

/// A pod as the runtime knows it.
#[derive(Debug, Clone)]
pub(super) struct Sandbox {
    pub(super) name: String,
    pub(super) namespace: String,
    netns: PathBuf,
    addresses: Vec<Value>,
}

impl Sandbox {
    pub(super) fn new(ns: &Ns, namespace: &str) -> Result<Self> {
        Ok(Self {
            name: ns.name().to_owned(),
            namespace: namespace.to_owned(),
            netns: ns.path().to_owned(),
            addresses: vec![
                json!({"address": format!("{}/16", ns.v4()?), "interface": 0}),
                json!({"address": format!("{}/64", ns.v6()?), "interface": 0}),
            ],
        })
    }
}

impl Plugin {
    pub(super) fn new(site: &Site) -> Result<Self> {
        Ok(Self {
            worker: Worker::start(site.lab.node())?,
            binary: plugin_binary()?,
            socket: site.options.socket(),
            decisions: site.options.decisions(),
            log: site.lab.scratch().join("plugin.log"),
        })
    }

    pub(super) fn add(&self, sandbox: &Sandbox) -> Result<Duration> {
        self.run("ADD", sandbox)
    }

    pub(super) fn del(&self, sandbox: &Sandbox) -> Result<Duration> {
        self.run("DEL", sandbox)
    }

    fn run(&self, command: &'static str, sandbox: &Sandbox) -> Result<Duration> {
        let config = json!({
            "cniVersion": "1.0.0", "name": NETWORK, "type": "culvert-cni",
            "socket": self.socket, "decisionFile": self.decisions, "logFile": self.log,
            "prevResult": {
                "cniVersion": "1.0.0",
                "interfaces": [{"name": "eth0", "sandbox": sandbox.netns}],
                "ips": sandbox.addresses,
            },
        });
        let (binary, sandbox) = (self.binary.clone(), sandbox.clone());
        let name = sandbox.name.clone();
        self.worker
            .call(move || call(&binary, command, &sandbox, &config.to_string()))?
            .with_context(|| format!("{command} of {name}"))
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "a runtime runs plugins; the agent starts no processes"
)]
fn call(
    binary: &PathBuf,
    command: &'static str,
    sandbox: &Sandbox,
    config: &str,
) -> Result<Duration> {
    use std::io::Write as _;
    let Sandbox {
        name,
        namespace,
        netns,
        ..
    } = sandbox;
    let mut process = Command::new(binary);
    process
        .env_clear()
        .env("CNI_COMMAND", command)
        .env("CNI_CONTAINERID", format!("sandbox-{name}"))
        .env("CNI_IFNAME", "eth0")
        .env("CNI_PATH", "/opt/cni/bin")
        .env("CNI_NETNS", netns)
        .env(
            "CNI_ARGS",
            format!("IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name};K8S_POD_UID={name};K8S_POD_INFRA_CONTAINER_ID=sandbox-{name}"),
        )
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let started = Instant::now();
    let mut child = process
        .spawn()
        .with_context(|| format!("starting {}", binary.display()))?;
    let mut pipe = child.stdin.take().context("stdin is a pipe")?;
    pipe.write_all(config.as_bytes())?;
    drop(pipe);
    let output = child.wait_with_output()?;
    let took = started.elapsed();
    ensure!(
        output.status.success(),
        "{}: {}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(took)
}
