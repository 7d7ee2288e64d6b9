//! What a pod's trace says of the steps taken for it.

use std::{fmt, time::Duration};

use super::{entry::Entry, world::Failure};
use crate::{
    plan::pod::{Step, Wish},
    traces::{Taken, keys},
};

impl<P: fmt::Debug> Entry<P> {
    /// Notes a step, and how it ended.
    pub(super) fn trace_step(
        &mut self,
        step: Step,
        repair: bool,
        took: Duration,
        failure: Option<&Failure>,
        cookie: impl FnOnce(&P) -> u64,
    ) {
        let kind = match self.wish {
            Wish::In if repair || self.journey.is("repair") => "repair",
            Wish::In => "enrol",
            Wish::Out => "un-enrol",
            Wish::Ended | Wish::Gone => "let go",
            Wish::Keep => return,
        };
        let Some(name) = name(step) else {
            return;
        };
        let result = failure.map_or(Ok(()), |f| Err(f.message.as_str()));
        let taken = Taken {
            kind,
            step: name,
            took,
            result,
        };
        let (target, place) = (&self.target, &self.place);
        self.journey.took(taken, target, |trace| {
            trace.set(keys::POD, target.name.clone());
            trace.set(keys::NAMESPACE, target.namespace.clone());
            trace.set(keys::UID, target.uid.to_string());
            if let Some(place) = place {
                trace.set(keys::COOKIE, cookie(place).to_string());
            }
        });
    }
}

fn name(step: Step) -> Option<&'static str> {
    Some(match step {
        Step::Attach => "capture",
        Step::Tell => "ztunnel ack",
        Step::Annotate(_) => "annotate",
        Step::Release => "release",
        Step::Detach => "detach",
        Step::Untell => "ztunnel lets go",
        Step::Forget => "clear away",
        // Looked at again and again until the last old connection has ended.
        Step::Wait | Step::Find | Step::Done => return None,
    })
}
