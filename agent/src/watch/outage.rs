//! The trace of a time in which a watch could not go on, from its first failure until it was well again.

use std::{fmt, time::SystemTime};

use opentelemetry::trace::SpanKind;

use crate::traces::{Trace, keys};

/// Failures of one watch in a row. One that is dropped ended with its last failure: what was resumed and has nothing to
/// say is well again without a word.
#[derive(Debug, Default)]
pub(super) struct Outage(Option<Failing>);

#[derive(Debug)]
struct Failing {
    trace: Option<Trace>,
    failures: i64,
    why: String,
    last: SystemTime,
}

impl Outage {
    /// It failed, for the first time or again.
    pub(super) fn failed(&mut self, what: &str) {
        if self.0.is_none() {
            let Some(mut trace) = Trace::begin("API server away", SpanKind::Client) else {
                return;
            };
            trace.set(keys::WATCHED, what.to_owned());
            self.0 = Some(Failing {
                trace: Some(trace),
                failures: 0,
                why: String::new(),
                last: SystemTime::now(),
            });
        }
        if let Some(failing) = &mut self.0 {
            failing.failures += 1;
            failing.last = SystemTime::now();
        }
    }

    /// Why it failed last.
    pub(super) fn because(&mut self, why: &impl fmt::Display) {
        if let Some(failing) = &mut self.0 {
            failing.why = why.to_string();
        }
    }

    /// The watch is heard again now.
    pub(super) fn over(mut self) {
        if let Some(failing) = &mut self.0 {
            failing.last = SystemTime::now();
        }
    }
}

impl Drop for Failing {
    fn drop(&mut self) {
        if let Some(mut trace) = self.trace.take() {
            trace.set(keys::FAILURES, self.failures);
            trace.end_at(Err(&self.why), self.last);
        }
    }
}
