//! Medians and spread of samples, and the order in which things are measured. It knows nothing of what they are.

use serde_json::{Value, json};

/// What is kept of a set of samples.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Summary {
    pub(crate) median: f64,
    pub(crate) p10: f64,
    pub(crate) p90: f64,
    pub(crate) p99: f64,
    pub(crate) samples: usize,
}

impl Summary {
    /// Of samples in any order; all zero for none.
    pub(crate) fn of(mut samples: Vec<f64>) -> Self {
        samples.sort_by(f64::total_cmp);
        let at = |percent: usize| {
            let last = samples.len().saturating_sub(1);
            // The nearest rank that is not below.
            let rank = (last * percent).div_ceil(100);
            samples.get(rank).copied().unwrap_or(0.0)
        };
        Self {
            median: at(50),
            p10: at(10),
            p90: at(90),
            p99: at(99),
            samples: samples.len(),
        }
    }

    pub(crate) fn json(&self) -> Value {
        json!({
            "median": self.median, "p10": self.p10, "p90": self.p90, "p99": self.p99,
            "samples": self.samples,
        })
    }
}

/// Shuffles, so that no way always follows the same other.
#[derive(Debug)]
pub(crate) struct Shuffle(u64);

impl Shuffle {
    pub(crate) fn new() -> Self {
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default();
        Self(now.as_secs().rotate_left(32) ^ u64::from(now.subsec_nanos()) | 1)
    }

    /// Xorshift: what it decides needs no better.
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            let bound = u64::try_from(i + 1).unwrap_or(1);
            let j = usize::try_from(self.next() % bound).unwrap_or(0);
            items.swap(i, j);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_samples() {
        let summary = Summary::of((0..=100).rev().map(f64::from).collect());
        assert_eq!(
            (summary.p10, summary.median, summary.p90, summary.p99),
            (10.0, 50.0, 90.0, 99.0)
        );
        assert_eq!(Summary::of(vec![3.0]).p99, 3.0);
        assert_eq!(Summary::of(Vec::new()).samples, 0);
    }

    #[test]
    fn shuffling_loses_nothing() {
        let mut items: Vec<u32> = (0..50).collect();
        Shuffle::new().shuffle(&mut items);
        items.sort_unstable();
        assert_eq!(items, (0..50).collect::<Vec<_>>());
    }
}
