//! The trace of one ADD: which pod, which sandbox, how it ended.

use culvert_cni::api::{AddReply, AddRequest, Refusal};
use opentelemetry::trace::SpanKind;

use crate::traces::{Trace, keys};

pub(super) fn begin(request: &AddRequest) -> Option<Trace> {
    let mut trace = Trace::begin("ADD", SpanKind::Server)?;
    trace.set(keys::POD, request.pod.name.clone());
    trace.set(keys::NAMESPACE, request.pod.namespace.clone());
    if let Some(uid) = &request.pod.uid {
        trace.set(keys::UID, uid.clone());
    }
    trace.set(keys::CONTAINER, request.container_id.clone());
    trace.set(keys::NETNS, request.netns.clone());
    Some(trace)
}

pub(super) fn end(trace: Option<Trace>, result: &Result<AddReply, Refusal>) {
    let Some(mut trace) = trace else {
        return;
    };
    match result {
        Ok(reply) => {
            let outcome = if reply.enrolled {
                "enrolled"
            } else {
                "outside"
            };
            trace.set(keys::OUTCOME, outcome);
            trace.set(keys::REASON, reply.reason.clone());
            trace.end(Ok(()));
        }
        Err(refusal) => {
            let outcome = if refusal.retry { "retry" } else { "refused" };
            trace.set(keys::OUTCOME, outcome);
            trace.end(Err(&refusal.message));
        }
    }
}
