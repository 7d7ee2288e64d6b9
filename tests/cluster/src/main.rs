//! `culvert-cluster`: the verbs behind `cargo xtask cluster`, which sees to packages and to this binary itself. This file
//! parses the command line; the work is the library's.

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use culvert_cluster::{Part, Parts};

/// A real Kubernetes on this machine, for tests and for a look.
#[derive(Parser)]
#[command(name = "cargo xtask cluster", bin_name = "cargo xtask cluster")]
enum Verb {
    /// Build what a cluster is made of, once (minutes)
    Build {
        /// Only etcd and the API server
        #[arg(long)]
        control_plane: bool,
    },
}

fn main() -> ExitCode {
    let result = match Verb::parse() {
        Verb::Build { control_plane } => build(control_plane),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn build(control_plane: bool) -> Result<()> {
    let parts: &[Part] = if control_plane {
        &Part::CONTROL_PLANE
    } else {
        &Part::ALL
    };
    Parts::find()?.build(parts)
}
