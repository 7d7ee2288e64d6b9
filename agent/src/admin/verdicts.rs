//! Decisions of the kernel's programs, summed over pods: read when somebody asks, counted so that they never go back.
//!
//! A pod's counters vanish with the pod; what they said last stays in the sum.

use std::{
    collections::HashMap,
    fmt,
    sync::{Mutex, PoisonError},
};

use culvert_ebpf::decide::Verdict;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::{MetricType, counter::ConstCounter},
};

use super::labels::{By, Closed};

/// Counts by [`Verdict`].
pub type Counts = [u64; Verdict::ALL.len()];

/// Gives each pod's counts under its netns cookie; none when they cannot be read now.
pub type VerdictSource = Box<dyn Fn() -> Option<Vec<(u64, Counts)>> + Send + Sync>;

impl Closed for VerdictLabel {
    const NAME: &'static str = "verdict";
    const ALL: &'static [Self] = &Self::LABELS;
    fn word(self) -> &'static str {
        Verdict::ALL[self.0].name()
    }
}

/// A verdict by its number.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct VerdictLabel(usize);

impl VerdictLabel {
    const LABELS: [Self; Verdict::ALL.len()] = {
        let mut labels = [Self(0); Verdict::ALL.len()];
        let mut i = 0;
        while i < labels.len() {
            labels[i] = Self(i);
            i += 1;
        }
        labels
    };
}

/// The sums.
#[derive(Default)]
pub(super) struct Verdicts(Mutex<State>);

struct State {
    source: Option<VerdictSource>,
    living: HashMap<u64, Counts>,
    gone: Counts,
}

impl Default for State {
    fn default() -> Self {
        Self {
            source: None,
            living: HashMap::new(),
            gone: [0; Verdict::ALL.len()],
        }
    }
}

impl fmt::Debug for Verdicts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Verdicts")
    }
}

impl Verdicts {
    pub(super) fn read_from(&self, source: VerdictSource) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).source = Some(source);
    }

    fn sums(&self) -> Counts {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(now) = state.source.as_ref().and_then(|read| read()) {
            state.replace(now);
        }
        let mut sums = state.gone;
        state
            .living
            .values()
            .for_each(|counts| add(&mut sums, counts));
        sums
    }
}

impl State {
    fn replace(&mut self, now: Vec<(u64, Counts)>) {
        let mut before = std::mem::take(&mut self.living);
        for (cookie, counts) in now {
            match before.remove(&cookie) {
                // It was let go and enrolled anew in between.
                Some(last) if last.iter().zip(&counts).any(|(last, now)| last > now) => {
                    add(&mut self.gone, &last)
                }
                _ => {}
            }
            self.living.insert(cookie, counts);
        }
        for last in before.values() {
            add(&mut self.gone, last);
        }
    }
}

fn add(sums: &mut Counts, counts: &Counts) {
    for (sum, count) in sums.iter_mut().zip(counts) {
        *sum = sum.wrapping_add(*count);
    }
}

impl Collector for Verdicts {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let sums = self.sums();
        let mut metric = encoder.encode_descriptor(
            "culvert_decisions",
            "[STABLE] Decisions of the kernel's programs about connections and socket options, over all pods.",
            None,
            MetricType::Counter,
        )?;
        for label in VerdictLabel::ALL {
            let labels = By(*label);
            ConstCounter::new(sums[label.0]).encode(metric.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(captured: u64) -> Counts {
        let mut counts = [0; culvert_ebpf::decide::Verdict::ALL.len()];
        counts[Verdict::Captured as usize] = captured;
        counts
    }

    fn captured(verdicts: &Verdicts) -> u64 {
        verdicts.sums()[Verdict::Captured as usize]
    }

    #[test]
    fn sums_never_go_back() {
        let now = std::sync::Arc::new(Mutex::new(Some(vec![(1, counts(5)), (2, counts(3))])));
        let verdicts = Verdicts::default();
        let read = std::sync::Arc::clone(&now);
        verdicts.read_from(Box::new(move || read.lock().unwrap().clone()));
        assert_eq!(captured(&verdicts), 8);
        assert_eq!(captured(&verdicts), 8, "asking changes nothing");
        *now.lock().unwrap() = Some(vec![(2, counts(4))]);
        assert_eq!(captured(&verdicts), 9, "a pod that is gone stays counted");
        *now.lock().unwrap() = Some(vec![(2, counts(1))]);
        assert_eq!(captured(&verdicts), 10, "enrolled anew, it counts from 0");
        *now.lock().unwrap() = None;
        assert_eq!(
            captured(&verdicts),
            10,
            "what cannot be read now is what it was"
        );
    }
}
