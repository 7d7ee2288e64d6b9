//! Running the machine's own tools (`ip`, `nsenter`, ...) to their end, with an error that shows what they said.

use std::ffi::OsStr;
use std::io::Write as _;
use std::process::{Command, Output, Stdio};

use anyhow::{Context as _, Result, bail};

/// A program of this machine.
#[expect(
    clippy::disallowed_methods,
    reason = "a cluster is other programs, set up with the machine's own tools"
)]
pub(crate) fn command(program: impl AsRef<OsStr>) -> Command {
    Command::new(program)
}

/// Runs a command to its end; what it printed is in the error if it fails.
pub(crate) fn run(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("starting {command:?}: is it installed?"))?;
    check(command, &output)
}

/// Runs a command with something on its standard input.
pub(crate) fn run_with(command: &mut Command, stdin: &str) -> Result<String> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {command:?}: is it installed?"))?;
    child
        .stdin
        .take()
        .context("no stdin")?
        .write_all(stdin.as_bytes())
        .with_context(|| format!("writing to {command:?}"))?;
    let output = child
        .wait_with_output()
        .with_context(|| format!("waiting for {command:?}"))?;
    check(command, &output)
}

fn check(command: &Command, output: &Output) -> Result<String> {
    if !output.status.success() {
        bail!(
            "{command:?}: {}\n{}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// `ip` with some words.
pub(crate) fn ip(words: &[&str]) -> Result<String> {
    run(command("ip").args(words))
}

/// A whole list of changes by one `ip`, in a namespace if one is named.
pub(crate) fn ip_batch(netns: Option<&str>, batch: &str) -> Result<String> {
    let mut command = command("ip");
    if let Some(netns) = netns {
        command.args(["-netns", netns]);
    }
    run_with(command.args(["-batch", "-"]), batch).with_context(|| format!("of\n{batch}"))
}
