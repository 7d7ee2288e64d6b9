//! Cilium's agent: what it says of itself, and its start with another setting.

use anyhow::{Context as _, Result};
use culvert_cluster::{Cluster, Node, Part, Parts, Service};
use serde_json::json;

use crate::bed::Bed;

/// What it says of itself; an error while it does not answer.
pub(crate) fn status(cluster: &Cluster, node: &Node) -> Result<String> {
    let program = Parts::find()?.get(Part::CiliumDbg)?;
    let program = program.to_str().context("a path that is no text")?;
    cluster.run_on(node, &[program, "status", "--verbose"])
}

/// Starts it anew on all nodes with that setting: it loads its programs again and writes its CNI configuration. Nothing is
/// waited for.
pub(crate) fn restart_with(cluster: &Cluster, key: &str, value: &str) -> Result<()> {
    let patch = json!({"data": {key: value}}).to_string();
    let map = ["patch", "configmap", "cilium-config", "-n", "kube-system"];
    let patch = ["--type=merge", "-p", &patch];
    cluster.kubectl(&[&map[..], &patch].concat())?;
    for node in cluster.nodes() {
        cluster.stop_service(&node, Service::Cilium)?;
        cluster.start_service(&node, Service::Cilium)?;
    }
    Ok(())
}

/// Others' CNI configurations, which Cilium leaves alone on this cluster: where a failing test leaves it otherwise, it is
/// started anew.
pub(crate) struct NotExclusive<'a>(pub(crate) &'a Bed);

impl Drop for NotExclusive<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        self.0.keep_if_failing();
        if let Err(error) = restart_with(self.0.cluster, "cni-exclusive", "false") {
            eprintln!("putting cni-exclusive back: {error:#}");
        }
    }
}
