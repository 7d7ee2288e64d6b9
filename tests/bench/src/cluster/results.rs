//! What has to be reached, what was, and how that is printed.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::cost::{Asked, Cost, Idle};
use super::flip::{Flips, Times};
use super::others::Others;
use super::roll::Rolls;
use super::start::Starts;
use crate::process::Memory;
use crate::stats::Summary;

/// Which of two is larger: so many times as long, or so many milliseconds more.
const START: (f64, f64) = (1.05, 20.0);
const ROLL_RATIO: f64 = 1.03;
const ENROL_S: f64 = 1.5;
const RELEASE_S: f64 = 1.0;
const REQUESTS_A_MINUTE: f64 = 2.0;
const REQUESTS_A_POD: f64 = 2.0;
const RSS_MIB: f64 = 20.0;
const READY_S: f64 = 1.0;

/// Everything measured; parts that were not asked for are missing.
#[derive(Debug, Default)]
pub(super) struct Results {
    pub(super) how: String,
    pub(super) starts: Option<Starts>,
    pub(super) flips: Option<Flips>,
    pub(super) rolls: Option<Rolls>,
    pub(super) cost: Option<Cost>,
    /// With so many pods enrolled, in seconds.
    pub(super) restarts: Option<(usize, Summary)>,
    pub(super) others: Option<Others>,
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
            let each = rolls.asked.each();
            at_most(
                "requests for a pod that starts in the mesh".into(),
                each,
                REQUESTS_A_POD,
                "",
            );
        }
        if let Some(Cost { enrolled, idle }) = &self.cost {
            let pods = enrolled.pods;
            let each = enrolled.each();
            at_most(
                "requests for a running pod enrolled".into(),
                each,
                REQUESTS_A_POD,
                "",
            );
            let minute = idle.requests();
            at_most(
                "requests a minute, nothing changes".into(),
                minute,
                REQUESTS_A_MINUTE,
                "",
            );
            let rss = mib(idle.memory.rss);
            at_most(format!("resident, {pods} enrolled"), rss, RSS_MIB, "MiB");
        }
        if let Some((pods, ready)) = &self.restarts {
            let what = format!("start to ready, {pods} enrolled, median");
            at_most(what, ready.median, READY_S, "s");
        }
        if let Some(others) = &self.others {
            let minute = others.idle.requests();
            at_most(
                "requests a minute, with all these".into(),
                minute,
                REQUESTS_A_MINUTE,
                "",
            );
            let rss = mib(others.resident());
            at_most("resident, with all these".into(), rss, RSS_MIB, "MiB");
            let held = others.held as f64;
            at_most("names of others' pods in its memory".into(), held, 0.0, "");
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
            "cost": self.cost.as_ref().map(Cost::json),
            "restarts": self.restarts.as_ref().map(|(pods, ready)| json!({"unit": "s", "pods": pods, "ready": ready.json()})),
            "others": self.others.as_ref().map(Others::json),
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
                    "\na pod's start, from the request to a watch's showing it ready, {n} of each, in ms: p10 / p50 / p90 / p99; p50 and p99 as ratios to those without"
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
                let without = &starts.without;
                let (middle, tail) = (median / without.median, p99 / without.p99);
                line(
                    out,
                    format_args!(
                        "  {what:34} {p10:8.0} {median:8.0} {p90:8.0} {p99:8.0} {middle:8.3} {tail:8.3}"
                    ),
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
            asked(out, &rolls.asked);
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
        if let Some(Cost { enrolled, idle }) = &self.cost {
            line(
                out,
                format_args!(
                    "\n{} pods enrolled by their namespace's label",
                    enrolled.pods
                ),
            );
            asked(out, enrolled);
            still(out, idle);
        }
        if let Some((pods, ready)) = &self.restarts {
            line(
                out,
                format_args!(
                    "\nnew agent, {pods} pods enrolled, {} times, from its process to /readyz: {:.2} s ({:.2} to {:.2})",
                    ready.samples, ready.median, ready.p10, ready.p90
                ),
            );
        }
        if let Some(others) = &self.others {
            let (namespaces, pods) = (others.namespaces, others.pods);
            line(
                out,
                format_args!(
                    "\nthe same with {namespaces} namespaces more and {pods} pods of other nodes"
                ),
            );
            still(out, &others.idle);
            memory(out, "resident, after a restart", &others.restarted);
            line(
                out,
                format_args!(
                    "  found in its memory: names of others' pods {}, of those that ask for the mesh {}, of one of its own {}",
                    others.held, others.asking, others.own
                ),
            );
        }
    }
}

fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}

fn memory(out: &mut String, what: &str, memory: &Memory) {
    let Memory {
        rss,
        anonymous,
        file,
        peak,
    } = memory;
    line(
        out,
        format_args!(
            "  {what:34} {:8.2} MiB = anonymous {:.2} + file {:.2} (peak {:.2})",
            mib(*rss),
            mib(*anonymous),
            mib(*file),
            mib(*peak)
        ),
    );
}

fn asked(out: &mut String, asked: &Asked) {
    let kinds: Vec<_> = asked
        .kinds
        .iter()
        .map(|(what, count)| format!("{count} {what}"))
        .collect();
    line(
        out,
        format_args!(
            "  requests a pod, {} pods            {:8.2} = {}",
            asked.pods,
            asked.each(),
            kinds.join(", ")
        ),
    );
}

fn still(out: &mut String, idle: &Idle) {
    line(
        out,
        format_args!(
            "  nothing changes for {:.0} s: {:.2} % of a processor",
            idle.seconds, idle.percent
        ),
    );
    line(
        out,
        format_args!(
            "  requests a minute                  {:8.2} = counted {:.2} + watches renewed {:.2}",
            idle.requests(),
            idle.asked,
            idle.renewed
        ),
    );
    memory(out, "resident", &idle.memory);
}

fn line(out: &mut String, text: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    let _infallible = writeln!(out, "{text}");
}
