//! Registering metrics: names, help texts, and every series from the start.

use std::sync::Arc;

use prometheus_client::{
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

use super::{
    labels::Labels,
    sampled::{Read, Sampled},
};

/// From 100 µs to 26 s, four to a factor of ten: an enrolment takes milliseconds, one that waits for ztunnel seconds.
const DURATIONS: [f64; 19] = [
    0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.003, 0.004, 0.006, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25,
    0.5, 1.0, 2.5, 10.0, 25.0,
];

pub(super) fn durations() -> Histogram {
    Histogram::new(DURATIONS)
}

pub(super) type Histograms<L> = Family<L, Histogram, fn() -> Histogram>;

/// Whether dashboards may rely on a metric.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Stability {
    Stable,
    Unstable,
}

/// Registers under a name and with a help text.
pub(super) struct Book(pub(super) Registry);

impl Book {
    pub(super) fn help(stability: Stability, help: &str) -> String {
        match stability {
            Stability::Stable => format!("[STABLE] {help}"),
            Stability::Unstable => format!("[UNSTABLE] {help}"),
        }
    }

    pub(super) fn one<M: prometheus_client::registry::Metric + Clone>(
        &mut self,
        name: &str,
        stability: Stability,
        help: &str,
        metric: M,
    ) -> M {
        self.0
            .register(name, Self::help(stability, help), metric.clone());
        metric
    }

    pub(super) fn counter(&mut self, name: &str, stability: Stability, help: &str) -> Counter {
        self.one(name, stability, help, Counter::default())
    }

    pub(super) fn gauge(&mut self, name: &str, stability: Stability, help: &str) -> Gauge {
        self.one(name, stability, help, Gauge::default())
    }

    pub(super) fn gauges<L: Labels>(
        &mut self,
        name: &str,
        stability: Stability,
        help: &str,
    ) -> Family<L, Gauge> {
        let family = self.one(name, stability, help, Family::<L, Gauge>::default());
        for labels in L::every() {
            drop(family.get_or_create(&labels));
        }
        family
    }

    pub(super) fn counters<L: Labels>(
        &mut self,
        name: &str,
        stability: Stability,
        help: &str,
    ) -> Family<L, Counter> {
        let family = self.one(name, stability, help, Family::<L, Counter>::default());
        for labels in L::every() {
            drop(family.get_or_create(&labels));
        }
        family
    }

    pub(super) fn histograms<L: Labels>(
        &mut self,
        name: &str,
        stability: Stability,
        help: &str,
    ) -> Histograms<L> {
        let new: fn() -> Histogram = durations;
        let family = self.one(name, stability, help, Family::new_with_constructor(new));
        for labels in L::every() {
            drop(family.get_or_create(&labels));
        }
        family
    }

    pub(super) fn sampled(
        &mut self,
        name: &'static str,
        stability: Stability,
        help: &str,
        labels: &'static [&'static str],
        gauge: bool,
        read: Read,
    ) -> Arc<Sampled> {
        // The registry ends the help texts of what it keeps with a full stop.
        let help = format!("{}.", Self::help(stability, help));
        let sampled = Arc::new(Sampled::new(name, help, labels, gauge, read));
        self.0.register_collector(Box::new(Arc::clone(&sampled)));
        sampled
    }
}
