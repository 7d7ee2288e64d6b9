//! The chained CNI plugin `culvert-cni`: makes a new pod safe before its first instruction.
//!
//! Only the way in and out of the process; stdout carries the answer and nothing else.

#![forbid(unsafe_code)]

use std::{
    io::{self, Write as _},
    process::ExitCode,
};

use culvert_cni::{call, environment};

fn main() -> ExitCode {
    let answer = call::run(&environment::Process, io::stdin().lock());
    let written = match answer.stdout.as_str() {
        "" => Ok(()),
        text => {
            let mut stdout = io::stdout().lock();
            writeln!(stdout, "{text}").and_then(|()| stdout.flush())
        }
    };
    // A result that nobody could read is not one.
    if answer.success && written.is_ok() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
