//! Is the agent alive, and is it ready? Readiness is a set of named tasks, each with its reason.

use std::{
    fmt::Write as _,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

/// The tasks, shared by all who have one.
#[derive(Clone, Debug, Default)]
pub struct Readiness(Arc<Mutex<Vec<Entry>>>);

#[derive(Debug)]
struct Entry {
    name: &'static str,
    /// With what deserves attention all the same, or why not.
    state: Result<String, String>,
    since: Instant,
}

/// One task, for the part of the agent that knows how it stands.
#[derive(Clone, Debug)]
pub struct Task {
    readiness: Readiness,
    name: &'static str,
}

/// How one task stands.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TaskReport {
    /// Name.
    pub name: String,
    /// Done, or in order.
    pub ready: bool,
    /// Why it is not; when it is, what deserves attention all the same, mostly nothing.
    pub reason: String,
    /// For how long it has been so.
    pub for_seconds: u64,
}

/// How all stand.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ReadinessReport {
    /// All tasks are ready, and there is one at least.
    pub ready: bool,
    /// In the order in which they were named.
    pub tasks: Vec<TaskReport>,
}

impl Readiness {
    /// Names a task; it is not ready until it says so. The same name again is the same task.
    #[must_use]
    pub fn task(&self, name: &'static str) -> Task {
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !entries.iter().any(|e| e.name == name) {
            entries.push(Entry {
                name,
                state: Err("not begun yet".to_owned()),
                since: Instant::now(),
            });
        }
        drop(entries);
        Task {
            readiness: self.clone(),
            name,
        }
    }

    /// How all stand.
    #[must_use]
    pub fn report(&self) -> ReadinessReport {
        let entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let report = |e: &Entry| TaskReport {
            name: e.name.to_owned(),
            ready: e.state.is_ok(),
            reason: match &e.state {
                Ok(text) | Err(text) => text.clone(),
            },
            for_seconds: e.since.elapsed().as_secs(),
        };
        let tasks: Vec<TaskReport> = entries.iter().map(report).collect();
        ReadinessReport {
            ready: !tasks.is_empty() && tasks.iter().all(|t| t.ready),
            tasks,
        }
    }
}

impl Task {
    /// It is in order.
    pub fn set_ready(&self) {
        self.set(Ok(String::new()));
    }

    /// It is in order, and something deserves attention; nothing does when that is empty.
    pub fn set_ready_but(&self, attention: impl Into<String>) {
        self.set(Ok(attention.into()));
    }

    /// It is not, and why.
    pub fn set_not_ready(&self, reason: impl Into<String>) {
        self.set(Err(reason.into()));
    }

    fn set(&self, state: Result<String, String>) {
        let mut entries = self
            .readiness
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let Some(entry) = entries.iter_mut().find(|e| e.name == self.name) else {
            return;
        };
        if entry.state == state {
            return;
        }
        match &state {
            Ok(attention) => tracing::info!(task = self.name, attention, "ready"),
            Err(reason) => tracing::warn!(task = self.name, %reason, "not ready"),
        }
        if entry.state.is_ok() != state.is_ok() {
            entry.since = Instant::now();
        }
        entry.state = state;
    }
}

impl ReadinessReport {
    /// For people: one line a task.
    #[must_use]
    pub fn to_text(&self) -> String {
        let mut text = String::from(if self.ready { "ready\n" } else { "not ready\n" });
        for task in &self.tasks {
            let state = if task.ready { "ok" } else { "WAIT" };
            let line = format!(
                "{state:<4}  {}  {}s  {}",
                task.name, task.for_seconds, task.reason
            );
            writeln!(text, "{}", line.trim_end()).unwrap_or_default();
        }
        text
    }
}

/// Whether the reconcile loop goes round.
#[derive(Clone, Debug)]
pub struct Liveness {
    started: Instant,
    /// Milliseconds after the start.
    last: Arc<AtomicU64>,
    limit: Duration,
}

impl Liveness {
    /// Dead when nothing has been heard for `limit`; starting counts as a sign of life.
    #[must_use]
    pub fn new(limit: Duration) -> Self {
        Self {
            started: Instant::now(),
            last: Arc::default(),
            limit,
        }
    }

    /// A sign of life.
    pub fn beat(&self) {
        let now = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last.store(now, Ordering::Relaxed);
    }

    /// How long ago the last one was; an error when that is too long.
    pub fn check(&self) -> Result<Duration, Duration> {
        let last = Duration::from_millis(self.last.load(Ordering::Relaxed));
        let silent = self.started.elapsed().saturating_sub(last);
        if silent > self.limit {
            Err(silent)
        } else {
            Ok(silent)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_when_every_named_task_is() {
        let readiness = Readiness::default();
        assert!(
            !readiness.report().ready,
            "an agent that has named nothing has not begun"
        );
        let (installed, listed) = (
            readiness.task("cni-installed"),
            readiness.task("pods-listed"),
        );
        installed.set_ready();
        assert!(!readiness.report().ready);
        listed.set_not_ready("the API server does not answer");
        let report = readiness.report();
        assert_eq!(report.tasks[1].reason, "the API server does not answer");
        assert!(
            report.to_text().contains("WAIT  pods-listed"),
            "{}",
            report.to_text()
        );
        readiness.task("pods-listed").set_ready();
        assert!(readiness.report().ready);
        installed.set_not_ready("gone");
        assert!(!readiness.report().ready, "readiness is lost again");
        assert_eq!(
            readiness.report().tasks.len(),
            2,
            "the same name is the same task"
        );
    }

    #[test]
    fn a_loop_that_stands_still_is_dead() {
        let liveness = Liveness::new(Duration::from_millis(50));
        assert!(liveness.check().is_ok());
        std::thread::sleep(Duration::from_millis(80));
        assert!(liveness.check().is_err());
        liveness.beat();
        assert!(liveness.check().is_ok());
    }
}
