//! Numbers that other parts of the agent keep for themselves, read when somebody asks for the metrics.

use std::{
    fmt,
    sync::{Mutex, PoisonError},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, LabelSetEncoder, MetricEncoder, NoLabelSet},
    metrics::MetricType,
};

use super::labels;

/// A value under the values of its labels.
pub(super) type Row = (Vec<String>, f64);

/// Where the values come from.
pub(super) type Read = Box<dyn Fn() -> Vec<Row> + Send + Sync>;

/// A metric of that kind.
pub(super) struct Sampled {
    pub(super) name: &'static str,
    pub(super) help: String,
    pub(super) labels: &'static [&'static str],
    pub(super) gauge: bool,
    read: Mutex<Read>,
}

impl Sampled {
    pub(super) fn new(
        name: &'static str,
        help: String,
        labels: &'static [&'static str],
        gauge: bool,
        read: Read,
    ) -> Self {
        Self {
            name,
            help,
            labels,
            gauge,
            read: Mutex::new(read),
        }
    }

    pub(super) fn read_from(&self, read: Read) {
        *self.read.lock().unwrap_or_else(PoisonError::into_inner) = read;
    }
}

impl fmt::Debug for Sampled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

#[derive(Debug)]
struct Pairs<'a>(&'static [&'static str], &'a [String]);

impl EncodeLabelSet for Pairs<'_> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        let mut pairs = self.0.iter().zip(self.1);
        pairs.try_for_each(|(name, value)| labels::encode(encoder, name, value))
    }
}

impl Collector for Sampled {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let rows = (self.read.lock().unwrap_or_else(PoisonError::into_inner))();
        let kind = if self.gauge {
            MetricType::Gauge
        } else {
            MetricType::Counter
        };
        let mut metric = encoder.encode_descriptor(self.name, &self.help, None, kind)?;
        for (values, value) in rows {
            let labels = Pairs(self.labels, &values);
            if self.labels.is_empty() {
                self.put(&mut metric, value)?;
            } else {
                self.put(&mut metric.encode_family(&labels)?, value)?;
            }
        }
        Ok(())
    }
}

impl Sampled {
    fn put(&self, to: &mut MetricEncoder<'_>, value: f64) -> fmt::Result {
        if self.gauge {
            to.encode_gauge(&value)
        } else {
            to.encode_counter::<NoLabelSet, _, u64>(&value, None)
        }
    }
}
