//! The demonstration: unmodified programs in network namespaces are carried through a ztunnel and back out again, and
//! every line it prints has been checked. Run it with `cargo xtask demo`.
//!
//! This file owns the order of events and the exit code. It uses the `culvert` binary like a person would, by its command
//! line, and must never link the agent: it would show the agent to itself.

mod access_log;
mod interrupt;
mod kernel;
mod programs;
mod report;
mod stage;
mod steady;
mod steps;
mod wire;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, ensure};
use clap::Parser as _;

use report::Report;
use stage::Stage;
use steps::{after, before, enrolled, stopped};

/// Watch unmodified programs in network namespaces be carried through a ztunnel. Every line is checked; the exit code is 1
/// if any was false. All it makes is gone afterwards, also after Ctrl-C.
#[derive(clap::Parser)]
#[command(name = "cargo xtask demo --")]
struct Args {
    /// Wait for Enter before each step
    #[arg(long)]
    pause: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    // Before any thread is started, so that all of them leave the signals to the one that waits for them.
    if let Err(error) = interrupt::install() {
        eprintln!("error: {error:#}");
        return ExitCode::FAILURE;
    }
    let mut report = Report::new(args.pause);
    let mut places = Vec::new();
    let result = play(&mut report, &mut places);
    // By now the stage is gone, and all that was on it.
    let clean = clean(&places);
    if let (Some(signal), Ok(())) = (interrupt::caught(), &clean) {
        eprintln!("\ninterrupted by {signal}; everything is cleaned up");
        return ExitCode::from(interrupt::exit_code(signal));
    }
    match result.and(clean).and_then(|()| report.conclude()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn play(report: &mut Report, places: &mut Vec<PathBuf>) -> Result<()> {
    report.title("Culvert: one node, three pods, and programs as Debian ships them")?;
    let mut stage = Stage::set()?;
    places.extend(stage.places());
    report.note(&stage.bill()?)?;
    let start = before::play(report, &stage)?;
    let held = enrolled::play(report, &mut stage, &start)?;
    stopped::play(report, &mut stage, &start)?;
    after::play(report, &mut stage, &start, &held)
}

/// Fails if anything is left in the places the stage took.
fn clean(places: &[PathBuf]) -> Result<()> {
    let left: Vec<_> = places.iter().filter(|place| place.exists()).collect();
    ensure!(
        left.is_empty(),
        "left behind: {left:?}; the next run sweeps it"
    );
    Ok(())
}
