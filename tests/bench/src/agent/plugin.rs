//! The plugin as a container runtime runs it: a process for each call, the configuration on its stdin. Here is what a
//! call takes, from before the process is made until it has been waited for.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use culvert_cni::api::{LogRecord, Timings};
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

    /// Where the time of the last ADD went, as the plugin wrote it down after its answer: asking the agent would be work
    /// beside the next call.
    pub(super) fn timings(&self) -> Result<Timings> {
        const LONGEST_LINE: u64 = 8 << 10;
        let reading = || format!("reading {}", self.log.display());
        let mut file = File::open(&self.log).with_context(reading)?;
        let size = file.metadata()?.len();
        file.seek(SeekFrom::Start(size.saturating_sub(LONGEST_LINE)))?;
        let mut text = String::new();
        file.read_to_string(&mut text).with_context(reading)?;
        let last = text.lines().last().context("the plugin's log is empty")?;
        let record: LogRecord = serde_json::from_str(last).with_context(reading)?;
        record
            .timings
            .with_context(|| format!("no timings in the plugin's log: {last}"))
    }

    /// A process of the plugin that asks nobody: what any call takes.
    pub(super) fn version(&self) -> Result<Duration> {
        let binary = self.binary.clone();
        self.worker.call(move || {
            let mut process = process(&binary);
            process.env("CNI_COMMAND", "VERSION");
            timed(process, "{\"cniVersion\": \"1.0.0\"}")
        })?
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
fn process(binary: &Path) -> Command {
    let mut process = Command::new(binary);
    process.env_clear();
    process
}

fn call(binary: &Path, command: &'static str, sandbox: &Sandbox, config: &str) -> Result<Duration> {
    let Sandbox {
        name,
        namespace,
        netns,
        ..
    } = sandbox;
    let mut process = process(binary);
    process
        .env("CNI_COMMAND", command)
        .env("CNI_CONTAINERID", format!("sandbox-{name}"))
        .env("CNI_IFNAME", "eth0")
        .env("CNI_PATH", "/opt/cni/bin")
        .env("CNI_NETNS", netns)
        .env(
            "CNI_ARGS",
            format!("IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name};K8S_POD_UID={name};K8S_POD_INFRA_CONTAINER_ID=sandbox-{name}"),
        );
    timed(process, config)
}

/// From before the process is made until it has been waited for.
fn timed(mut process: Command, config: &str) -> Result<Duration> {
    use std::io::Write as _;
    process
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let started = Instant::now();
    let mut child = process.spawn().context("starting the plugin")?;
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
