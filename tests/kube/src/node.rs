//! A node under a real agent that hears of its pods from a real API server: namespaces, processes in cgroups as a
//! container runtime makes them, the stand-in ztunnel.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use culvert_lab::{Child, CulvertOutput, Family, Lab, Ns, Ztunnel, ZtunnelOptions};
use serde_json::{Value, json};

use crate::{Bed, LONG, NODE, relay::Relay};

/// The node.
pub struct Node {
    agent: Option<Child>,
    ztunnel: Option<Ztunnel>,
    /// Containers of pods, and cgroups that were made for them.
    processes: Vec<Child>,
    cgroups: Vec<PathBuf>,
    kubeconfig: PathBuf,
    _relay: Relay,
    /// Where pods' namespaces come from.
    pub lab: Lab,
}

impl Drop for Node {
    fn drop(&mut self) {
        drop(self.agent.take());
        for process in &self.processes {
            let _gone = process.kill();
        }
        for dir in self.cgroups.iter().rev() {
            // The kernel lets go of a cgroup a little after its last process.
            let started = Instant::now();
            while fs::remove_dir(dir).is_err() && started.elapsed() < LONG && dir.exists() {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

impl Node {
    /// A node without agent and ztunnel.
    pub fn new(name: &str, bed: &Bed) -> Result<Self> {
        let lab = Lab::new(name)?;
        let relay = Relay::start(lab.node(), bed)?;
        let kubeconfig = relay.kubeconfig(bed, lab.scratch())?;
        Ok(Self {
            agent: None,
            ztunnel: None,
            processes: Vec::new(),
            cgroups: Vec::new(),
            kubeconfig,
            _relay: relay,
            lab,
        })
    }

    fn at(&self, name: &str) -> String {
        self.lab.scratch().join(name).display().to_string()
    }

    /// Starts the agent, and does not wait.
    pub fn start_agent(&mut self, more: &[&str]) -> Result<&Child> {
        let (kubeconfig, run) = (self.kubeconfig.display().to_string(), self.at("run"));
        let (decisions, zds) = (self.at("decisions.json"), self.at("z.sock"));
        let args = [
            "agent",
            "--node-name",
            NODE,
            "--kubeconfig",
            &kubeconfig,
            "--run-dir",
            &run,
            "--decision-file",
            &decisions,
            "--zds-socket",
            &zds,
            "--metrics-address",
            "127.0.0.1:15014",
            "--health-address",
            "127.0.0.1:8000",
            "--cni-install=false",
            "--dns-capture=false",
            "--probe-source",
            "none",
        ];
        let agent = self.lab.culvert_spawn(&[&args[..], more].concat())?;
        Ok(self.agent.insert(agent))
    }

    /// Starts a ztunnel that the agent tells of pods.
    pub fn start_ztunnel(&mut self) -> Result<()> {
        let zds = PathBuf::from(self.at("z.sock"));
        let ztunnel = Ztunnel::launch_at(&self.lab, &zds, &ZtunnelOptions::new())?;
        self.ztunnel = Some(ztunnel);
        Ok(())
    }

    /// Ends the agent.
    pub fn stop_agent(&mut self) -> Result<()> {
        if let Some(agent) = self.agent.take() {
            agent.term()?;
            agent.wait(LONG)?;
        }
        Ok(())
    }

    /// What the agent wrote.
    #[must_use]
    pub fn log(&self) -> String {
        self.agent.as_ref().map(Child::stderr).unwrap_or_default()
    }

    /// A container of a pod: a process in its namespace, in a cgroup as the kubelet names it.
    pub fn container(&mut self, uid: &str, container: &str, ns: &Ns) -> Result<()> {
        #[expect(
            clippy::disallowed_methods,
            reason = "pods are processes that tests start"
        )]
        let mut command = Command::new("sleep");
        command.arg("600");
        let process = ns.spawn(command)?;
        let mut dir = self.lab.cgroup().to_path_buf();
        for part in ["kubepods", "burstable", &format!("pod{uid}"), container] {
            dir.push(part);
            if !dir.exists() {
                fs::create_dir(&dir)?;
                fs::write(dir.join("cgroup.type"), "threaded")?;
                self.cgroups.push(dir.clone());
            }
        }
        fs::write(dir.join("cgroup.procs"), process.pid().to_string())?;
        self.processes.push(process);
        Ok(())
    }

    /// Ends all containers so far that were started for this pod.
    pub fn end_containers(&mut self, uid: &str) -> Result<()> {
        let name = format!("pod{uid}");
        let of_pod = |process: &&Child| {
            let status = fs::read_to_string(format!("/proc/{}/cgroup", process.pid()));
            status.is_ok_and(|text| text.contains(&name))
        };
        for process in self.processes.iter().filter(of_pod) {
            process.kill()?;
        }
        Ok(())
    }

    /// `culvert preflight`, of the host and of the cluster as the agent sees it.
    pub fn preflight(&self) -> Result<CulvertOutput> {
        let kubeconfig = self.kubeconfig.display().to_string();
        let (namespace, _) = crate::HOME;
        self.lab.culvert(&[
            "preflight",
            "--kubeconfig",
            &kubeconfig,
            "--namespace",
            namespace,
        ])
    }

    /// `culvert status`.
    pub fn status(&self, more: &[&str]) -> Result<CulvertOutput> {
        let socket = self.at("run/agent.sock");
        self.lab
            .culvert(&[more, &["status", "--agent-socket", &socket]].concat())
    }

    /// What the agent says of a pod; null for none.
    pub fn pod(&self, namespace: &str, name: &str) -> Result<Value> {
        let report = self.status(&["-o", "json"])?.json()?;
        let pods = report["pods"].as_array().cloned().unwrap_or_default();
        let found = pods
            .into_iter()
            .find(|p| p["namespace"] == namespace && p["name"] == name);
        Ok(found.unwrap_or(Value::Null))
    }

    /// How a task of the agent's readiness stands.
    pub fn task(&self, name: &str) -> Result<Value> {
        let report = self.status(&["-o", "json"])?.json()?;
        let tasks = report["readiness"]["tasks"].as_array().cloned();
        let found = tasks
            .unwrap_or_default()
            .into_iter()
            .find(|t| t["name"] == name);
        Ok(found.unwrap_or(Value::Null))
    }

    /// What a page of the agent's says.
    pub fn page(&self, port: u16, path: &str) -> Result<String> {
        Ok(self.lab.node().run(|| -> std::io::Result<String> {
            let mut stream = TcpStream::connect(("127.0.0.1", port))?;
            write!(
                stream,
                "GET {path} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n"
            )?;
            let mut text = String::new();
            stream.read_to_string(&mut text).map(|_| text)
        })?)
    }

    /// One of the agent's metrics, by the whole name of its series.
    pub fn metric(&self, series: &str) -> Result<f64> {
        let text = self.page(15014, "/metrics")?;
        let mut lines = text.lines().filter_map(|l| l.strip_prefix(series));
        let value = lines.find_map(|l| l.strip_prefix(' '));
        let value = value.with_context(|| format!("no metric {series}"))?;
        value.parse().context("its value")
    }

    /// Whether the kernel captures what is in this namespace, and it is whole.
    pub fn whole(&self, ns: &Ns) -> Result<bool> {
        let path = ns.path().display().to_string();
        let shown = self
            .lab
            .culvert(&["-o", "json", "netns", "show", "--netns", &path])?;
        Ok(shown.json().is_ok_and(|v| v["whole"] == true))
    }

    /// Waits for something the agent does.
    pub fn until(&self, what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
        let started = Instant::now();
        // The agent may not answer yet.
        while !holds().unwrap_or(false) {
            ensure!(
                started.elapsed() < LONG,
                "{what}: not within {LONG:?}; the agent says:\n{}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Waits until the agent says so of a pod.
    pub fn until_state(&self, namespace: &str, name: &str, state: &str) -> Result<()> {
        self.until(&format!("{name} is {state}"), || {
            Ok(self.pod(namespace, name)?["state"] == state)
        })
    }
}

/// A pod's status with these addresses, as its kubelet writes it.
pub fn running(ns: &Ns) -> Result<Value> {
    let (v4, v6) = (ns.ip(Family::V4)?, ns.ip(Family::V6)?);
    Ok(json!({"phase": "Running", "podIP": v4, "podIPs": [{"ip": v4}, {"ip": v6}]}))
}
