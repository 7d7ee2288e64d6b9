//! What the watch counts; whoever exports metrics reads it here.

use std::sync::atomic::{AtomicU64, Ordering};

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
