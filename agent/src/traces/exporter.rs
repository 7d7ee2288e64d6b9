//! The way to the collector: batches of spans over gRPC from a thread of their own, through a queue that does not grow.
//!
//! A collector that is away costs the spans that do not fit the queue, a line of log when it goes and one when it is back.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use opentelemetry::{KeyValue, trace::TracerProvider as _};
use opentelemetry_otlp::{SpanExporter as Otlp, WithExportConfig as _};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    trace::{BatchConfigBuilder, BatchSpanProcessor, SdkTracerProvider, SpanData, SpanExporter},
};

use super::{TRACER, keys};
use crate::{
    admin::{
        Metrics,
        labels::{By, SpanOutcome},
    },
    config::Collector,
};

/// Spans that wait for the collector: some hundred bytes each.
const QUEUE: usize = 512;
/// Spans in one message.
const BATCH: usize = 128;
/// How long the collector may take for a message.
const ANSWER: Duration = Duration::from_secs(5);
/// How long what is left is tried to be sent at the end.
const LAST: Duration = Duration::from_secs(2);

/// Sends spans until it is finished.
#[derive(Debug)]
pub struct Exporter(SdkTracerProvider);

/// Begins to export. Once in a process, inside its runtime; the collector need not be there.
pub fn start(
    collector: &Collector,
    node: &str,
    metrics: Arc<Metrics>,
) -> Result<Exporter, opentelemetry_otlp::ExporterBuildError> {
    let otlp = Otlp::builder()
        .with_tonic()
        .with_endpoint(collector.url())
        .with_timeout(ANSWER)
        .build()?;
    let counted = Counted {
        inner: otlp,
        collector: collector.url().to_owned(),
        metrics,
        away: AtomicBool::new(false),
    };
    let bounds = BatchConfigBuilder::default()
        .with_max_queue_size(QUEUE)
        .with_max_export_batch_size(BATCH)
        .build();
    let processor = BatchSpanProcessor::builder(counted)
        .with_batch_config(bounds)
        .build();
    // OTEL_RESOURCE_ATTRIBUTES is read by the builder.
    let mut resource = Resource::builder().with_attributes([
        KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
        KeyValue::new(keys::NODE, node.to_owned()),
    ]);
    if std::env::var_os("OTEL_SERVICE_NAME").is_none() {
        resource = resource.with_service_name("culvert");
    }
    let provider = SdkTracerProvider::builder()
        .with_span_processor(processor)
        .with_resource(resource.build())
        .build();
    TRACER.get_or_init(|| provider.tracer("culvert"));
    Ok(Exporter(provider))
}

impl Exporter {
    /// Sends what is left, as far as the collector takes it at once. Blocks.
    pub fn finish(self) {
        if let Err(error) = self.0.shutdown_with_timeout(LAST) {
            tracing::warn!(%error, "the last spans did not reach the collector");
        }
    }
}

/// Counts what becomes of spans, and says when the collector goes and comes.
#[derive(Debug)]
struct Counted {
    inner: Otlp,
    collector: String,
    metrics: Arc<Metrics>,
    away: AtomicBool,
}

impl SpanExporter for Counted {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = u64::try_from(batch.len()).unwrap_or(u64::MAX);
        let result = self.inner.export(batch).await;
        let outcome = match &result {
            Ok(()) => SpanOutcome::Taken,
            Err(_) => SpanOutcome::Lost,
        };
        self.metrics
            .trace_spans
            .get_or_create(&By(outcome))
            .inc_by(spans);
        let was_away = self.away.swap(result.is_err(), Ordering::Relaxed);
        match &result {
            Err(error) if !was_away => tracing::warn!(
                collector = self.collector,
                %error,
                "the collector does not take traces: spans are lost until it does; see that it is there and takes OTLP \
                 over gRPC at this port"
            ),
            Ok(()) if was_away => {
                tracing::info!(
                    collector = self.collector,
                    "the collector takes traces again"
                );
            }
            _ => {}
        }
        result
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}
