//! What tells of a pod's changes: a subscription to its namespace's rtnetlink, and its sysctls, which tell nobody and are
//! held open to be read.
//!
//! Whoever opens them before reading the namespace misses nothing that happens from then on. It answers nothing itself.

use std::os::fd::BorrowedFd;

use super::{
    error::Result,
    netlink::{Heard, Rtnetlink},
    netns::Guard,
    sysctl,
};

/// Ears in one namespace.
#[derive(Debug)]
pub struct Ears {
    changes: Rtnetlink,
    pub(super) sysctls: sysctl::Held,
    /// Whose changes are no news.
    own: Option<u32>,
}

impl Ears {
    /// Opens them in the namespace the guard stands for.
    pub(super) fn open(guard: &Guard<'_>) -> Result<Self> {
        Ok(Self {
            changes: Rtnetlink::subscribe()?,
            sysctls: sysctl::Held::open(guard)?,
            own: None,
        })
    }

    /// What is done through this socket is not listened to. Its number is not another's soon: this one has the number
    /// that the kernel gives out first.
    pub(super) fn ignore(&mut self, own: &Rtnetlink) {
        self.own = Some(own.port());
    }

    /// What has happened since the last call; none when nothing has.
    pub(super) fn hear(&self) -> Option<Heard> {
        self.changes.drain(self.own)
    }

    /// To wait on.
    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.changes.as_fd()
    }
}
