//! The real plugin as a container runtime runs it: environment, stdin, stdout, exit code.
#![expect(
    clippy::unwrap_used,
    reason = "test code: a step that fails is a test that fails"
)]

mod away;
mod common;
mod decision_file;
mod goldens;
mod input;
mod logging;
mod round_trip;
