//! `culvert-bench`: what Culvert costs, measured beside what it replaces. It measures and reports; what a figure has to
//! reach is written in `report`, and nothing here is ever tuned to reach it.

mod agent;
mod bystanders;
mod chart;
mod client;
mod cluster;
mod datapath;
mod dns;
mod enrol;
mod interrupt;
mod machine;
mod netfilter;
mod node;
mod process;
mod proxy;
mod report;
mod runs;
mod stats;
mod ways;
mod worker;

#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use clap::Parser;

use crate::client::Measure;
use crate::report::Report;

/// Benchmarks of Culvert; they need root and a quiet machine.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask bench")]
struct Args {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Debug, clap::Subcommand)]
enum Bench {
    /// The same client and listener four ways (loopback, Culvert, iptables, nftables), enrolment, and the node's own sockets
    Datapath(Options),
    /// Lookups three ways (ztunnel's port itself, Culvert, iptables), and datagrams that are nobody's
    Dns(Options),
    /// The agent: plugin ADD, a namespace's label, memory, idle processor time, and what a day's pods leave behind
    Agent(agent::Options),
    /// A real Kubernetes with and without Culvert: pods' start, a namespace's label, rollouts, requests, memory
    Cluster(cluster::Options),
}

/// How long and where to.
#[derive(Debug, Clone, clap::Args)]
struct Options {
    /// A short run: fewer rounds, fewer pods
    #[arg(long)]
    quick: bool,
    /// Rounds; each has one slice of every measurement for every way [default: 150, quick: 20]
    #[arg(long)]
    rounds: Option<usize>,
    /// Pods to enrol and to un-enrol one after the other [default: 250, quick: 40]
    #[arg(long)]
    pods: Option<usize>,
    /// Only these parts
    #[arg(long, value_enum)]
    only: Vec<Part>,
    /// Only these measurements of the four ways
    #[arg(long, value_enum)]
    measure: Vec<Measure>,
    /// Client and listener on a processor each, not both on one
    #[arg(long)]
    apart: bool,
    /// Where results go [default: `bench` in the build's target directory]
    #[arg(long)]
    output: Option<PathBuf>,
    /// Fail when a target is missed
    #[arg(long)]
    strict: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// The four ways
    Traffic,
    /// Program runs per connection and per byte
    Runs,
    /// Enrolling and un-enrolling
    Enrol,
    /// Sockets of the node and of pods that are not enrolled
    Node,
}

impl Options {
    fn measures(&self) -> Vec<Measure> {
        if self.measure.is_empty() {
            return Measure::ALL.to_vec();
        }
        self.measure.clone()
    }

    fn wants(&self, part: Part) -> bool {
        self.only.is_empty() || self.only.contains(&part)
    }

    fn or(&self, given: Option<usize>, full: usize, quick: usize) -> usize {
        given.unwrap_or(if self.quick { quick } else { full })
    }
}

fn main() -> Result<ExitCode> {
    let bench = Args::parse().bench;
    ensure!(
        nix::unistd::geteuid().is_root(),
        "the benchmark makes network namespaces and loads programs: run as root"
    );
    match bench {
        Bench::Datapath(options) => datapath(&options)?,
        Bench::Dns(options) => lookups(&options)?,
        Bench::Agent(options) => return agent::main(&options),
        Bench::Cluster(options) => return cluster::main(&options),
    }
    Ok(ExitCode::SUCCESS)
}

fn lookups(options: &Options) -> Result<()> {
    let (json, missed) = dns::measure(options.or(options.rounds, 60, 10))?;
    store(options, &[("dns.json", format!("{json:#}\n"))])?;
    strict(options, missed)
}

/// Writes results and says where; without a directory, below the build's.
pub(crate) fn write(dir: Option<&Path>, files: &[(&str, String)]) -> Result<Vec<PathBuf>> {
    let dir = dir.map_or_else(
        || {
            let target = std::env::var_os("CULVERT_TARGET_DIR").unwrap_or_else(|| "target".into());
            PathBuf::from(target).join("bench")
        },
        Path::to_path_buf,
    );
    std::fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
    let mut written = Vec::new();
    for (name, text) in files {
        let path = dir.join(name);
        std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        written.push(path);
    }
    Ok(written)
}

fn store(options: &Options, files: &[(&str, String)]) -> Result<()> {
    for path in write(options.output.as_deref(), files)? {
        println!("wrote {}", path.display());
    }
    Ok(())
}

fn strict(options: &Options, missed: usize) -> Result<()> {
    ensure!(
        !options.strict || missed == 0,
        "{missed} targets missed (--strict)"
    );
    Ok(())
}

fn datapath(options: &Options) -> Result<()> {
    let mut report = Report::new(options);
    let rounds = options.or(options.rounds, 150, 20);
    // Nothing of ours is in the kernel yet: this part compares with just that.
    if options.wants(Part::Node) {
        eprintln!("sockets that are not enrolled ...");
        report.node = Some(node::measure(rounds)?);
    }
    if options.wants(Part::Traffic) || options.wants(Part::Runs) {
        let field = datapath::Field::new("bench", options.apart)?;
        if options.wants(Part::Traffic) {
            eprintln!("four ways, {rounds} rounds ...");
            report.traffic = datapath::measure(&field, rounds, &options.measures())?;
        }
        if options.wants(Part::Runs) {
            eprintln!("program runs ...");
            report.runs = Some(runs::measure(&field)?);
        }
    }
    if options.wants(Part::Enrol) {
        let pods = options.or(options.pods, 250, 40);
        eprintln!("enrolment of {pods} pods ...");
        report.enrol = enrol::measure(pods)?;
    }
    print!("{}", report.text());
    store(
        options,
        &[
            ("datapath.json", format!("{:#}\n", report.json())),
            ("datapath.svg", chart::draw(&report)),
        ],
    )?;
    strict(options, report.missed())
}
