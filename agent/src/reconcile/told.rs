//! What others found out about a network namespace, brought to the pod that is in it.
//!
//! The kernel's side knows cookies, whoever looks after pods knows names; the entries know both.

use super::{
    Reconciler,
    world::{Notice, Target, World},
};
use crate::kernel::verify::Repair;

impl<W: World> Reconciler<W> {
    /// What is ours in a network namespace had been taken away or changed, and is there again: said about its pod. False
    /// when no pod is known to be there, and nothing was said.
    pub async fn put_back(&self, cookie: u64, repairs: Vec<Repair>) -> bool {
        let Some(target) = self.in_namespace(cookie) else {
            return false;
        };
        let notice = Notice::PutBack(repairs);
        self.inner.world.say(&target, notice).await;
        true
    }

    fn in_namespace(&self, cookie: u64) -> Option<Target> {
        let entries = self.entries();
        let mut entries = entries.values();
        let is_there = |place| self.inner.world.cookie(place) == cookie;
        let entry = entries.find(|e| e.place.as_deref().is_some_and(is_there))?;
        Some(entry.target.clone())
    }
}
