//! Whether this node's installation is broken: what the plugin's STATUS fails with.
//!
//! A failing STATUS makes the node NotReady, so only what keeps every pod of the mesh from starting belongs here, and only
//! once it has lasted: neither an agent that is late nor a ztunnel or an API server that is away breaks an installation.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// What is broken for less than this is being mended: two more looks at everything.
const LASTING: Duration = Duration::from_secs(10);

/// A part without which no pod of the mesh starts.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Part {
    /// The node's programs and where they are pinned.
    Programs,
    /// The plugin's binary.
    Plugin,
}

/// The parts' faults, shared by those who find them and those who are asked.
#[derive(Clone, Debug, Default)]
pub struct Installation(Arc<Mutex<BTreeMap<Part, Fault>>>);

#[derive(Debug)]
struct Fault {
    what: String,
    since: Instant,
}

impl Installation {
    /// The part is broken and could not be mended: with what, and the cure.
    pub fn broken(&self, part: Part, what: impl Into<String>) {
        let mut faults = self.lock();
        let since = faults.get(&part).map_or_else(Instant::now, |f| f.since);
        let what = what.into();
        faults.insert(part, Fault { what, since });
    }

    /// The part is as it has to be.
    pub fn whole(&self, part: Part) {
        if let Some(fault) = self.lock().remove(&part) {
            tracing::info!(?part, what = fault.what, "not broken any more");
        }
    }

    /// What has been broken for longer than mending takes; none = pods of the mesh can start.
    #[must_use]
    pub fn fault(&self) -> Option<String> {
        let faults = self.lock();
        let lasting = faults.values().filter(|f| f.since.elapsed() >= LASTING);
        let lasting: Vec<&str> = lasting.map(|f| f.what.as_str()).collect();
        (!lasting.is_empty()).then(|| lasting.join("; "))
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Part, Fault>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn only_what_lasts_breaks_an_installation() {
        let installation = Installation::default();
        assert_eq!(installation.fault(), None);
        installation.broken(Part::Programs, "no bpffs");
        assert_eq!(installation.fault(), None, "it may be mended at once");
        tokio::time::advance(LASTING / 2).await;
        installation.broken(Part::Programs, "still no bpffs");
        tokio::time::advance(LASTING / 2).await;
        assert_eq!(installation.fault().as_deref(), Some("still no bpffs"));
        installation.broken(Part::Plugin, "read-only");
        assert_eq!(installation.fault().as_deref(), Some("still no bpffs"));
        tokio::time::advance(LASTING).await;
        let both = installation.fault();
        assert_eq!(both.as_deref(), Some("still no bpffs; read-only"));
        installation.whole(Part::Plugin);
        installation.whole(Part::Programs);
        assert_eq!(installation.fault(), None);
        installation.broken(Part::Programs, "again");
        assert_eq!(installation.fault(), None, "it was whole in between");
    }
}
