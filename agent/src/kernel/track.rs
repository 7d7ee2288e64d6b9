//! Keeping enrolled pods in step with their namespaces: addresses, routes and interfaces that come and go.
//!
//! One rtnetlink subscription per pod; every change is answered by reading the namespace anew
//! ([`super::pod::sync`]), so a lost message costs nothing but the next one.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{
    error::Result,
    netlink::Rtnetlink,
    netns::{self, Netns, NetnsCookie},
    node::Node,
    pod,
};

/// A pod under watch.
#[derive(Debug)]
struct Watched {
    netns: Netns,
    changes: Rtnetlink,
}

/// Watches all enrolled pods it can find.
#[derive(Debug)]
pub struct Tracker<'a> {
    node: &'a Node,
    pods: BTreeMap<NetnsCookie, Watched>,
}

/// What a round of [`Tracker::run_once`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Round {
    /// Pods under watch.
    pub watched: usize,
    /// Pods brought up to date.
    pub synced: usize,
}

impl<'a> Tracker<'a> {
    /// Watches nothing yet.
    #[must_use]
    pub fn new(node: &'a Node) -> Self {
        Self {
            node,
            pods: BTreeMap::new(),
        }
    }

    /// Takes up pods that are new and drops those that went.
    pub fn rescan(&mut self) -> Result<()> {
        let enrolled = self.node.maps().pods.keys()?;
        self.pods.retain(|cookie, _| enrolled.contains(&cookie.0));
        let new: Vec<u64> = enrolled
            .into_iter()
            .filter(|c| !self.pods.contains_key(&NetnsCookie(*c)))
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
            let Some(netns) = path
                .and_then(|p| Netns::open(p).ok())
                .filter(|n| n.cookie().0 == cookie)
            else {
                continue;
            };
            let changes = {
                let _guard = netns.enter()?;
                Rtnetlink::subscribe()?
            };
            // What changed before we listened.
            pod::sync(self.node, &netns)?;
            self.pods
                .insert(NetnsCookie(cookie), Watched { netns, changes });
        }
        Ok(())
    }

    /// Waits up to `timeout` for changes and answers them. Pods that fail are logged and tried again.
    pub fn run_once(&mut self, timeout: Duration) -> Result<Round> {
        if let Err(error) = self.rescan() {
            tracing::warn!(%error, "looking for pods to watch");
        }
        let mut fds: Vec<PollFd<'_>> = self
            .pods
            .values()
            .map(|w| PollFd::new(w.changes.as_fd(), PollFlags::POLLIN))
            .collect();
        let wait = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
        let ready = poll(&mut fds, wait).unwrap_or(0);
        drop(fds);
        let mut round = Round {
            watched: self.pods.len(),
            synced: 0,
        };
        if ready > 0 {
            for (cookie, watched) in &self.pods {
                if !watched.changes.drain() {
                    continue;
                }
                match pod::sync(self.node, &watched.netns) {
                    Ok(_) => round.synced += 1,
                    Err(error) => tracing::warn!(%cookie, %error, "bringing a pod up to date"),
                }
            }
        }
        Ok(round)
    }
}
