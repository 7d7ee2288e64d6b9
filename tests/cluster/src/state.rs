//! What of a cluster is written down, so that another process can take it up or take it down: which servers run, and
//! which numbers it has on this machine. Taking down works from this alone.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use crate::api::{Running, Spec};
use crate::cluster::Cni;
use crate::node::Node;
use crate::plan::Plan;
use crate::server::Server;
use crate::services::Service;
use crate::{place, tool};

/// A cluster as it is on disk.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct State {
    pub(crate) name: String,
    pub(crate) index: u8,
    pub(crate) cni: Cni,
    pub(crate) spec: Spec,
    /// It came up; one that did not, because it was interrupted, is a leftover.
    pub(crate) ready: bool,
    pub(crate) running: Running,
    pub(crate) controllers: Vec<Server>,
    pub(crate) nodes: Vec<NodeState>,
}

/// A node's servers, as far as they run.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct NodeState {
    pub(crate) init: Option<Server>,
    pub(crate) services: BTreeMap<Service, Server>,
}

impl State {
    pub(crate) fn plan(&self) -> Plan {
        Plan(self.index)
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.spec.dir
    }

    /// Whether it came up and is there still.
    pub(crate) fn is_up(&self) -> bool {
        self.ready && self.running.servers().any(Server::alive)
    }

    /// A node by its number, which counts from 1.
    pub(crate) fn node(&self, number: u8) -> Node {
        Node {
            plan: self.plan(),
            number,
            nodes: self.count(),
            dir: self.dir().join(Plan::node_name(number)),
        }
    }

    pub(crate) fn count(&self) -> u8 {
        u8::try_from(self.nodes.len()).unwrap_or(u8::MAX)
    }

    /// Reads the state in a cluster's directory.
    pub(crate) fn read(dir: &Path) -> Result<Self> {
        let file = dir.join(place::STATE);
        let text =
            fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
        serde_json::from_str(&text).with_context(|| format!("parsing {}", file.display()))
    }

    pub(crate) fn write(&self) -> Result<()> {
        let file = self.dir().join(place::STATE);
        let temporary = self.dir().join(format!("{}.new", std::process::id()));
        let text = serde_json::to_string_pretty(self).context("writing down a cluster")?;
        fs::write(&temporary, text)
            .and_then(|()| fs::rename(&temporary, &file))
            .with_context(|| format!("writing {}", file.display()))
    }

    /// Ends all servers and removes all traces but the directory. Goes on over errors, and returns all of them.
    pub(crate) fn tear_down(&self) -> Result<()> {
        let mut errors = Vec::new();
        let mut note = |result: Result<()>| errors.extend(result.err());
        for init in self.nodes.iter().filter_map(|node| node.init.as_ref()) {
            note(init.kill());
        }
        for server in self.controllers.iter().chain(self.running.servers()) {
            note(server.kill());
        }
        for (number, node) in (1..).zip(&self.nodes) {
            // `nsenter` stays until what it started is gone, and logs would be written to a directory that is removed.
            for service in node.services.values() {
                note(service.wait_for_end());
            }
            note(self.node(number).unwire());
        }
        let bridge = self.plan().bridge();
        if Path::new("/sys/class/net").join(&bridge).exists() {
            note(tool::ip(&["link", "delete", &bridge]).map(drop));
        }
        if errors.is_empty() {
            return Ok(());
        }
        let errors: Vec<_> = errors.iter().map(|error| format!("{error:#}")).collect();
        bail!("taking cluster {} down:\n{}", self.name, errors.join("\n"))
    }
}

/// Takes the next free numbers by making their bridge, which only one can.
pub(crate) fn take_plan() -> Result<Plan> {
    for index in 0..crate::plan::CLUSTERS {
        let plan = Plan(index);
        match tool::ip(&["link", "add", &plan.bridge(), "type", "bridge"]) {
            Ok(_) => return Ok(plan),
            Err(error) if format!("{error:#}").contains("exists") => {}
            Err(error) => return Err(error).context("making a bridge: run as root"),
        }
    }
    bail!(
        "{} clusters are up: take one down with `cargo xtask cluster down`",
        crate::plan::CLUSTERS
    )
}

/// Where a cluster of that name lies.
pub(crate) fn dir_of(name: &str) -> Result<PathBuf> {
    Ok(place::cluster_dir()?.join("run").join(name))
}
