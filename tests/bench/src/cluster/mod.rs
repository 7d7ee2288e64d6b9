//! What Culvert costs a whole Kubernetes: pods that start, namespaces that are labelled, requests to the API server, the
//! agent's memory. It puts the parts in order; each part measures one thing.

mod agent;
mod audit;
mod cost;
mod fleet;
mod flip;
mod others;
mod pods;
mod results;
mod roll;
mod site;
mod start;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;

use crate::interrupt;
use crate::machine;
use fleet::Fleet;
use results::Results;
use site::Site;

/// A target was missed, and `--strict` asked.
const MISSED: u8 = 4;

/// Options of `bench cluster`.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Options {
    /// A short run, for a look whether everything works: 10 pods, few repetitions
    #[arg(long)]
    quick: bool,
    /// Only these parts
    #[arg(long, value_enum)]
    only: Vec<Part>,
    /// Running pods whose namespace's label comes and goes [default: 80, quick: 10]
    #[arg(long)]
    pods: Option<usize>,
    /// How often it comes and goes [default: 5, quick: 1]
    #[arg(long)]
    flips: Option<usize>,
    /// Pods of each kind to start one after the other [default: 100, quick: 2]
    #[arg(long)]
    starts: Option<usize>,
    /// Roll-outs inside the mesh, and as many outside [default: 5, quick: 1]
    #[arg(long)]
    rollouts: Option<usize>,
    /// Enrolled pods while cost and restarts are measured [default: 100, quick: 10]
    #[arg(long)]
    enrolled: Option<usize>,
    /// Seconds in which nothing changes, each time [default: 40, quick: 5]
    #[arg(long)]
    idle: Option<u64>,
    /// How often the agent is replaced [default: 5, quick: 1]
    #[arg(long)]
    restarts: Option<usize>,
    /// Namespaces as objects alone [default: 1000, quick: 20]
    #[arg(long)]
    namespaces: Option<usize>,
    /// Pods of other nodes, as objects alone [default: 5000, quick: 100]
    #[arg(long)]
    others: Option<usize>,
    /// Form of what goes to stdout
    #[arg(short, long, value_enum, default_value = "text")]
    output: Output,
    /// Where cluster.json goes [default: `bench` in the build's target directory]
    #[arg(long)]
    to: Option<PathBuf>,
    /// Fail when a target is missed
    #[arg(long)]
    strict: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// A pod's start, with Culvert and without
    Start,
    /// A namespace's label comes and goes
    Flip,
    /// A Deployment is rolled out, inside the mesh and outside
    Rollout,
    /// Requests, memory and processor time with pods enrolled
    Cost,
    /// From a new agent's start to its being ready
    Restart,
    /// Namespaces, and pods of other nodes, as objects alone
    Others,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Output {
    Text,
    Json,
}

impl Options {
    fn or<T>(&self, given: Option<T>, full: T, quick: T) -> T {
        given.unwrap_or(if self.quick { quick } else { full })
    }

    fn wants(&self, part: Part) -> bool {
        self.only.is_empty() || self.only.contains(&part)
    }
}

/// Runs it and prints.
pub(crate) fn main(options: &Options) -> Result<ExitCode> {
    interrupt::listen()?;
    let results = match measure(options) {
        Err(_) if interrupt::asked() => return Ok(ExitCode::from(interrupt::EXIT)),
        results => results?,
    };
    match options.output {
        Output::Text => print!("{}", results.text()),
        Output::Json => println!("{:#}", results.json()),
    }
    let json = format!("{:#}\n", results.json());
    for path in crate::write(options.to.as_deref(), &[("cluster.json", json)])? {
        eprintln!("wrote {}", path.display());
    }
    Ok(if options.strict && results.missed() > 0 {
        ExitCode::from(MISSED)
    } else {
        ExitCode::SUCCESS
    })
}

fn measure(options: &Options) -> Result<Results> {
    let mut results = Results {
        how: machine::state(options.quick),
        ..Results::default()
    };
    eprintln!("a cluster of two nodes ...");
    let site = Site::new()?;
    if options.wants(Part::Start) {
        let each = options.or(options.starts, 100, 2).max(2);
        eprintln!("{each} pods of each kind start ...");
        results.starts = Some(start::measure(&site, each)?);
    }
    let (turned, looked_at) = (
        [Part::Flip, Part::Rollout].map(|part| options.wants(part)),
        [Part::Cost, Part::Restart, Part::Others].map(|part| options.wants(part)),
    );
    let pods = options.or(options.pods, 80, 10).max(2);
    let enrolled = options.or(options.enrolled, 100, 10).max(2);
    let first = if turned.contains(&true) {
        pods
    } else {
        enrolled
    };
    if turned.contains(&true) || looked_at.contains(&true) {
        eprintln!("{first} pods of node1 ...");
        let mut fleet = Fleet::new(&site, "node1", first)?;
        turn(options, &site, &fleet, &mut results)?;
        if looked_at.contains(&true) {
            fleet.scale(enrolled)?;
            look(options, &site, &fleet, &mut results)?;
        }
    }
    Ok(results)
}

/// What is done to pods, in the mesh and out of it.
fn turn(options: &Options, site: &Site, fleet: &Fleet<'_>, results: &mut Results) -> Result<()> {
    if options.wants(Part::Flip) {
        eprintln!("their namespace's label comes and goes ...");
        let flips = options.or(options.flips, 5, 1).max(1);
        results.flips = Some(flip::measure(fleet, flips)?);
    }
    if options.wants(Part::Rollout) {
        eprintln!("their Deployment is rolled out ...");
        let pairs = options.or(options.rollouts, 5, 1).max(1);
        results.rolls = Some(roll::measure(site, fleet, pairs)?);
    }
    Ok(())
}

/// What the agent is like with pods enrolled.
fn look(options: &Options, site: &Site, fleet: &Fleet<'_>, results: &mut Results) -> Result<()> {
    let idle = Duration::from_secs(options.or(options.idle, 40, 5).max(1));
    if options.wants(Part::Cost) {
        let (pods, seconds) = (fleet.size, idle.as_secs());
        eprintln!("{pods} pods are enrolled, and then nothing changes for {seconds} s ...");
        results.cost = Some(cost::measure(site, fleet, idle)?);
    } else {
        fleet.enrol()?;
    }
    if options.wants(Part::Restart) {
        eprintln!("the agent is replaced ...");
        let times = options.or(options.restarts, 5, 1).max(1);
        results.restarts = Some((fleet.size, cost::restart(site, fleet, times)?));
    }
    if options.wants(Part::Others) {
        let namespaces = options.or(options.namespaces, 1000, 20).max(1);
        let pods = options.or(options.others, 5000, 100).max(1);
        eprintln!("{namespaces} namespaces, {pods} pods of other nodes ...");
        let others = others::measure(site, fleet, (namespaces, pods), idle)?;
        results.others = Some(others);
    }
    Ok(())
}
