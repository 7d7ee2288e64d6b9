//! Watching every enrolled pod that can be found, for `culvert netns watch`: nobody tells it of pods, so it looks.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{Event, Watchlist};
use crate::kernel::{
    error::Result,
    netns::{self, Netns, NetnsCookie},
    node::Node,
};

/// Watches all enrolled pods it can find.
#[derive(Debug)]
pub struct Rescanner<'a> {
    node: &'a Node,
    list: Watchlist,
}

/// What a round of [`Rescanner::run_once`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Round {
    /// Pods under watch.
    pub watched: usize,
    /// Pods brought up to date.
    pub synced: usize,
}

impl<'a> Rescanner<'a> {
    /// Watches nothing yet.
    #[must_use]
    pub fn new(node: &'a Node) -> Self {
        Self {
            node,
            list: Watchlist::new(),
        }
    }

    /// Takes up pods that are new and drops those that went.
    fn rescan(&mut self) -> Result<()> {
        let enrolled = self.node.maps().pods.keys()?;
        self.list
            .pods
            .retain(|cookie, _| enrolled.contains(&cookie.0));
        let new: Vec<u64> = enrolled
            .into_iter()
            .filter(|c| !self.list.pods.contains_key(&NetnsCookie(*c)))
            .collect();
        if new.is_empty() {
            return Ok(());
        }
        let paths = netns::paths();
        for cookie in new {
            let Some(record) = self.node.maps().records.get(&cookie)? else {
                continue;
            };
            let path: Option<&PathBuf> = paths
                .iter()
                .find(|(id, _)| *id == (record.netns_dev, record.netns_inode))
                .map(|(_, p)| p);
            let netns = path
                .and_then(|p| Netns::open(p).ok())
                .filter(|n| n.cookie().0 == cookie);
            if let Some(netns) = netns {
                self.list.add(Arc::new(netns), None);
            }
        }
        Ok(())
    }

    /// Waits up to `timeout` for changes and answers them. Pods that fail are logged and tried again.
    pub fn run_once(&mut self, timeout: Duration) -> Round {
        if let Err(error) = self.rescan() {
            tracing::warn!(%error, "looking for pods to watch");
        }
        self.list.wait(None, Some(Instant::now() + timeout));
        let mut synced = std::collections::BTreeSet::new();
        self.list.answer(self.node, &mut |event| match event {
            Event::Followed { cookie, changes } => {
                tracing::debug!(%cookie, ?changes, "followed the pod");
                synced.insert(cookie);
            }
            Event::Repaired { cookie, repairs } => {
                tracing::warn!(%cookie, ?repairs, "somebody changed what is ours");
                synced.insert(cookie);
            }
            Event::Gone { .. } => {}
            Event::Failed { cookie, error } => {
                tracing::warn!(%cookie, %error, "bringing a pod up to date");
            }
        });
        Round {
            watched: self.list.pods.len(),
            synced: synced.len(),
        }
    }
}
