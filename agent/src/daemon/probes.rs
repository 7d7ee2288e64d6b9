//! Whose probes pass by ztunnel: the kubelet followed, and what is in force said.

use std::sync::Arc;

use anyhow::{Context as _, Result};
use tokio_util::sync::CancellationToken;

use crate::{
    config::{Config, ProbeSource},
    kernel::{
        Node,
        kubelet::{self, Follower, InForce},
    },
};

/// In the kernel's terms.
pub(super) fn source(source: ProbeSource) -> u32 {
    use culvert_ebpf::abi::{PROBES_KUBELET, PROBES_NODE, PROBES_NONE};
    match source {
        ProbeSource::Kubelet => PROBES_KUBELET,
        ProbeSource::Node => PROBES_NODE,
        ProbeSource::None => PROBES_NONE,
    }
}

/// Fails where the kubelet was asked for and cannot be told from others: to let every process pass is not for us to
/// decide.
pub(super) fn check(config: &Config) -> Result<()> {
    match config.probe_source {
        ProbeSource::Kubelet => kubelet::check().context("probe-source: kubelet"),
        ProbeSource::Node | ProbeSource::None => Ok(()),
    }
}

/// The thread that follows the kubelet, for as long as this lives.
pub(super) struct Following {
    _follower: Follower,
    ended: CancellationToken,
}

impl Following {
    /// Returns when the thread is over, however that comes about.
    pub(super) fn ended(&self) -> impl Future<Output = ()> + Send + 'static {
        self.ended.clone().cancelled_owned()
    }
}

/// Follows the kubelet, if it is the kubelet that may vouch.
pub(super) fn follow(config: &Config, node: &Arc<Node>) -> Result<Option<Following>> {
    if config.probe_source != ProbeSource::Kubelet {
        return Ok(None);
    }
    let names = config.kubelet_names.iter().cloned().collect();
    let ended = CancellationToken::new();
    // Goes with the thread, be it by a panic.
    let thread = ended.clone().drop_guard();
    let follower = Follower::start(Arc::clone(node), names, move |force| {
        let _held = &thread;
        match force {
            InForce::Processes { pids } => {
                tracing::info!(?pids, "the kubelet's probes pass by ztunnel");
            }
            InForce::Nobody { why } => tracing::warn!(why, "nobody's probes pass by ztunnel"),
        }
    })?;
    Ok(Some(Following {
        _follower: follower,
        ended,
    }))
}
