//! A whole cluster: the order in which everything starts, what can be done to it while it runs, and its end. How each
//! part is set up is decided elsewhere.

use std::fs;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::api::{Api, Running, Spec};
use crate::image;
use crate::node::Node;
use crate::nodes::node_state;
use crate::parts::{Part, Parts};
use crate::place::{self, Scratch};
use crate::plan::NODES;
use crate::server::Lifetime;
use crate::services::{self, Service};
use crate::state::{NodeState, State, dir_of, take_plan};
use crate::{cilium, controllers, evidence, sweep, tool};

/// Generous: the machine may be busy with other things.
const READY: Duration = Duration::from_secs(180);

static SERIAL: AtomicU32 = AtomicU32::new(0);

/// Which network pods get.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Cni {
    /// The reference plugin `bridge`, with kube-proxy
    Bridge,
    /// The same with plugins and a container runtime that speak CNI 1.1; build them first
    Newest,
    /// Cilium at its fast settings, which replaces kube-proxy; build it first
    Cilium,
    /// None: pods wait until a test has brought one
    None,
}

/// What kind of cluster it is to be.
#[derive(Debug, Clone)]
pub struct Options {
    /// What it is called; several may be up side by side.
    pub name: String,
    /// How many nodes, 1 to 9.
    pub nodes: u8,
    /// Which network.
    pub cni: Cni,
    /// Whether it goes on when the value is dropped and when the process ends.
    pub on_its_own: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            name: "dev".to_owned(),
            nodes: 2,
            cni: Cni::Bridge,
            on_its_own: false,
        }
    }
}

/// A Kubernetes cluster. What it can be asked about its API is in [`Api`], which it derefs to.
#[derive(Debug)]
pub struct Cluster {
    api: Api,
    state: Mutex<State>,
    /// Only in one that ends with the value.
    scratch: Option<Scratch>,
}

impl Deref for Cluster {
    type Target = Api;

    fn deref(&self) -> &Api {
        &self.api
    }
}

impl Cluster {
    /// Starts one and waits until its nodes are ready. A stale one of the same name is removed first.
    ///
    /// # Errors
    /// When a program is missing or something does not start; what was started is removed again.
    pub fn up(options: &Options) -> Result<Self> {
        ensure!(
            nix::unistd::geteuid().is_root(),
            "a cluster makes namespaces and cgroups: run as root"
        );
        ensure!(
            (1..=NODES).contains(&options.nodes),
            "a cluster has 1 to {NODES} nodes"
        );
        sweep::leftovers()?;
        let parts = Parts::find()?;
        let more: &[Part] = match options.cni {
            Cni::Cilium => &Part::CILIUM,
            Cni::Newest => &Part::NEWEST,
            Cni::Bridge | Cni::None => &[],
        };
        for part in Part::ALL[2..6].iter().chain(more) {
            parts.get(*part)?;
        }
        let (dir, scratch, lifetime) = if options.on_its_own {
            let dir = dir_of(&options.name)?;
            Self::make_room(&dir)?;
            (dir, None, Lifetime::OnItsOwn)
        } else {
            let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
            let scratch = Scratch::create(&options.name, serial)?;
            (
                scratch.path().to_path_buf(),
                Some(scratch),
                Lifetime::WithUs,
            )
        };
        let plan = take_plan()?;
        let spec = Spec {
            dir,
            address: plan.api(),
            port: 6443,
            etcd_ports: [2379, 2380],
            whole: true,
            lifetime,
        };
        let state = State {
            name: options.name.clone(),
            index: plan.0,
            cni: options.cni,
            spec: spec.clone(),
            ready: false,
            running: Running::default(),
            controllers: Vec::new(),
            nodes: vec![NodeState::default(); usize::from(options.nodes)],
        };
        state.write()?;
        let cluster = Self {
            api: Api::create(spec)?,
            state: Mutex::new(state),
            scratch,
        };
        if let Err(error) = cluster.start(options.cni) {
            cluster.describe();
            match place::keep_logs(cluster.scratch(), &options.name) {
                Ok(kept) => eprintln!("logs: {}", kept.display()),
                Err(error) => eprintln!("keeping logs: {error}"),
            }
            if cluster.scratch.is_none() && !place::keep() {
                cluster.down()?;
            }
            return Err(error);
        }
        cluster.note(|state| state.ready = true)?;
        Ok(cluster)
    }

