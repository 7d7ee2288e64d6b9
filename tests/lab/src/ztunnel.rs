//! The stand-in ztunnel as a process of the lab. Everything it does is its own business.

use std::io::Read;
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};

use crate::ns::Place;
use crate::pidns::Inside;
use crate::{Child, Creds, Family, Lab, Ns, PidNs, Zds, paths};

/// How long it may take until it has had its snapshot; emulated machines are slow.
const START: Duration = Duration::from_secs(20);

static SERIAL: AtomicU32 = AtomicU32::new(0);

/// Which peers a ztunnel reaches through HBONE, and how long it drains.
#[derive(Debug, Clone)]
pub struct ZtunnelOptions {
    workloads: Map<String, Value>,
    drain: u64,
    args: Vec<String>,
    pids: Option<Inside>,
}

impl Default for ZtunnelOptions {
    fn default() -> Self {
        Self {
            workloads: Map::new(),
            drain: 5,
            args: Vec::new(),
            pids: None,
        }
    }
}

impl ZtunnelOptions {
    /// No peer speaks HBONE, five seconds to drain.
    pub fn new() -> Self {
        Self::default()
    }

    /// A pod that was told with `Zds::add_pod` and is reached through HBONE, by all addresses it has.
    pub fn hbone(mut self, ns: &Ns) -> Self {
        for addr in Family::BOTH.iter().filter_map(|family| ns.ip(*family).ok()) {
            self = self.peer(addr, &Zds::identity(ns), true);
        }
        self
    }

    /// A peer's address and who answers there.
    pub fn peer(mut self, addr: IpAddr, identity: &str, hbone: bool) -> Self {
        self.workloads.insert(
            addr.to_string(),
            json!({ "identity": identity, "hbone": hbone }),
        );
        self
    }

    /// How many seconds connections may go on after SIGTERM.
    pub fn drain(mut self, seconds: u64) -> Self {
        self.drain = seconds;
        self
    }

    /// In this PID namespace.
    pub fn inside(mut self, pids: &PidNs) -> Self {
        self.pids = Some(pids.inside());
        self
    }

    /// A further argument of its command line.
    pub fn arg(mut self, arg: &str) -> Self {
        self.args.push(arg.to_owned());
        self
    }
}

/// A running stand-in ztunnel. Dropping it kills it.
#[derive(Debug)]
pub struct Ztunnel {
    child: Child,
    stats: PathBuf,
    workloads: PathBuf,
}

impl Ztunnel {
    /// Starts one in the node's namespace and waits until it has taken the snapshot.
    pub fn start(lab: &Lab, zds: &Zds, options: &ZtunnelOptions) -> Result<Self> {
        let ztunnel = Self::launch(lab, zds, options)?;
        let waited = zds.wait_for(ztunnel.pid(), START);
        waited
            .with_context(|| format!("starting ztunnel; it says:\n{}", ztunnel.child.stderr()))?;
        Ok(ztunnel)
    }

    /// Starts one and does not wait.
    pub fn launch(lab: &Lab, zds: &Zds, options: &ZtunnelOptions) -> Result<Self> {
        Self::launch_at(lab, zds.path(), options)
    }

    /// Starts one that looks for its node agent at a path, and does not wait.
    #[expect(
        clippy::disallowed_methods,
        reason = "the stand-in is a program of its own"
    )]
    pub fn launch_at(lab: &Lab, zds: &Path, options: &ZtunnelOptions) -> Result<Self> {
        let binary = standin_binary()?;
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let stats = lab.scratch().join(format!("ztunnel-{serial}.stats"));
        let workloads = lab.scratch().join(format!("ztunnel-{serial}.json"));
        write_workloads(&workloads, &options.workloads)?;
        let mut command = Command::new(binary);
        command
            .arg("--zds")
            .arg(zds)
            .arg("--stats")
            .arg(&stats)
            .arg("--workloads")
            .arg(&workloads);
        command.arg("--ca-dir").arg(ca_dir(lab)?);
        command
            .args(["--drain", &options.drain.to_string()])
            .args(&options.args);
        let child = Child::start(
            lab.node(),
            Place::Lab,
            options.pids.clone(),
            Creds::Root,
            command,
        )?;
        Ok(Self {
            child,
            stats,
            workloads,
        })
    }

    /// Its process number.
    pub fn pid(&self) -> u32 {
        self.child.pid()
    }

    /// The process.
    pub fn process(&self) -> &Child {
        &self.child
    }

    /// Asks it to drain and end (SIGTERM).
    pub fn term(&self) -> Result<()> {
        self.child.term()
    }

    /// Kills it and waits until it is gone.
    pub fn kill(&self) -> Result<()> {
        self.child.kill()
    }

    /// Gives it other peers; it reads the file again within a moment.
    pub fn set_peers(&self, options: &ZtunnelOptions) -> Result<()> {
        write_workloads(&self.workloads, &options.workloads)
    }

    /// What it counted: `{"pid": .., "pods": [{"uid": .., ..}]}`.
    pub fn stats(&self) -> Result<Value> {
        let ask = || -> Result<Value> {
            let mut stream = UnixStream::connect(&self.stats)?;
            stream.set_read_timeout(Some(START))?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(serde_json::from_str(&text)?)
        };
        ask().with_context(|| format!("asking ztunnel {} what it counted", self.pid()))
    }

    /// What it counted for one pod.
    pub fn pod_stats(&self, uid: &str) -> Result<Value> {
        let stats = self.stats()?;
        let pods = stats
            .get("pods")
            .and_then(Value::as_array)
            .map(Vec::as_slice)
            .unwrap_or_default();
        let pod = pods
            .iter()
            .find(|pod| pod.get("uid").and_then(Value::as_str) == Some(uid));
        pod.cloned()
            .with_context(|| format!("ztunnel {} serves no pod {uid}: {stats}", self.pid()))
    }
}

fn write_workloads(path: &PathBuf, workloads: &Map<String, Value>) -> Result<()> {
    // Renamed into place, so that it is never read half-written.
    let fresh = path.with_extension("fresh");
    std::fs::write(&fresh, serde_json::to_vec_pretty(workloads)?)
        .and_then(|()| std::fs::rename(&fresh, path))
        .with_context(|| format!("writing {}", path.display()))
}

/// The certificate authority that all ztunnels of a lab trust, made by the first of them.
#[expect(
    clippy::disallowed_methods,
    reason = "the stand-in makes its certificates itself"
)]
fn ca_dir(lab: &Lab) -> Result<PathBuf> {
    let dir = lab.scratch().join("ca");
    if !dir.exists() {
        let mut command = Command::new(standin_binary()?);
        command.args(["gen-ca", "--dir"]).arg(&dir);
        let output = command
            .output()
            .with_context(|| format!("running {command:?}"))?;
        let complaint = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "{command:?} failed ({}): {complaint}",
            output.status
        );
    }
    Ok(dir)
}

fn standin_binary() -> Result<PathBuf> {
    paths::binary(
        "ZTUNNEL_STANDIN_BIN",
        "ztunnel-standin",
        "cargo xtask build",
    )
}
