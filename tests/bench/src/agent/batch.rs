//! Some new pods as a node sees them come and go: the API knows them first, then the runtime makes a network namespace
//! and calls the plugin, then the kubelet reports addresses; at the end DEL, the object and the namespace, in this order.

use anyhow::{Context as _, Result};
use culvert_lab::Ns;
use serde_json::json;

use super::plugin::{Plugin, Sandbox};
use super::site::{self, Site};
use crate::interrupt;

/// Pods of one Kubernetes namespace that is made for them and goes with them.
pub(super) struct Batch<'a> {
    site: &'a Site,
    name: String,
    mode: Option<&'static str>,
    pub(super) pods: Vec<(Ns, Sandbox)>,
}

impl<'a> Batch<'a> {
    /// Makes network namespaces and manifests, and waits until the agent has read them.
    pub(super) fn new(
        site: &'a Site,
        name: &str,
        mode: Option<&'static str>,
        count: usize,
    ) -> Result<Self> {
        let mut pods = Vec::new();
        for i in 0..count {
            interrupt::check()?;
            let ns = site.lab.pod(&format!("{name}-{i}"))?;
            let sandbox = Sandbox::new(&ns, name)?;
            pods.push((ns, sandbox));
        }
        let batch = Self {
            site,
            name: name.to_owned(),
            mode,
            pods,
        };
        batch.write(false)?;
        site.knows_namespace(name)?;
        Ok(batch)
    }

    /// One file for all: how the API's objects come is not what is measured.
    fn write(&self, running: bool) -> Result<()> {
        let mut items = vec![site::namespace(&self.name, self.mode)];
        items.extend(self.pods.iter().map(|(ns, sandbox)| {
            site::pod(&sandbox.name, &sandbox.namespace, running.then_some(ns))
        }));
        let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
        self.site.options.write(&self.name, &list)
    }

    /// The kubelet reports that they run, with their addresses.
    pub(super) fn run(&self) -> Result<()> {
        self.write(true)
    }

    /// Takes all down again and waits until the agent speaks of no more pods than `left`, and of none of these to ztunnel.
    pub(super) fn end(self, plugin: &Plugin, left: usize) -> Result<Vec<f64>> {
        let mut took = Vec::new();
        for (_, sandbox) in &self.pods {
            took.push(plugin.del(sandbox)?.as_secs_f64() * 1e3);
        }
        self.site.options.remove(&self.name)?;
        let site = self.site;
        site.until("the pods are forgotten", || Ok(site.enrolled()?.1 <= left))
            .with_context(|| format!("after DEL of {}", self.name))?;
        for (ns, _) in self.pods {
            site.lab.delete(ns)?;
        }
        Ok(took)
    }
}
