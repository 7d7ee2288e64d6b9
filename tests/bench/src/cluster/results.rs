//! What has to be reached, what was, and how that is printed.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::flip::{Flips, Times};
use super::roll::Rolls;
use super::start::Starts;
use crate::stats::Summary;

/// Which of two is larger: so many times as long, or so many milliseconds more.
const START: (f64, f64) = (1.05, 20.0);
const ROLL_RATIO: f64 = 1.03;
const ENROL_S: f64 = 1.5;
const RELEASE_S: f64 = 1.0;

/// Everything measured; parts that were not asked for are missing.
#[derive(Debug, Default)]
pub(super) struct Results {
    pub(super) how: String,
    pub(super) starts: Option<Starts>,
    pub(super) flips: Option<Flips>,
    pub(super) rolls: Option<Rolls>,
}

/// A number and what it has to be at most.
struct Target {
    what: String,
    value: f64,
    limit: f64,
    unit: &'static str,
}

impl Target {
    fn met(&self) -> bool {
        self.value <= self.limit
    }
}

impl Results {
    fn targets(&self) -> Vec<Target> {
        let mut targets = Vec::new();
        let mut at_most = |what: String, value, limit, unit| {
            targets.push(Target {
                what,
                value,
                limit,
                unit,
            });
        };
        if let Some(starts) = &self.starts {
            for (who, with) in [("in the mesh", &starts.mesh), ("outside", &starts.outside)] {
                for (which, with, without) in [
                    ("p50", with.median, starts.without.median),
                    ("p99", with.p99, starts.without.p99),
                ] {
                    let limit = (without * START.0).max(without + START.1);
                    at_most(format!("a pod's start, {who}, {which}"), with, limit, "ms");
                }
            }
        }
        if let Some(flips) = &self.flips {
            let pods = flips.pods;
            let (enrol, release) = (flips.enrol.both.median, flips.release.both.median);
            at_most(
                format!("{pods} running pods enrolled, median"),
                enrol,
                ENROL_S,
                "s",
            );
            at_most(
                format!("{pods} running pods let go, median"),
                release,
                RELEASE_S,
                "s",
            );
        }
        if let Some(rolls) = &self.rolls {
            let what = format!("{} pods rolled out, inside over outside", rolls.pods);
            at_most(what, rolls.ratio.median, ROLL_RATIO, "");
        }
        targets
    }

    /// How many targets were missed.
    pub(super) fn missed(&self) -> usize {
        self.targets().iter().filter(|t| !t.met()).count()
    }

    pub(super) fn json(&self) -> Value {
        let targets: Vec<Value> = self
            .targets()
            .iter()
            .map(|t| json!({"what": t.what, "value": t.value, "at_most": t.limit, "unit": t.unit, "met": t.met()}))
            .collect();
        json!({
            "how": self.how,
            "starts": self.starts.as_ref().map(Starts::json),
            "rolls": self.rolls.as_ref().map(Rolls::json),
            "flips": self.flips.as_ref().map(Flips::json),
            "targets": targets,
        })
    }

    pub(super) fn text(&self) -> String {
        let mut out = format!("{}\n", self.how);
        self.details(&mut out);
        out.push_str("\ntargets\n");
        for target in self.targets() {
            let Target {
                what,
                value,
                limit,
                unit,
            } = &target;
            let met = if target.met() { "met" } else { "MISSED" };
            line(
                &mut out,
                format_args!("  {what:46} {value:8.2} {unit:6} at most {limit:6.2} {unit:6} {met}"),
            );
        }
        out
    }

    fn details(&self, out: &mut String) {
        if let Some(starts) = &self.starts {
            let n = starts.mesh.samples;
            line(
                out,
                format_args!(
                    "\na pod's start, from the request to a watch's showing it ready, {n} of each, in ms: p10 / p50 / p90 / p99"
                ),
            );
            for (what, summary) in [
                ("without Culvert on the node", &starts.without),
                ("with it, outside the mesh", &starts.outside),
                ("with it, in the mesh", &starts.mesh),
            ] {
                let Summary {
                    median,
                    p10,
                    p90,
                    p99,
                    ..
                } = summary;
                line(
                    out,
                    format_args!("  {what:34} {p10:8.0} {median:8.0} {p90:8.0} {p99:8.0}"),
                );
            }
        }
        if let Some(flips) = &self.flips {
            let (pods, n) = (flips.pods, flips.enrol.both.samples);
            line(
                out,
                format_args!(
                    "\n{pods} running pods of one node, after their namespace's label, {n} times, in s: median (p10 to p90)"
                ),
            );
            for (what, times) in [("enrolled", &flips.enrol), ("let go", &flips.release)] {
                let Times {
                    both,
                    ztunnel,
                    annotated,
                } = times;
                for (by, summary) in [
                    ("", both),
                    ("  by ztunnel's list", ztunnel),
                    ("  by all annotations", annotated),
                ] {
                    let Summary {
                        median, p10, p90, ..
                    } = summary;
                    let what = if by.is_empty() { what } else { by };
                    line(
                        out,
                        format_args!("  {what:34} {median:8.2} ({p10:.2} to {p90:.2})"),
                    );
                }
            }
        }
        if let Some(rolls) = &self.rolls {
            let (pods, n) = (rolls.pods, rolls.ratio.samples);
            line(
                out,
                format_args!("\na Deployment of {pods} rolled out, {n} pairs: median (p10 to p90)"),
            );
            for (what, summary) in [
                ("outside the mesh, s", &rolls.outside),
                ("inside, s", &rolls.inside),
                ("ratio of a pair", &rolls.ratio),
            ] {
                let Summary {
                    median, p10, p90, ..
                } = summary;
                line(
                    out,
                    format_args!("  {what:34} {median:8.2} ({p10:.2} to {p90:.2})"),
                );
            }
        }
    }
}

fn line(out: &mut String, text: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    let _infallible = writeln!(out, "{text}");
}
