//! The condition of a pod that asks for the mesh and is not in it: written while that lasts, taken away when it is over.
//!
//! What it says is decided in [`crate::plan::condition`]. It holds up nothing: no step waits for it.

use std::collections::BTreeMap;

use tokio::time::Instant;

use super::{
    Entry, Reconciler,
    entry::{Trouble, is_due},
    world::{Target, World},
};
use crate::{
    model::{PodUid, Uncaptured},
    plan::{
        condition::{Obstacle, wanted},
        pod::Wish,
    },
};

/// What is known of a pod's condition.
#[derive(Debug, Default)]
pub(super) struct Condition {
    /// As last seen or written.
    known: Option<Uncaptured>,
    /// What the watch showed last: it may lag behind what we wrote.
    shown: Option<Uncaptured>,
    trouble: Option<Trouble>,
    busy: bool,
}

impl Condition {
    /// The watch shows this.
    pub(super) fn show(&mut self, shown: Option<&Uncaptured>) {
        if self.shown.as_ref() != shown {
            self.shown = shown.cloned();
            self.known.clone_from(&self.shown);
        }
    }

    /// It is to be taken away yet.
    pub(super) fn stands(&self) -> bool {
        self.known.is_some() || self.busy
    }

    /// When it may be tried again.
    pub(super) fn again(&self) -> Option<Instant> {
        self.trouble.as_ref()?.again
    }
}

impl<P> Entry<P> {
    fn uncaptured(&self) -> Option<Uncaptured> {
        let refused = self.warnings.first().filter(|_| self.refused);
        let failed = self.trouble.as_ref().filter(|_| self.wish == Wish::In);
        wanted(match (refused, failed) {
            (Some(why), _) => Some(Obstacle::Refused(why)),
            (None, Some(trouble)) => Some(Obstacle::Failed {
                why: &trouble.failure.message,
                tries: trouble.tries,
                retry: trouble.failure.retry,
            }),
            (None, None) => None,
        })
    }
}

/// A condition to write.
pub(super) type Writing = (Target, Option<Uncaptured>);

impl<W: World> Reconciler<W> {
    /// Picks the conditions that are not as they should be.
    pub(super) fn conditions(
        entries: &mut BTreeMap<PodUid, Entry<W::Place>>,
        now: Instant,
    ) -> Vec<Writing> {
        let mut writing = Vec::new();
        for entry in entries.values_mut() {
            // Who is gone has no conditions.
            if entry.absent.is_some() || entry.condition.busy || entry.busy {
                continue;
            }
            let wanted = entry.uncaptured();
            if wanted == entry.condition.known {
                entry.condition.trouble = None;
            } else if is_due(entry.condition.trouble.as_ref(), now) {
                entry.condition.busy = true;
                writing.push((entry.target.clone(), wanted));
            }
        }
        writing
    }

    /// Writes one.
    pub(super) async fn write_condition(&self, (target, to): Writing) {
        let written = self.inner.world.condition(&target, to.as_ref()).await;
        if let Some(entry) = self.entries().get_mut(&target.uid) {
            let condition = &mut entry.condition;
            condition.busy = false;
            match written {
                Ok(()) => {
                    condition.known = to;
                    condition.trouble = None;
                }
                Err(failure) => {
                    tracing::debug!(pod = %target, %failure, "writing the pod's condition");
                    let before = condition.trouble.as_ref();
                    condition.trouble = Some(Trouble::after(before, failure, Instant::now()));
                }
            }
        }
        self.wake();
    }
}
