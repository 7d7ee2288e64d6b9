//! What the watch counts; whoever exports metrics reads it here.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// A watch that has not failed for so long goes on: longer than its longest pause and the time a request may take.
pub(super) const WELL_AGAIN: Duration = Duration::from_secs(20);

/// Counters since start.
#[derive(Debug, Default)]
pub struct Stats {
    /// Connections the kernel gave up because the other side had gone silent.
    pub dead_connections: Counter,
    /// Times a watch was interrupted by an error.
    pub interruptions: Counter,
    /// Complete lists read, the first ones included.
    pub lists: Counter,
    /// Objects received, in lists and as changes.
    pub objects: Counter,
    /// Changes after the first list: objects that were not known.
    pub added: Counter,
    /// Those that were.
    pub updated: Counter,
    /// Those that are gone.
    pub deleted: Counter,
    /// Events not written to Kubernetes because there were too many.
    pub events_suppressed: Counter,
    /// Events that the API server did not take.
    pub events_failed: Counter,
    /// What keeps a watch from going on, by what is watched.
    trouble: Mutex<BTreeMap<String, (Instant, String)>>,
}

impl Stats {
    /// Why some watch does not go on at this moment; none while all do.
    #[must_use]
    pub fn trouble(&self) -> Option<String> {
        let trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        // A watch that was resumed and has nothing to say is well again without a word.
        let fresh = trouble.values().filter(|(at, _)| at.elapsed() < WELL_AGAIN);
        let texts: Vec<&str> = fresh.map(|(_, why)| why.as_str()).collect();
        (!texts.is_empty()).then(|| texts.join("; "))
    }

    pub(super) fn set_trouble(&self, what: &str, why: Option<String>) {
        let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        match why {
            Some(why) => drop(trouble.insert(what.to_owned(), (Instant::now(), why))),
            None => drop(trouble.remove(what)),
        }
    }
}

/// One counter.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Its value.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    pub(super) fn add(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}
