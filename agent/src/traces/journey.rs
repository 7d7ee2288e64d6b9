//! A pod's way into the mesh or out of it, as one trace: begun by the first step taken, ended when the pod rests or a step
//! fails. What the plugin waits for is part of the plugin's trace; what follows it, such as the annotation, too.

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use opentelemetry::trace::{SpanContext, SpanKind};

use super::{TRACER, Trace, current, keys};

/// The trace of one pod; empty while nothing is done for it, and always without a collector.
#[derive(Debug, Default)]
pub struct Journey {
    open: Option<Open>,
    /// Who waits for what is done next.
    asked_by: Option<SpanContext>,
}

#[derive(Debug)]
struct Open {
    trace: Trace,
    kind: &'static str,
    last: SystemTime,
}

/// A step that was taken.
#[derive(Clone, Copy, Debug)]
pub struct Taken<'a> {
    /// What the whole is: `enrol`, `repair`, `un-enrol`, `let go`.
    pub kind: &'static str,
    /// The step's name.
    pub step: &'static str,
    /// How long it took.
    pub took: Duration,
    /// How it ended.
    pub result: Result<(), &'a str>,
}

impl Journey {
    /// What is done for the pod from now on is part of what runs now.
    pub fn asked_for(&mut self) {
        if let Some(by) = current() {
            self.open = None;
            self.asked_by = Some(by);
        }
    }

    /// Notes a step; `about` says whose it is, and is asked only when a trace begins.
    pub fn took(
        &mut self,
        taken: Taken<'_>,
        pod: &impl fmt::Display,
        about: impl FnOnce(&mut Trace),
    ) {
        if TRACER.get().is_none() {
            return;
        }
        let now = SystemTime::now();
        if self.open.as_ref().is_some_and(|o| o.kind != taken.kind) {
            self.rests();
        }
        if self.open.is_none() {
            let name = format!("{} {pod}", taken.kind);
            let parent = self.asked_by.take();
            let kind = SpanKind::Internal;
            let begun = Trace::at(name, kind, parent.as_ref(), now - taken.took);
            self.open = begun.map(|mut trace| {
                about(&mut trace);
                Open {
                    trace,
                    kind: taken.kind,
                    last: now,
                }
            });
        }
        let Some(mut open) = self.open.take() else {
            return;
        };
        open.last = open.trace.step(taken.step, taken.took, taken.result);
        match taken.result {
            Ok(()) => self.open = Some(open),
            Err(why) => {
                open.trace.set(keys::OUTCOME, "failed");
                open.trace.end(Err(why));
            }
        }
    }

    /// Is it of this kind?
    #[must_use]
    pub fn is(&self, kind: &str) -> bool {
        self.open.as_ref().is_some_and(|o| o.kind == kind)
    }

    /// Nothing is left to do for the pod.
    pub fn rests(&mut self) {
        if let Some(mut open) = self.open.take() {
            open.trace.set(keys::OUTCOME, "done");
            open.trace.end_at(Ok(()), open.last);
        }
    }
}
