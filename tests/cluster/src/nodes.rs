//! What can be done to the nodes of a cluster while it runs: commands, images, services, power.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::cluster::Cluster;
use crate::image::Image;
use crate::node::Node;
use crate::server::{Lifetime, Server};
use crate::services::Service;
use crate::state::{NodeState, State};
use crate::tool;

const CONTAINERD: Duration = Duration::from_secs(60);

static SERIAL: AtomicU32 = AtomicU32::new(0);

impl Cluster {
    /// A command in a node's namespaces, to be run as the caller likes.
    ///
    /// # Errors
    /// When the node is off.
    pub fn command_on(&self, node: &Node, args: &[impl AsRef<OsStr>]) -> Result<Command> {
        Ok(Node::command(&self.init(node)?, args))
    }

    /// Runs a command on a node to its end and returns what it printed.
    ///
    /// # Errors
    /// When the node is off or the command fails; the error holds what it said.
    pub fn run_on(&self, node: &Node, args: &[impl AsRef<OsStr>]) -> Result<String> {
        tool::run(&mut self.command_on(node, args)?)
    }

    /// Where the root of a node's files is as seen from outside, with what is mounted there.
    ///
    /// # Errors
    /// When the node is off.
    pub fn root_of(&self, node: &Node) -> Result<PathBuf> {
        Ok(Path::new("/proc")
            .join(self.init(node)?.pid().to_string())
            .join("root"))
    }

    fn init(&self, node: &Node) -> Result<Server> {
        node_state(&mut self.lock(), node)
            .init
            .clone()
            .filter(Server::alive)
            .with_context(|| format!("{} is off", node.name()))
    }

    /// Makes an image known to all nodes: a tar as `docker save` or an OCI layout has it.
    ///
    /// # Errors
    /// When a node is off or refuses it.
    pub fn import(&self, tar: &Path) -> Result<()> {
        self.nodes()
            .iter()
            .try_for_each(|node| self.import_to(node, tar))
    }

    /// Builds an image and makes it known to all nodes.
    ///
    /// # Errors
    /// When a file cannot be read, or a node is off or refuses it.
    pub fn add_image(&self, image: &Image) -> Result<()> {
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let file = format!("{}-{serial}.tar", std::process::id());
        let path = self.scratch().join("images").join(file);
        image.write(&path)?;
        let imported = self.import(&path);
        fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))?;
        imported
    }

    pub(crate) fn import_to(&self, node: &Node, tar: &Path) -> Result<()> {
        let words = ["ctr", "-n", "k8s.io", "images", "import"];
        let mut command = self.command_on(node, &words)?;
        tool::run(command.arg(tar)).map(drop)
    }

    /// Starts a service of a node; containerd is waited for.
    ///
    /// # Errors
    /// When it runs already, does not start, or the node is off.
    pub fn start_service(&self, node: &Node, service: Service) -> Result<()> {
        if self
            .service(node, service)
            .is_some_and(|server| server.alive())
        {
            bail!("{} on {} runs: stop it first", service.name(), node.name());
        }
        let command = self.command_on(node, &service.command_line(self, node, self.cni())?)?;
        // All of a node ends with its first process.
        let outer = Server::start(node.dir(), service.name(), command, Lifetime::OnItsOwn)?;
        let mut server = outer.behind()?;
        if service.restarts() {
            server = server.with_group();
        }
        self.note(|state| {
            node_state(state, node)
                .services
                .insert(service, server.clone());
        })?;
        if service == Service::Containerd {
            server.wait_until("it serves", CONTAINERD, || {
                self.run_on(node, &["ctr", "-n", "k8s.io", "images", "list", "-q"])
                    .is_ok()
            })?;
        }
        Ok(())
    }

    /// Kills a service of a node; one that does not run is fine.
    ///
    /// # Errors
    /// When it does not end.
    pub fn stop_service(&self, node: &Node, service: Service) -> Result<()> {
        self.service(node, service)
            .map_or(Ok(()), |server| server.kill())
    }

    fn service(&self, node: &Node, service: Service) -> Option<Server> {
        node_state(&mut self.lock(), node)
            .services
            .get(&service)
            .cloned()
    }

    /// Pulls a node's plug: all its processes are gone, with its mounts and its network namespace; its files stay.
    ///
    /// # Errors
    /// When something does not end.
    pub fn power_off(&self, node: &Node) -> Result<()> {
        let (init, services) = {
            let mut state = self.lock();
            let state = node_state(&mut state, node);
            (state.init.take(), std::mem::take(&mut state.services))
        };
        if let Some(init) = init {
            init.kill()?;
        }
        for server in services.values() {
            server.wait_for_end()?;
        }
        node.unwire()?;
        self.note(|_| {})
    }

    /// Switches a node on again, with the services named, in that order; containerd always comes first.
    ///
    /// # Errors
    /// When it is on, or something does not start.
    pub fn power_on(&self, node: &Node, services: &[Service]) -> Result<()> {
        node.wire()?;
        self.boot(node)?;
        services
            .iter()
            .filter(|service| **service != Service::Containerd)
            .try_for_each(|service| self.start_service(node, *service))
    }
}

pub(crate) fn node_state<'a>(state: &'a mut State, node: &Node) -> &'a mut NodeState {
    // A `Node` is only made for a number that its state has.
    let index = usize::from(node.number.saturating_sub(1));
    &mut state.nodes[index]
}
