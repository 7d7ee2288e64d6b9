//! A loop beside a test, ended whatever becomes of the test.

use std::sync::atomic::{AtomicBool, Ordering};

/// Sets a flag when it is dropped. A scope of threads waits for all of them before it passes a panic on: a loop in it that
/// is told to stop behind what may panic would never end.
#[derive(Debug)]
pub struct Stop<'a>(&'a AtomicBool);

impl<'a> Stop<'a> {
    /// Sets this one.
    pub fn at_the_end(flag: &'a AtomicBool) -> Self {
        Self(flag)
    }
}

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}
