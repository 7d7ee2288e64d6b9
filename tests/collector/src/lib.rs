//! A collector of traces for tests: OTLP's own gRPC service, which keeps what it is sent.
//!
//! It knows the protocol by its published definition and nothing of Culvert.

use std::{
    collections::BTreeMap,
    net::TcpListener,
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::{Context as _, Result};
use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::{KeyValue, any_value::Value},
    trace::v1::{Span, status::StatusCode},
};
use tokio::runtime::Runtime;
use tonic::{Request, Response, Status, transport::Server, transport::server::TcpIncoming};

/// A span as it was sent.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Its name.
    pub name: String,
    /// The trace it belongs to.
    pub trace: Vec<u8>,
    /// Its id there.
    pub id: Vec<u8>,
    /// What it is a part of; empty: nothing.
    pub parent: Vec<u8>,
    /// When it began, in nanoseconds.
    pub start: u64,
    /// When it ended.
    pub end: u64,
    /// Its attributes, and those of whoever sent it.
    pub attributes: BTreeMap<String, String>,
    /// Its error.
    pub error: Option<String>,
}

/// A collector; it goes away with the value.
#[derive(Debug)]
pub struct Collector {
    seen: Arc<Mutex<Vec<Seen>>>,
    runtime: Option<Runtime>,
}

impl Drop for Collector {
    fn drop(&mut self) {
        // A test may itself run in a runtime, where waiting for another is forbidden.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Collector {
    /// Serves at this listener.
    pub fn serve(listener: TcpListener) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .context("starting the collector's runtime")?;
        listener.set_nonblocking(true)?;
        let listener = {
            let _inside = runtime.enter();
            tokio::net::TcpListener::from_std(listener)?
        };
        let seen = Arc::new(Mutex::new(Vec::new()));
        let service = TraceServiceServer::new(Service(Arc::clone(&seen)));
        runtime.spawn(
            Server::builder()
                .add_service(service)
                .serve_with_incoming(TcpIncoming::from(listener)),
        );
        Ok(Self {
            seen,
            runtime: Some(runtime),
        })
    }

    /// Every span so far.
    #[must_use]
    pub fn seen(&self) -> Vec<Seen> {
        let seen = self.seen.lock();
        seen.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The first span of this name, if one has come.
    #[must_use]
    pub fn span(&self, name: &str) -> Option<Seen> {
        self.seen().into_iter().find(|s| s.name == name)
    }

    /// The parts of a span, by their beginning.
    #[must_use]
    pub fn parts(&self, of: &Seen) -> Vec<Seen> {
        let mut parts = self.seen();
        parts.retain(|s| s.trace == of.trace && s.parent == of.id);
        parts.sort_by_key(|s| s.start);
        parts
    }
}

struct Service(Arc<Mutex<Vec<Seen>>>);

#[tonic::async_trait]
impl TraceService for Service {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for resource in request.into_inner().resource_spans {
            let sender = resource.resource.map(|r| r.attributes).unwrap_or_default();
            let spans = resource.scope_spans.into_iter().flat_map(|s| s.spans);
            let seen = spans.map(|span| seen(span, &sender));
            let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            all.extend(seen);
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

fn seen(span: Span, sender: &[KeyValue]) -> Seen {
    let error = span.status.filter(|s| s.code() == StatusCode::Error);
    let attributes = sender.iter().chain(&span.attributes);
    Seen {
        attributes: attributes.filter_map(text).collect(),
        name: span.name,
        trace: span.trace_id,
        id: span.span_id,
        parent: span.parent_span_id,
        start: span.start_time_unix_nano,
        end: span.end_time_unix_nano,
        error: error.map(|s| s.message),
    }
}

fn text(attribute: &KeyValue) -> Option<(String, String)> {
    let value = match attribute.value.as_ref()?.value.as_ref()? {
        Value::StringValue(text) => text.clone(),
        Value::IntValue(number) => number.to_string(),
        other => format!("{other:?}"),
    };
    Some((attribute.key.clone(), value))
}
