//! `culvert`: the command line.
//!
//! Parses, calls the library, prints. Commands that are nouns never change anything; every command prints a
//! table for people or, with `-o json`, JSON for programs.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::run()
}
