//! `culvert agent --pods` as a process of the lab, and the manifests it reads. It asserts nothing about what it does.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use crate::ns::Place;
use crate::{Child, Creds, Family, Lab, Ns};

/// Kubernetes namespace of the lab's pods, as in `Zds::identity`.
const NAMESPACE: &str = "default";

/// How long it may take until it answers.
const START: Duration = Duration::from_secs(20);

/// A directory of manifests and the agent that follows it. Dropping it kills the agent; pods stay captured.
#[derive(Debug)]
pub struct Agent {
    process: Child,
    place: PathBuf,
}

/// Where an agent's files are, and how it is started.
#[derive(Debug, Clone)]
pub struct AgentOptions {
    place: PathBuf,
    args: Vec<String>,
    binary: Option<PathBuf>,
}

impl AgentOptions {
    /// The lab's agent, with no further arguments.
    pub fn new(lab: &Lab) -> Self {
        Self {
            place: lab.scratch().join("agent"),
            args: Vec::new(),
            binary: None,
        }
    }

    /// Another binary than the one that is tested; none for that one.
    pub fn binary(mut self, binary: Option<PathBuf>) -> Self {
        self.binary = binary;
        self
    }

    /// A further argument of its command line.
    pub fn arg(mut self, arg: &str) -> Self {
        self.args.push(arg.to_owned());
        self
    }

    /// Its ZDS socket.
    pub fn zds(&self) -> PathBuf {
        self.place.join("ztunnel.sock")
    }

    /// Its run directory.
    pub fn run_dir(&self) -> PathBuf {
        self.place.join("run")
    }

    /// The socket of the plugin and of `culvert status`.
    pub fn socket(&self) -> PathBuf {
        self.run_dir().join("agent.sock")
    }

    /// Its decision file.
    pub fn decisions(&self) -> PathBuf {
        self.place.join("decisions.json")
    }

    /// The manifests.
    pub fn manifests(&self) -> PathBuf {
        self.place.join("pods")
    }

    /// Writes a Namespace; `mode` is its label `istio.io/dataplane-mode`.
    pub fn namespace(&self, name: &str, mode: Option<&str>) -> Result<()> {
        let labels = mode.map_or_else(|| json!({}), |m| json!({"istio.io/dataplane-mode": m}));
        self.write(
            &format!("namespace-{name}"),
            &json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}),
        )
    }

    /// Writes a Pod for a namespace of the lab: in Kubernetes namespace `default`; UID and service account are
    /// its name.
    pub fn pod(&self, ns: &Ns, labels: &Value, annotations: &Value) -> Result<()> {
        self.pod_of(ns, labels, annotations, &json!({}))
    }

    /// The same with more in its spec.
    pub fn pod_of(&self, ns: &Ns, labels: &Value, annotations: &Value, spec: &Value) -> Result<()> {
        let addresses: Vec<Value> = Family::BOTH
            .iter()
            .filter_map(|f| ns.ip(*f).ok())
            .map(|ip| json!({"ip": ip}))
            .collect();
        let mut annotations = annotations.clone();
        annotations["culvert.dev/netns"] = json!(ns.path());
        let name = ns.name();
        let mut spec = spec.clone();
        spec["serviceAccountName"] = json!(name);
        self.write(
            &format!("pod-{name}"),
            &json!({
                "apiVersion": "v1", "kind": "Pod",
                "metadata": {"name": name, "namespace": NAMESPACE, "uid": name, "labels": labels, "annotations": annotations},
                "spec": spec,
                "status": {"phase": "Running", "podIPs": addresses},
            }),
        )
    }

    /// Writes a Pod that has neither sandbox nor address yet, as the API shows one that was just scheduled. UID and
    /// service account are its name.
    pub fn scheduled_pod(&self, namespace: &str, name: &str) -> Result<()> {
        self.write(
            &format!("pod-{name}"),
            &json!({
                "apiVersion": "v1", "kind": "Pod",
                "metadata": {"name": name, "namespace": namespace, "uid": name},
                "spec": {"serviceAccountName": name},
                "status": {"phase": "Pending"},
            }),
        )
    }

    /// Takes a Pod's manifest away.
    pub fn remove_pod(&self, ns: &Ns) -> Result<()> {
        self.remove_pod_named(ns.name())
    }

    /// Takes the manifest of a Pod of that name away.
    pub fn remove_pod_named(&self, name: &str) -> Result<()> {
        let path = self.manifests().join(format!("pod-{name}.json"));
        fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))
    }

    /// Takes any manifest away that `write` wrote; one that is gone is fine.
    pub fn remove(&self, name: &str) -> Result<()> {
        let path = self.manifests().join(format!("{name}.json"));
        match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("removing {}", path.display()))
            }
            _ => Ok(()),
        }
    }

    /// Writes any manifest, as `NAME.json`.
    pub fn write(&self, name: &str, manifest: &Value) -> Result<()> {
        let dir = self.manifests();
        fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
        // Renamed into place, so that it is never read half-written.
        let (fresh, path) = (
            self.place.join(format!("fresh-{name}")),
            dir.join(format!("{name}.json")),
        );
        fs::write(&fresh, serde_json::to_vec_pretty(manifest)?)
            .and_then(|()| fs::rename(&fresh, &path))
            .with_context(|| format!("writing {}", path.display()))
    }

    /// Starts the agent in the node's namespace, outside the lab's cgroup, and waits until it answers.
    pub fn start(&self, lab: &Lab) -> Result<Agent> {
        let agent = self.launch(lab)?;
        agent.wait_until_it_answers()?;
        Ok(agent)
    }

    /// Starts it and does not wait.
    pub fn launch(&self, lab: &Lab) -> Result<Agent> {
        fs::create_dir_all(self.manifests())
            .with_context(|| format!("making {}", self.manifests().display()))?;
        let path = |path: PathBuf| path.display().to_string();
        let own = [
            ("--pods", path(self.manifests())),
            ("--run-dir", path(self.run_dir())),
            ("--zds-socket", path(self.zds())),
            ("--decision-file", path(self.decisions())),
            // In the lab's own network namespace any port is free.
            ("--metrics-address", "127.0.0.1:15014".to_owned()),
            ("--health-address", "127.0.0.1:8000".to_owned()),
        ];
        let mut args = vec!["agent"];
        for (flag, value) in &own {
            args.extend([flag, value.as_str()]);
        }
        args.push("--cni-install=false");
        args.extend(self.args.iter().map(String::as_str));
        let command = match &self.binary {
            Some(binary) => lab.command_of(binary, &args),
            None => lab.culvert_command(&args)?,
        };
        let process = Child::start(lab.node(), Place::Machine, None, Creds::Root, command)?;
        Ok(Agent {
            process,
            place: self.place.clone(),
        })
    }
}

