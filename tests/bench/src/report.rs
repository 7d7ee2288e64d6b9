//! What is printed and written: medians, spread and ratios, and beside them what they have to reach.

use std::fmt::Write as _;

use culvert_lab::Family;
use serde_json::{Value, json};

use crate::Options;
use crate::client::Measure;
use crate::datapath::{Row, WayResult};
use crate::enrol::Enrolment;
use crate::netfilter::Tool;
use crate::node::Unenrolled;
use crate::runs::Program;
use crate::stats::Summary;
use crate::ways::Way;

const ENROL_P99_MS: f64 = 2.0;
const ENROL_ALL_MS: f64 = 500.0;
const ENROL_ALL_PODS: usize = 250;
const UNENROLLED: f64 = 0.98;

/// Everything measured.
#[derive(Debug, Default)]
pub(crate) struct Report {
    pub(crate) traffic: Vec<Row>,
    pub(crate) runs: Option<Vec<Program>>,
    pub(crate) enrol: Vec<Enrolment>,
    pub(crate) node: Option<Unenrolled>,
    how: String,
}

/// One target and how it went.
#[derive(Debug)]
pub(crate) struct Target {
    pub(crate) what: String,
    pub(crate) reached: bool,
}

/// What a measurement's ratio to the straight way has to be.
pub(crate) fn wanted(measure: Measure) -> f64 {
    match measure {
        Measure::Connect => 0.95,
        Measure::Request | Measure::Bulk => 0.98,
    }
}

pub(crate) fn family_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    }
}

impl Report {
    pub(crate) fn new(options: &Options) -> Self {
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let tool = |tool: Tool| tool.version().unwrap_or_else(|_| "not there".to_owned());
        let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
        let load = load.split(' ').next().unwrap_or_default();
        // Who measures beside other work can trust ratios of neighbouring slices, not single times.
        let busy = load.parse::<f64>().is_ok_and(|load| load > 0.7);
        let how = format!(
            "Linux {}, {cpus} processors, load {load} at the start{}, {}; {}; {}",
            kernel.trim(),
            if busy {
                " (NOT QUIET: p99 of enrolment is the machine's, not Culvert's)"
            } else {
                ""
            },
            if options.apart {
                "client and listener on one each"
            } else {
                "client and listener together on one"
            },
            tool(Tool::Iptables),
            tool(Tool::Nftables),
        );
        Self {
            how,
            ..Self::default()
        }
    }

    /// The targets that what was measured can be held against.
    pub(crate) fn targets(&self) -> Vec<Target> {
        let mut targets = Vec::new();
        let mut add = |what: String, reached| targets.push(Target { what, reached });
        for row in &self.traffic {
            let Some(culvert) = row.way(Way::Culvert) else {
                continue;
            };
            let (name, family) = (row.measure.name(), family_name(row.family));
            let (ratio, least) = (culvert.ratio.median, wanted(row.measure));
            add(
                format!("{name}, {family}: {ratio:.3} of straight, at least {least}"),
                ratio >= least,
            );
            for other in [Way::Iptables, Way::Nftables] {
                if let Some(other) = row.way(other) {
                    let theirs = other.ratio.median;
                    add(
                        format!(
                            "{name}, {family}: {ratio:.3}, ahead of {} with {theirs:.3}",
                            other.way.name()
                        ),
                        ratio > theirs,
                    );
                }
            }
        }
        for done in self.enrol.iter().filter(|done| done.way == Way::Culvert) {
            let p99 = done.enrol.p99;
            add(
                format!("enrol one pod, p99 after the first: {p99:.2} ms, at most {ENROL_P99_MS}"),
                p99 <= ENROL_P99_MS,
            );
            if done.pods >= ENROL_ALL_PODS {
                let all = done.enrol_all;
                add(
                    format!(
                        "enrol {} pods: {all:.0} ms, at most {ENROL_ALL_MS}",
                        done.pods
                    ),
                    all <= ENROL_ALL_MS,
                );
            }
        }
        if let Some(node) = &self.node {
            for (who, ratio) in [("the node", &node.node), ("a pod not enrolled", &node.pod)] {
                let ratio = ratio.median;
                add(
                    format!(
                        "connect rate of {who}: {ratio:.3} of that without, at least {UNENROLLED}"
                    ),
                    ratio >= UNENROLLED,
                );
            }
        }
        for program in self.runs.iter().flatten() {
            let runs = program.after - program.before;
            add(
                format!("runs of {} for 1 GB: {runs}, none", program.name),
                runs == 0,
            );
        }
        targets
    }

    pub(crate) fn missed(&self) -> usize {
        self.targets().iter().filter(|t| !t.reached).count()
    }