    /// The directory of one on its own: whatever is there of an earlier run goes.
    fn make_room(dir: &Path) -> Result<()> {
        if let Ok(earlier) = State::read(dir) {
            ensure!(
                !earlier.is_up(),
                "cluster {} is up already: see `cargo xtask cluster status`, or take it down first",
                earlier.name
            );
            eprintln!(
                "removing what is left of an earlier cluster {}",
                earlier.name
            );
            earlier.tear_down()?;
        }
        if dir.exists() {
            fs::remove_dir_all(dir).with_context(|| format!("removing {}", dir.display()))?;
        }
        fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))
    }

    /// Takes up one that was started on its own, by this process or another.
    ///
    /// # Errors
    /// When none of that name is up.
    pub fn attach(name: &str) -> Result<Self> {
        let dir = dir_of(name)?;
        let up = format!("no cluster {name} is up: start it with `cargo xtask cluster up`");
        let state = State::read(&dir).with_context(|| up.clone())?;
        ensure!(state.is_up(), up);
        Ok(Self {
            api: Api::open(state.spec.clone(), state.running.clone())?,
            state: Mutex::new(state),
            scratch: None,
        })
    }

    /// Ends it and removes all traces.
    ///
    /// # Errors
    /// When something does not end or cannot be removed.
    pub fn down(&self) -> Result<()> {
        let mut state = self.lock();
        state.running = self.api.running();
        state.tear_down()?;
        if self.scratch.is_none() {
            let dir = state.dir();
            fs::remove_dir_all(dir).with_context(|| format!("removing {}", dir.display()))?;
        }
        Ok(())
    }

    /// Ends one that is not dropped, with its files.
    pub(crate) fn end(&self) -> Result<()> {
        let down = self.down();
        if let Some(scratch) = &self.scratch {
            scratch.remove();
        }
        down
    }

    /// Removes what is there of a cluster on its own, however broken.
    ///
    /// # Errors
    /// When something does not end or cannot be removed.
    pub fn remove(name: &str) -> Result<()> {
        let dir = dir_of(name)?;
        if !dir.exists() {
            return Ok(());
        }
        State::read(&dir)?.tear_down()?;
        fs::remove_dir_all(&dir).with_context(|| format!("removing {}", dir.display()))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state, and writes it down.
    pub(crate) fn note(&self, change: impl FnOnce(&mut State)) -> Result<()> {
        let mut state = self.lock();
        change(&mut state);
        state.running = self.api.running();
        state.write()
    }

    fn start(&self, cni: Cni) -> Result<()> {
        let plan = self.lock().plan();
        tool::ip_batch(None, &plan.host_commands(self.lock().count()))?;
        let images = image::basic(&self.api.scratch().join("images"))?;
        let nodes = self.nodes();
        // Nodes need the API server only when their kubelets start.
        std::thread::scope(|scope| -> Result<()> {
            let control = scope.spawn(|| -> Result<()> {
                self.api.start_etcd()?;
                let started = self.api.start_api_server();
                // Also when it has failed: what runs is to be taken down.
                self.note(|_| {})?;
                started?;
                // Not before: they end when they find no API server.
                let controllers = controllers::start(&self.api, plan)?;
                self.note(|state| state.controllers = controllers)?;
                if cni == Cni::Cilium {
                    cilium::install(&self.api, plan)?;
                }
                Ok(())
            });
            let booting: Vec<_> = nodes
                .iter()
                .map(|node| scope.spawn(|| self.prepare(node, cni, &images)))
                .collect();
            let mut results = vec![control.join()];
            results.extend(booting.into_iter().map(|thread| thread.join()));
            for result in results {
                result.map_err(|_panic| anyhow::anyhow!("a thread of the start panicked"))??;
            }
            Ok(())
        })?;
        for node in &nodes {
            self.register(node)?;
            self.start_service(node, Service::Kubelet)?;
            match cni {
                Cni::Bridge | Cni::Newest => self.start_service(node, Service::KubeProxy)?,
                Cni::Cilium => self.start_service(node, Service::Cilium)?,
                Cni::None => {}
            }
        }
        self.wait_until_ready(cni)
    }

    fn prepare(&self, node: &Node, cni: Cni, images: &[PathBuf]) -> Result<()> {
        node.wire()?;
        services::write_files(&self.api, node)?;
        services::copy_plugins(&self.api, node, cni)?;
        match cni {
            Cni::Bridge | Cni::Newest => services::write_bridge_network(node)?,
            Cni::Cilium => cilium::write_files(&self.api, node)?,
            Cni::None => {}
        }
        self.boot(node)?;
        for image in images {
            self.import_to(node, image)?;
        }
        Ok(())
    }

    /// Starts a node's first process and its container runtime.
    pub(crate) fn boot(&self, node: &Node) -> Result<()> {
        let init = node.boot(self.api.spec().lifetime)?;
        self.note(|state| node_state(state, node).init = Some(init))?;
        self.start_service(node, Service::Containerd)
    }

    /// The node's object, with the ranges of its pods, which kubelets do not know.
    fn register(&self, node: &Node) -> Result<()> {
        let ranges = node.pod_ranges();
        let object = json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": node.name()},
            "spec": {"podCIDR": ranges[0], "podCIDRs": ranges},
        });
        self.api.apply(&object.to_string()).map(drop)
    }

    fn wait_until_ready(&self, cni: Cni) -> Result<()> {
        let nodes = usize::from(self.lock().count());
        if cni != Cni::None {
            self.admin()
                .wait_until(
                    "all nodes are ready",
                    READY,
                    &["get", "nodes", "-o", "json"],
                    |text| ready_nodes(text) == nodes,
                )
                .map_err(|error| self.explain(error))?;
        }
        self.admin()
            .wait_until(
                "service accounts are made",
                READY,
                &["get", "serviceaccount", "default", "-n", "default"],
                |_| true,
            )
            .map_err(|error| self.explain(error))?;
        Ok(())
    }

    /// What servers have said last, after an error.
    fn explain(&self, error: anyhow::Error) -> anyhow::Error {
        let state = self.lock();
        let mut text = format!("{error:#}");
        let services = state.nodes.iter().flat_map(|node| node.services.values());
        for server in state.controllers.iter().chain(services) {
            text += &format!("\n{}", server.tail());
        }
        anyhow::anyhow!(text)
    }

    /// Its name.
    pub fn name(&self) -> String {
        self.lock().name.clone()
    }

    /// Which network it was started with.
    pub fn cni(&self) -> Cni {
        self.lock().cni
    }

    /// Its nodes.
    pub fn nodes(&self) -> Vec<Node> {
        let state = self.lock();
        (1..=state.count())
            .map(|number| state.node(number))
            .collect()
    }

    /// A node by its name.
    ///
    /// # Errors
    /// When there is none of that name; the error lists those there are.
    pub fn node(&self, name: &str) -> Result<Node> {
        let nodes = self.nodes();
        let names: Vec<_> = nodes.iter().map(Node::name).collect();
        nodes
            .into_iter()
            .find(|node| node.name() == name)
            .with_context(|| format!("no node {name}: there are {}", names.join(", ")))
    }

    /// Which servers do not run, for a look at the whole.
    pub fn status(&self) -> Value {
        let state = self.lock();
        let servers = state
            .running
            .servers()
            .chain(&state.controllers)
            .map(|server| (server.name().to_owned(), server.alive()));
        let nodes = (1..).zip(&state.nodes).flat_map(|(number, node)| {
            let name = state.node(number).name();
            node.services.iter().map(move |(service, server)| {
                (format!("{name}/{}", service.name()), server.alive())
            })
        });
        let servers: serde_json::Map<_, _> = servers
            .chain(nodes)
            .map(|(name, alive)| (name, Value::from(if alive { "running" } else { "ended" })))
            .collect();
        json!({
            "name": state.name,
            "cni": state.cni,
            "api": self.api.url(),
            "kubeconfig": self.api.admin_kubeconfig(),
            "directory": state.dir(),
            "servers": servers,
        })
    }

    /// What to keep of a cluster on which a test has failed.
    fn describe(&self) {
        if let Err(error) = evidence::describe(&self.api, self.api.scratch()) {
            eprintln!("describing the cluster: {error:#}");
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.scratch.is_none() {
            return;
        }
        if std::thread::panicking() {
            self.describe();
        }
        if let Err(error) = self.down() {
            eprintln!("{error:#}");
        }
    }
}

/// How many nodes are ready, by `get nodes -o json`.
fn ready_nodes(text: &str) -> usize {
    let list: Value = serde_json::from_str(text).unwrap_or_default();
    let ready = |node: &&Value| {
        let conditions = node["status"]["conditions"].as_array();
        node["spec"]["taints"].is_null()
            && conditions.is_some_and(|all| {
                all.iter()
                    .any(|one| one["type"] == "Ready" && one["status"] == "True")
            })
    };
    list["items"]
        .as_array()
        .map_or(0, |nodes| nodes.iter().filter(ready).count())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_with_a_taint_is_not_ready() {
        let node = |taints: Value, status: &str| json!({"spec": {"taints": taints}, "status": {"conditions": [{"type": "Ready", "status": status}]}});
        let list = json!({"items": [
            node(Value::Null, "True"),
            node(json!([{"key": "x"}]), "True"),
            node(Value::Null, "False"),
        ]});
        assert_eq!(ready_nodes(&list.to_string()), 1);
        assert_eq!(ready_nodes(""), 0);
    }
}
