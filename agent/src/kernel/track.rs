//! Keeping enrolled pods in step with their namespaces: addresses, routes and interfaces that come and go, rules and
//! sysctls that somebody takes away.
//!
//! One rtnetlink subscription per pod; every change is answered by reading the namespace anew ([`super::pod`]), so a
//! lost message costs nothing but the next one. Sysctls tell nobody when they change: they are read in turn, a slice at
//! a time. [`Tracker`] does this on a thread of its own, for pods it is told of; [`Rescanner`] for all it can find.

mod rescan;
mod thread;

use std::{
    collections::BTreeMap,
    ops::Bound::{Excluded, Unbounded},
    os::fd::BorrowedFd,
    sync::Arc,
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
pub use rescan::{Rescanner, Round};
pub use thread::Tracker;

use super::{
    ears::Ears,
    error::{Error, Result},
    netlink::Heard,
    netns::{Netns, NetnsCookie},
    node::Node,
    pod, process,
    verify::Repair,
};

/// What happened to a pod under watch.
#[derive(Debug)]
pub enum Event {
    /// The pod's addresses or interfaces changed, and ours with them.
    Followed {
        /// Which pod.
        cookie: NetnsCookie,
        /// Each change.
        changes: Vec<String>,
    },
    /// Something of ours had been taken away or changed, and is there again.
    Repaired {
        /// Which pod.
        cookie: NetnsCookie,
        /// Each repair.
        repairs: Vec<Repair>,
    },
    /// It is not enrolled, and not watched any more.
    Gone {
        /// Which pod.
        cookie: NetnsCookie,
    },
    /// It could not be brought up to date; tried again.
    Failed {
        /// Which pod.
        cookie: NetnsCookie,
        /// Why.
        error: Error,
    },
}

/// Time after which every pod's sysctls have been looked at, with a margin to the five seconds promised.
const SYSCTL_CYCLE: Duration = Duration::from_secs(4);
/// How often a slice of them is.
const SYSCTL_SLICE: Duration = Duration::from_secs(1);
/// Shortest pause between two answers to one pod; doubles while it keeps changing, so that a pod that flaps cannot keep
/// the agent busy.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
/// Longest.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// After this long without a change the pause is short again.
const CALM: Duration = Duration::from_secs(2);

/// A pod under watch.
#[derive(Debug)]
struct Watched {
    netns: Arc<Netns>,
    /// None until subscribing succeeds.
    ears: Option<Ears>,
    /// What is still to be answered: the last try failed, or nobody has looked yet.
    due: Option<Heard>,
    /// Not before this.
    not_before: Instant,
    pause: Duration,
}

impl Watched {
    /// Subscribes where that is still to be done, and brings the pod up to date; none when it is not enrolled.
    fn answer(&mut self, node: &Node, heard: Heard) -> Result<Option<pod::Synced>> {
        if self.ears.is_none() {
            self.ears = Some(Ears::open(&self.netns.enter()?)?);
        }
        pod::sync(node, &self.netns, heard)
    }

    fn answered(&mut self, now: Instant) {
        if now.saturating_duration_since(self.not_before) > CALM {
            self.pause = FIRST_PAUSE;
        }
        self.not_before = now + self.pause;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
    }
}

/// The pods under watch, for whoever runs the loop.
#[derive(Debug)]
struct Watchlist {
    pods: BTreeMap<NetnsCookie, Watched>,
    /// Sysctls were last read of this one.
    looked_at: Option<NetnsCookie>,
    next_slice: Instant,
}

impl Watchlist {
    fn new() -> Self {
        Self {
            pods: BTreeMap::new(),
            looked_at: None,
            next_slice: Instant::now(),
        }
    }

    /// Takes a pod up. Without ears [`Watchlist::answer`] subscribes, and looks for what changed before.
    fn add(&mut self, netns: Arc<Netns>, ears: Option<Ears>) {
        let due = match ears {
            Some(_) => None,
            None => Some(Heard { interfaces: true }),
        };
        let watched = Watched {
            netns,
            ears,
            due,
            not_before: Instant::now(),
            pause: FIRST_PAUSE,
        };
        self.pods.insert(watched.netns.cookie(), watched);
    }

    /// Waits until a pod changed, `wake` can be read, there is something to do again, or `until`; collects what was
    /// heard.
    fn wait(&mut self, wake: Option<BorrowedFd<'_>>, until: Option<Instant>) {
        let now = Instant::now();
        let mut until = until;
        let mut sooner = |at: Instant| until = Some(until.map_or(at, |u| u.min(at)));
        if !self.pods.is_empty() {
            sooner(self.next_slice);
        }
        let mut listening = Vec::with_capacity(self.pods.len());
        for (cookie, watched) in &self.pods {
            if watched.not_before > now {
                // In its pause: not even listened to, or what it says would wake us all the time.
                sooner(watched.not_before);
                continue;
            }
            if watched.ears.is_some() {
                listening.push(*cookie);
            }
            if watched.due.is_some() {
                sooner(now);
            }
        }
        let mut fds: Vec<PollFd<'_>> = listening
            .iter()
            .filter_map(|cookie| self.pods.get(cookie)?.ears.as_ref())
            .map(Ears::as_fd)
            .chain(wake)
            .map(|fd| PollFd::new(fd, PollFlags::POLLIN))
            .collect();
        let timeout = until.map_or(PollTimeout::NONE, |at| {
            // Rounded up, or the last millisecond would be waited for in a spin.
            let left = at.saturating_duration_since(now) + Duration::from_micros(999);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        if poll(&mut fds, timeout).unwrap_or(0) == 0 {
            return;
        }
        let ready: Vec<bool> = fds
            .iter()
            .map(|fd| fd.revents().is_some_and(|events| !events.is_empty()))
            .collect();
        drop(fds);
        for (cookie, _) in listening.iter().zip(ready).filter(|(_, ready)| *ready) {
            if let Some(watched) = self.pods.get_mut(cookie)
                && let Some(heard) = watched.ears.as_ref().and_then(Ears::hear)
            {
                watched.due.get_or_insert_default().interfaces |= heard.interfaces;
            }
        }
    }

    /// Answers what was heard, and looks at a slice of the sysctls when it is time.
    fn answer(&mut self, node: &Node, tell: &mut dyn FnMut(Event)) {
        let now = Instant::now();
        let mut gone = Vec::new();
        for (cookie, watched) in &mut self.pods {
            if watched.not_before > now {
                continue;
            }
            let Some(heard) = watched.due.take() else {
                continue;
            };
            match watched.answer(node, heard) {
                Ok(Some(synced)) => report(*cookie, synced, tell),
                Ok(None) => gone.push(*cookie),
                Err(error) => {
                    watched.due = Some(heard);
                    tell(Event::Failed {
                        cookie: *cookie,
                        error,
                    });
                }
            }
            watched.answered(Instant::now());
        }
        for cookie in gone {
            self.pods.remove(&cookie);
            tell(Event::Gone { cookie });
        }
        if now >= self.next_slice {
            self.next_slice = now + SYSCTL_SLICE;
            self.look_at_sysctls(node, tell);
            // Nobody tells of the end of a process either, and its id may be another's a moment later.
            if let Err(error) = process::forget_gone(node) {
                tracing::warn!(%error, "looking for named processes that are gone");
            }
        }
    }

    fn look_at_sysctls(&mut self, node: &Node, tell: &mut dyn FnMut(Event)) {
        let slices = SYSCTL_CYCLE.as_secs().div_ceil(SYSCTL_SLICE.as_secs());
        let count = self
            .pods
            .len()
            .div_ceil(usize::try_from(slices).unwrap_or(1));
        for _ in 0..count {
            let after = self
                .looked_at
                .and_then(|last| self.pods.range((Excluded(last), Unbounded)).next());
            let Some((cookie, watched)) = after.or_else(|| self.pods.first_key_value()) else {
                return;
            };
            self.looked_at = Some(*cookie);
            if watched.ears.as_ref().is_none_or(|e| e.sysctls.all_set()) {
                continue;
            }
            match pod::sync_sysctls(node, &watched.netns) {
                Ok(repairs) if repairs.is_empty() => {}
                Ok(repairs) => tell(Event::Repaired {
                    cookie: *cookie,
                    repairs,
                }),
                Err(error) => tell(Event::Failed {
                    cookie: *cookie,
                    error,
                }),
            }
        }
    }
}

fn report(cookie: NetnsCookie, synced: pod::Synced, tell: &mut dyn FnMut(Event)) {
    if !synced.followed.is_empty() {
        tell(Event::Followed {
            cookie,
            changes: synced.followed,
        });
    }
    if !synced.repaired.is_empty() {
        tell(Event::Repaired {
            cookie,
            repairs: synced.repaired,
        });
    }
}