    /// For people.
    pub(crate) fn text(&self) -> String {
        let mut out = format!(
            "\n{}\nmedians; in brackets p10 to p90 over rounds\n",
            self.how
        );
        for row in &self.traffic {
            let (name, unit) = (row.measure.name(), row.measure.unit());
            line(
                &mut out,
                format_args!(
                    "\n{:<22} {:>13} {:>8} {:<15} {:>9} {:>8}",
                    format!("{name}, {}", family_name(row.family)),
                    unit,
                    "ratio",
                    "",
                    "CPU us",
                    "ratio"
                ),
            );
            for way in &row.ways {
                line(&mut out, format_args!("{}", traffic_line(way)));
            }
        }
        if !self.enrol.is_empty() {
            line(
                &mut out,
                format_args!(
                    "\n{:<14} {:>9} {:>9} {:>9} {:>11} {:>9} {:>9} {:>11}",
                    "ms", "first", "enrol p50", "p99", "all", "un- p50", "p99", "all"
                ),
            );
        }
        for e in &self.enrol {
            line(
                &mut out,
                format_args!(
                    "{:<14} {:>9.2} {:>9.2} {:>9.2} {:>7.0}/{:<3} {:>9.2} {:>9.2} {:>7.0}/{:<3}",
                    e.way.name(),
                    e.first,
                    e.enrol.median,
                    e.enrol.p99,
                    e.enrol_all,
                    e.pods,
                    e.unenrol.median,
                    e.unenrol.p99,
                    e.unenrol_all,
                    e.pods
                ),
            );
        }
        if let Some(node) = &self.node {
            out.push_str("\nconnect rate with the programs attached, of that without\n");
            for (who, ratio) in [("node", &node.node), ("pod not enrolled", &node.pod)] {
                line(
                    &mut out,
                    format_args!("  {who:<18} {:.3} {}", ratio.median, spread(ratio)),
                );
            }
        }
        if let Some(programs) = &self.runs {
            line(
                &mut out,
                format_args!(
                    "\n{:<18} {:>16} {:>9} {:>14} {:>14}",
                    "program", "runs/connection", "ns/run", "before 1 GB", "after"
                ),
            );
            for p in programs {
                line(
                    &mut out,
                    format_args!(
                        "{:<18} {:>16.2} {:>9.0} {:>14} {:>14}",
                        p.name, p.per_connection, p.nanoseconds, p.before, p.after
                    ),
                );
            }
        }
        out.push_str("\ntargets\n");
        for target in self.targets() {
            let mark = if target.reached { "pass" } else { "MISS" };
            line(&mut out, format_args!("  {mark}  {}", target.what));
        }
        out
    }

    /// For machines.
    pub(crate) fn json(&self) -> Value {
        let traffic: Vec<Value> = self
            .traffic
            .iter()
            .map(|row| {
                let ways: Vec<Value> = row
                    .ways
                    .iter()
                    .map(|way| {
                        json!({
                            "way": way.way.name(), "rate": way.rate.json(),
                            "ratio": way.ratio.json(), "cpu_us": way.cpu.json(),
                            "cpu_ratio": way.cpu_ratio.json(),
                        })
                    })
                    .collect();
                json!({
                    "measure": row.measure.name(), "unit": row.measure.unit(),
                    "family": family_name(row.family), "ways": ways,
                })
            })
            .collect();
        let enrol: Vec<Value> = self
            .enrol
            .iter()
            .map(|e| {
                json!({
                    "way": e.way.name(), "pods": e.pods, "first_ms": e.first,
                    "enrol_ms": e.enrol.json(), "unenrol_ms": e.unenrol.json(),
                    "enrol_all_ms": e.enrol_all, "unenrol_all_ms": e.unenrol_all,
                })
            })
            .collect();
        let runs: Vec<Value> = self
            .runs
            .iter()
            .flatten()
            .map(|p| {
                json!({
                    "program": p.name, "runs_per_connection": p.per_connection,
                    "ns_per_run": p.nanoseconds, "runs_before_1gb": p.before,
                    "runs_after_1gb": p.after,
                })
            })
            .collect();
        let node = self.node.as_ref().map(|node| {
            json!({
                "node_ratio": node.node.json(), "pod_ratio": node.pod.json(),
                "rate_without": node.rate.json(),
            })
        });
        let targets: Vec<Value> = self
            .targets()
            .iter()
            .map(|t| json!({ "what": t.what, "reached": t.reached }))
            .collect();
        json!({
            "how": self.how, "traffic": traffic, "enrol": enrol, "runs": runs,
            "unenrolled": node, "targets": targets,
        })
    }
}

fn traffic_line(way: &WayResult) -> String {
    format!(
        "  {:<20} {:>13.0} {:>8.3} {:<15} {:>9.2} {:>8.3}",
        way.way.name(),
        way.rate.median,
        way.ratio.median,
        spread(&way.ratio),
        way.cpu.median,
        way.cpu_ratio.median
    )
}

fn spread(summary: &Summary) -> String {
    format!("[{:.3}-{:.3}]", summary.p10, summary.p90)
}

fn line(out: &mut String, text: std::fmt::Arguments<'_>) {
    // Writing to a string cannot fail.
    let _never = writeln!(out, "{text}");
}
