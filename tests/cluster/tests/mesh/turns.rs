//! Who may be on a shared cluster at a time: many tests that leave it as it is, or one that disturbs it.

use std::sync::{Condvar, Mutex, PoisonError};

/// How many are on it; none while one of them is alone.
pub(crate) static ON_IT: Mutex<Option<usize>> = Mutex::new(Some(0));
pub(crate) static CHANGED: Condvar = Condvar::new();

/// A turn on the cluster.
pub(crate) struct Turn(());

/// With others. Who waits to be alone is not waited for: a test may take several turns.
pub(crate) fn shared() -> Turn {
    let on_it = ON_IT.lock().unwrap_or_else(PoisonError::into_inner);
    let mut on_it = CHANGED
        .wait_while(on_it, |on_it| on_it.is_none())
        .unwrap_or_else(PoisonError::into_inner);
    *on_it = on_it.map(|others| others + 1);
    Turn(())
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut on_it = ON_IT.lock().unwrap_or_else(PoisonError::into_inner);
        *on_it = on_it.map(|others| others - 1);
        CHANGED.notify_all();
    }
}
