//! What the agent has to reach, what it reached, and how that is printed.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::add::Adds;
use super::churn::Churn;
use super::flip::Flips;
use crate::stats::Summary;

const ADD_MESH_MS: f64 = 15.0;
const ADD_OURS_MS: f64 = 4.0;
const ADD_OUTSIDE_MS: f64 = 5.0;
const FLIP_S: f64 = 2.0;
const RSS_MIB: f64 = 20.0;
const IDLE_PERCENT: f64 = 0.5;

/// Processor time while nothing changes.
#[derive(Debug)]
pub(super) struct Idle {
    pub(super) seconds: f64,
    /// Of one processor.
    pub(super) percent: f64,
}

/// Everything measured; parts that were not asked for are missing.
#[derive(Debug, Default)]
pub(super) struct Results {
    pub(super) how: String,
    pub(super) flips: Option<Flips>,
    pub(super) idle: Option<Idle>,
    pub(super) adds: Option<Adds>,
    pub(super) churn: Option<Churn>,
}

/// A number and what it has to be at most.
struct Target {
    what: &'static str,
    value: f64,
    limit: f64,
    unit: &'static str,
}

impl Target {
    fn met(&self) -> bool {
        self.value <= self.limit
    }
}

fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}

impl Results {
    fn targets(&self) -> Vec<Target> {
        let mut targets = Vec::new();
        let mut at_most = |what, value, limit, unit| {
            targets.push(Target {
                what,
                value,
                limit,
                unit,
            });
        };
        if let Some(adds) = &self.adds {
            at_most("ADD of a mesh pod, p99", adds.mesh.p99, ADD_MESH_MS, "ms");
            at_most("of it ours, p99", adds.ours.p99, ADD_OURS_MS, "ms");
            at_most(
                "ADD of another pod, p99",
                adds.outside.p99,
                ADD_OUTSIDE_MS,
                "ms",
            );
        }
        if let Some(flips) = &self.flips {
            at_most(
                "label set, all enrolled, median",
                flips.enrol.median,
                FLIP_S,
                "s",
            );
            at_most(
                "label gone, all let go, median",
                flips.release.median,
                FLIP_S,
                "s",
            );
            let most = flips.first.rss.max(flips.last.rss);
            at_most("resident memory, all enrolled", mib(most), RSS_MIB, "MiB");
        }
        if let Some(idle) = &self.idle {
            at_most(
                "processor while nothing changes",
                idle.percent,
                IDLE_PERCENT,
                "%",
            );
        }
        targets
    }

    /// How many targets were missed.
    pub(super) fn missed(&self) -> usize {
        self.targets().iter().filter(|t| !t.met()).count()
    }

    /// What the churn left behind.
    pub(super) fn grown(&self) -> Vec<String> {
        self.churn.as_ref().map(Churn::grown).unwrap_or_default()
    }

    pub(super) fn json(&self) -> Value {
        let targets: Vec<Value> = self
            .targets()
            .iter()
            .map(|t| json!({"what": t.what, "value": t.value, "at_most": t.limit, "unit": t.unit, "met": t.met()}))
            .collect();
        let idle = self.idle.as_ref();
        json!({
            "how": self.how,
            "add": self.adds.as_ref().map(Adds::json),
            "flips": self.flips.as_ref().map(Flips::json),
            "idle": idle.map(|i| json!({"seconds": i.seconds, "percent_of_a_processor": i.percent})),
            "churn": self.churn.as_ref().map(Churn::json),
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
                format_args!("  {what:34} {value:8.2} {unit:3} at most {limit:4} {unit:3} {met}"),
            );
        }
        if let Some(churn) = &self.churn {
            let grown = churn.grown();
            let met = if grown.is_empty() { "met" } else { "MISSED" };
            line(
                &mut out,
                format_args!(
                    "  {:34} {:>8} {met}",
                    "nothing left by pods that are gone", ""
                ),
            );
            for what in grown {
                line(&mut out, format_args!("    grown: {what}"));
            }
        }
        out
    }

    fn details(&self, out: &mut String) {
        if let Some(adds) = &self.adds {
            let n = adds.mesh.samples;
            line(
                out,
                format_args!(
                    "\nplugin, from its start to its exit, {n} calls each, in ms: p50 / p90 / p99"
                ),
            );
            for (what, summary) in [
                ("ADD, mesh, ztunnel's ack included", &adds.mesh),
                ("  of it ours", &adds.ours),
                ("    of it capture in the kernel", &adds.kernel),
                ("  of it ztunnel's, told to ack", &adds.ztunnel),
                ("ADD, not of the mesh", &adds.outside),
                ("DEL, mesh", &adds.del),
                ("beside: a process of the plugin alone", &adds.process),
                ("beside: an empty rtnetlink request", &adds.rtnetlink),
            ] {
                let Summary {
                    median, p90, p99, ..
                } = summary;
                line(
                    out,
                    format_args!("  {what:38} {median:8.2} {p90:8.2} {p99:8.2}"),
                );
            }
        }
        if let Some(flips) = &self.flips {
            let (pods, n) = (flips.pods, flips.enrol.samples);
            line(
                out,
                format_args!(
                    "\n{pods} running pods, by their namespace's label, {n} times, in s: median (p10 to p90)"
                ),
            );
            for (what, summary) in [("enrolled", &flips.enrol), ("let go", &flips.release)] {
                let Summary {
                    median, p10, p90, ..
                } = summary;
                line(
                    out,
                    format_args!("  {what:34} {median:8.2} ({p10:.2} to {p90:.2})"),
                );
            }
            out.push_str("\nmemory of the agent, in MiB: resident = anonymous + file\n");
            for (what, m) in [
                ("nobody enrolled", &flips.idle),
                ("all enrolled, first time", &flips.first),
                ("all enrolled, after the last flip", &flips.last),
            ] {
                line(
                    out,
                    format_args!(
                        "  {what:34} {:8.2} = {:.2} + {:.2} (peak {:.2})",
                        mib(m.rss),
                        mib(m.anonymous),
                        mib(m.file),
                        mib(m.peak)
                    ),
                );
            }
        }
        if let Some(idle) = &self.idle {
            line(
                out,
                format_args!(
                    "\nnothing changes for {:.0} s: {:.3} % of a processor",
                    idle.seconds, idle.percent
                ),
            );
        }
        if let Some(churn) = &self.churn {
            line(
                out,
                format_args!(
                    "\n{} pods added and removed in {:.0} s: before, after",
                    churn.pods, churn.seconds
                ),
            );
            let (before, after) = (&churn.before.memory, &churn.after.memory);
            for (what, before, after) in [
                ("resident, KiB", before.rss, after.rss),
                ("anonymous, KiB", before.anonymous, after.anonymous),
                ("file, KiB", before.file, after.file),
            ] {
                line(out, format_args!("  {what:34} {before:8} {after:8}"));
            }
            if let Some((before, after)) = churn.in_use {
                let (before, after) = (before / 1024.0, after / 1024.0);
                line(
                    out,
                    format_args!("  {:34} {before:8.0} {after:8.0}", "heap in use, KiB"),
                );
            }
            if let Some(slope) = churn.slope() {
                line(
                    out,
                    format_args!("  anonymous, of 1,000 pods in the second half: {slope:+.1} KiB"),
                );
            }
            let counts = churn.before.counts().into_iter().zip(churn.after.counts());
            for ((what, before), (_, after)) in counts {
                line(out, format_args!("  {what:34} {before:8} {after:8}"));
            }
        }
    }
}

fn line(out: &mut String, text: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    let _infallible = writeln!(out, "{text}");
}
