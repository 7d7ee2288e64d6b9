//! What Culvert costs a whole Kubernetes: pods that start, namespaces that are labelled, requests to the API server, the
//! agent's memory. It puts the parts in order; each part measures one thing.

mod fleet;
mod flip;
mod pods;
mod results;
mod roll;
mod site;
mod start;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;

use crate::interrupt;
use crate::machine;
use results::Results;

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
    /// Pods of each kind to start one after the other [default: 40, quick: 2]
    #[arg(long)]
    starts: Option<usize>,
    /// Roll-outs inside the mesh, and as many outside [default: 2, quick: 1]
    #[arg(long)]
    rollouts: Option<usize>,
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
    let site = site::Site::new()?;
    if options.wants(Part::Start) {
        let each = options.or(options.starts, 40, 2).max(2);
        eprintln!("{each} pods of each kind start ...");
        results.starts = Some(start::measure(&site, each)?);
    }
    if options.wants(Part::Flip) || options.wants(Part::Rollout) {
        let pods = options.or(options.pods, 80, 10).max(2);
        eprintln!("{pods} pods of node1 ...");
        let fleet = fleet::Fleet::new(&site, "node1", pods)?;
        if options.wants(Part::Flip) {
            eprintln!("their namespace's label comes and goes ...");
            let flips = options.or(options.flips, 5, 1).max(1);
            results.flips = Some(flip::measure(&fleet, flips)?);
        }
        if options.wants(Part::Rollout) {
            eprintln!("their Deployment is rolled out ...");
            let pairs = options.or(options.rollouts, 2, 1).max(1);
            results.rolls = Some(roll::measure(&fleet, pairs)?);
        }
    }
    Ok(results)
}
