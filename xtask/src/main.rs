//! `cargo xtask`: the project's own commands, one file a verb. This file parses the command line and hands over.
#![forbid(unsafe_code)]
#![expect(
    clippy::disallowed_methods,
    reason = "running other programs is what this tool is for"
)]

mod build;
mod cmd;
mod ebpf;
mod host;
mod inputs;
mod project;
mod toolchain;

use std::process::ExitCode;

use clap::Parser;

/// Build, run, test and measure Culvert.
///
/// Every verb sets up what it needs on a fresh machine and says so before it changes anything (lines that begin with
/// `+`). A second run changes nothing and needs no network. What needs root says what to run as root.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Verb {
    /// Build the eBPF object and all binaries
    Build(build::Args),
}

fn main() -> ExitCode {
    let result = match Verb::parse() {
        Verb::Build(args) => build::main(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
