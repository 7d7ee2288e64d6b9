//! `cargo xtask`: the project's own commands, one file a verb. This file parses the command line and hands over.
#![forbid(unsafe_code)]
#![expect(
    clippy::disallowed_methods,
    reason = "running other programs is what this tool is for"
)]

mod bench;
mod bins;
mod build;
mod cluster;
mod cmd;
mod demo;
mod ebpf;
mod fuzz;
mod host;
mod image;
mod inputs;
mod lint;
mod load;
mod project;
mod test;
mod toolchain;
mod unload;
mod vm;

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
    /// Load and pin the node programs into this kernel; print size, verified instructions and load time of each (root)
    Load,
    /// Undo `load` (root)
    Unload,
    /// Watch unmodified programs in network namespaces be carried through a ztunnel, every line checked (root)
    Demo(demo::Args),
    /// Run the tests: `unit`, `fuzz`, `e2e` (root), `cluster` (root), `vm`, all of them, or those of a name
    Test(test::Args),
    /// Feed parsers of foreign input with what a fuzzer makes up
    Fuzz(fuzz::Args),
    /// Measure the datapath, DNS, the agent, or all of it on a real Kubernetes; results go to target/bench (root)
    Bench(bench::Args),
    /// Build the container image into target/image: reproducible, with licences and a bill of materials
    Image(image::Args),
    /// A real Kubernetes on this machine: build, up, down, status, shell, kubectl (root)
    Cluster(cluster::Args),
    /// Check format, clippy, documentation, licences and house rules
    Lint,
}

fn main() -> ExitCode {
    let result = match Verb::parse() {
        Verb::Build(args) => build::main(&args),
        Verb::Load => load::main(),
        Verb::Unload => unload::main(),
        Verb::Demo(args) => demo::main(&args),
        Verb::Test(args) => test::main(&args),
        Verb::Fuzz(args) => fuzz::main(&args),
        Verb::Bench(args) => bench::main(&args),
        Verb::Image(args) => image::main(&args),
        Verb::Cluster(args) => cluster::main(&args),
        Verb::Lint => lint::main(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
