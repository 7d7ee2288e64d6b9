//! Traces by OTLP: what was done for a pod, step by step, and when the API server was away.
//!
//! Decides nothing and holds nobody up: spans that a collector does not take are counted and lost. Without a collector
//! configured there is no exporter, no thread and no span: every function here then looks at one empty cell.

mod exporter;
mod journey;

use std::{
    borrow::Cow,
    sync::OnceLock,
    time::{Duration, SystemTime},
};

use opentelemetry::{
    Context, KeyValue, Value,
    context::FutureExt as _,
    trace::{Span as _, SpanContext, SpanKind, Status, TraceContextExt as _, Tracer as _},
};
use opentelemetry_sdk::trace::{SdkTracer, Span};

pub use exporter::{Exporter, start};
pub use journey::{Journey, Taken};

/// Attributes of spans, by the names of OpenTelemetry's conventions where there are any.
pub mod keys {
    /// The pod.
    pub const POD: &str = "k8s.pod.name";
    /// Its namespace.
    pub const NAMESPACE: &str = "k8s.namespace.name";
    /// Its UID.
    pub const UID: &str = "k8s.pod.uid";
    /// The node.
    pub const NODE: &str = "k8s.node.name";
    /// The runtime's name for the sandbox.
    pub const CONTAINER: &str = "container.id";
    /// The network namespace, as the plugin names it.
    pub const NETNS: &str = "culvert.netns";
    /// Its cookie.
    pub const COOKIE: &str = "culvert.netns.cookie";
    /// How it ended, in a word.
    pub const OUTCOME: &str = "culvert.outcome";
    /// Why, in words.
    pub const REASON: &str = "culvert.reason";
    /// What is watched.
    pub const WATCHED: &str = "culvert.watched";
    /// Failures in a row.
    pub const FAILURES: &str = "culvert.failures";
}

/// Where spans go; empty = nowhere.
static TRACER: OnceLock<SdkTracer> = OnceLock::new();

/// Something that takes time, exported once it has ended. One that is dropped was given up.
#[derive(Debug)]
pub struct Trace {
    span: Span,
    ended: bool,
}

impl Trace {
    /// Begins one, as a part of what [`within`] runs if that is the case; none without a collector.
    #[must_use]
    pub fn begin(name: &'static str, kind: SpanKind) -> Option<Self> {
        Self::at(name, kind, None, SystemTime::now())
    }

    fn at(
        name: impl Into<Cow<'static, str>>,
        kind: SpanKind,
        parent: Option<&SpanContext>,
        started: SystemTime,
    ) -> Option<Self> {
        let tracer = TRACER.get()?;
        let parent = match parent {
            Some(parent) => Context::new().with_remote_span_context(parent.clone()),
            None => Context::current(),
        };
        let builder = tracer
            .span_builder(name)
            .with_kind(kind)
            .with_start_time(started);
        Some(Self {
            span: builder.start_with_context(tracer, &parent),
            ended: false,
        })
    }

    /// Notes something about it.
    pub fn set(&mut self, key: &'static str, value: impl Into<Value>) {
        self.span.set_attribute(KeyValue::new(key, value));
    }

    /// A part of it that has just ended; when that was.
    pub fn step(&self, name: &'static str, took: Duration, result: Result<(), &str>) -> SystemTime {
        let now = SystemTime::now();
        let started = now - took;
        let part = Self::at(
            name,
            SpanKind::Internal,
            Some(self.span.span_context()),
            started,
        );
        if let Some(part) = part {
            part.end_at(result, now);
        }
        now
    }

    /// It has ended, well or with this error.
    pub fn end(self, result: Result<(), &str>) {
        self.end_at(result, SystemTime::now());
    }

    /// It ended then.
    pub fn end_at(mut self, result: Result<(), &str>, then: SystemTime) {
        if let Err(why) = result {
            self.span.set_status(Status::error(why.to_owned()));
        }
        self.ended = true;
        self.span.end_with_timestamp(then);
    }

    fn parent(&self) -> SpanContext {
        self.span.span_context().clone()
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        if !self.ended {
            self.span.set_status(Status::error("given up"));
        }
    }
}

/// Runs something as a part of a trace, if there is one.
pub async fn within<T>(trace: Option<&Trace>, work: impl Future<Output = T>) -> T {
    match trace {
        None => work.await,
        Some(trace) => {
            let context = Context::new().with_remote_span_context(trace.parent());
            work.with_context(context).await
        }
    }
}

/// What this runs as a part of.
fn current() -> Option<SpanContext> {
    TRACER.get()?;
    Context::map_current(|context| {
        let span = context.span();
        let context = span.span_context();
        context.is_valid().then(|| context.clone())
    })
}