impl Agent {
    /// The process.
    pub fn process(&self) -> &Child {
        &self.process
    }

    /// Its process number.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// `kill -9`, and waits until it is gone.
    pub fn kill(&self) -> Result<()> {
        self.process.kill()
    }

    /// SIGTERM, and waits until it is gone.
    pub fn stop(&self) -> Result<()> {
        self.process.term()?;
        let status = self.process.wait(START)?;
        anyhow::ensure!(
            status.success(),
            "the agent ended with {status}:\n{}",
            self.process.stderr()
        );
        Ok(())
    }

    /// What `GET /v1/status` says.
    pub fn status(&self) -> Result<Value> {
        self.get("/v1/status")
    }

    /// What it answers at its socket.
    pub fn get(&self, path: &str) -> Result<Value> {
        let body = get(&self.place.join("run/agent.sock"), path)?;
        serde_json::from_str(&body)
            .with_context(|| format!("{path} is answered by no JSON: {body}"))
    }

    /// State of one pod, `none` when the agent does not speak of it.
    pub fn state(&self, pod: &Ns) -> Result<String> {
        self.state_of(pod.name())
    }

    /// State of the pod of that UID, `none` when the agent does not speak of it.
    pub fn state_of(&self, uid: &str) -> Result<String> {
        let status = self.status()?;
        let pods = status["pods"]
            .as_array()
            .map(Vec::as_slice)
            .unwrap_or_default();
        let found = pods.iter().find(|p| p["uid"] == uid);
        let state = found.and_then(|p| p["state"].as_str());
        Ok(state.unwrap_or("none").to_owned())
    }

    fn wait_until_it_answers(&self) -> Result<()> {
        let started = std::time::Instant::now();
        while self.status().is_err() {
            if let Some(status) = self.process.status() {
                bail!("the agent ended with {status}:\n{}", self.process.stderr());
            }
            if started.elapsed() > START {
                bail!(
                    "the agent does not answer within {START:?}; it says:\n{}",
                    self.process.stderr()
                );
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

fn get(socket: &Path, path: &str) -> Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(START))?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
    anyhow::ensure!(
        head.starts_with("HTTP/1.1 200"),
        "the agent answered {head}"
    );
    Ok(body.to_owned())
}
