//! kubectl, as somebody. It turns command lines into output or into an error that shows both; it decides nothing.

use std::ffi::OsStr;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

/// Of every `delete` that waits until the object is gone: left to itself, kubectl waits for a week.
pub const IN_TIME: &str = "--timeout=180s";
/// How often something waited for is asked for.
const POLL: Duration = Duration::from_millis(200);
/// How long a command is tried again that has failed for a reason of [`PASSING`].
const PATIENCE: Duration = Duration::from_secs(60);
/// What a cluster on a busy machine says when it will soon say something else. In each case nothing was done: a command
/// that has begun in a pod is not among them.
const PASSING: [&str; 8] = [
    "TLS handshake timeout",
    "etcdserver: request timed out",
    "etcdserver: too many requests",
    "unable to return a response in the time allotted",
    // The controller that makes a namespace's account lags behind.
    "error looking up service account",
    // The kubelet or the container is being started.
    "error dialing backend",
    "container not found",
    "the object has been modified",
];

/// kubectl with one kubeconfig.
#[derive(Debug, Clone)]
pub struct Kubectl {
    kubeconfig: PathBuf,
}

impl Kubectl {
    /// As the user of that file.
    pub fn new(kubeconfig: impl Into<PathBuf>) -> Self {
        Self {
            kubeconfig: kubeconfig.into(),
        }
    }

    /// The file.
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// A command to be run as the caller likes.
    #[expect(clippy::disallowed_methods, reason = "kubectl is what this is for")]
    pub fn command(&self, args: &[impl AsRef<OsStr>]) -> Command {
        let mut command = Command::new("kubectl");
        let cache = self.kubeconfig.with_extension("cache");
        command
            .arg("--kubeconfig")
            .arg(&self.kubeconfig)
            .arg("--cache-dir")
            .arg(cache)
            .args(args)
            .env_remove("KUBECONFIG");
        command
    }

    /// Runs it, whatever comes of it.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn output(&self, args: &[impl AsRef<OsStr>], stdin: &str) -> Result<Output> {
        let mut command = self.command(args);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command
            .spawn()
            .context("starting kubectl: install it and put it on PATH")?;
        let mut input = child.stdin.take().context("no stdin")?;
        std::thread::scope(|scope| {
            // Beside the reading: neither side may wait for the other.
            scope.spawn(move || {
                // One that ends without reading has said why.
                let _told_by_kubectl = input.write_all(stdin.as_bytes());
            });
            child
                .wait_with_output()
                .with_context(|| format!("waiting for {command:?}"))
        })
    }

    /// Runs it and returns what it printed.
    ///
    /// # Errors
    /// When it fails; the error holds what it said.
    pub fn run(&self, args: &[impl AsRef<OsStr>]) -> Result<String> {
        self.run_with(args, "")
    }

    /// Runs it with something on its standard input, again where what it failed for passes by itself.
    ///
    /// # Errors
    /// When it fails; the error holds what it said.
    pub fn run_with(&self, args: &[impl AsRef<OsStr>], stdin: &str) -> Result<String> {
        let started = Instant::now();
        let mut output = self.output(args, stdin)?;
        while passes(&output) && started.elapsed() < PATIENCE {
            std::thread::sleep(POLL);
            output = self.output(args, stdin)?;
        }
        if !output.status.success() {
            let line: Vec<_> = args
                .iter()
                .map(|arg| arg.as_ref().to_string_lossy())
                .collect();
            bail!(
                "kubectl {}: {}\n{}{}",
                line.join(" "),
                output.status,
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            );
        }
        String::from_utf8(output.stdout).context("kubectl printed something that is not UTF-8")
    }

    /// `get .. -o json`.
    ///
    /// # Errors
    /// When it fails.
    pub fn get(&self, args: &[&str]) -> Result<Value> {
        let mut line = vec!["get"];
        line.extend(args);
        line.extend(["-o", "json"]);
        serde_json::from_str(&self.run(&line)?).context("kubectl printed no JSON")
    }

    /// Applies manifests (YAML or JSON), checked strictly.
    ///
    /// # Errors
    /// When the API server refuses one.
    pub fn apply(&self, manifests: &str) -> Result<String> {
        self.run_with(&["apply", "--validate=strict", "-f", "-"], manifests)
    }

    /// Runs a command again and again until what it prints pleases.
    ///
    /// # Errors
    /// When it does not in time; the error holds what was printed last.
    pub fn wait_until(
        &self,
        what: &str,
        timeout: Duration,
        args: &[&str],
        mut pleases: impl FnMut(&str) -> bool,
    ) -> Result<String> {
        let started = Instant::now();
        loop {
            let last = self.run(args);
            if let Ok(text) = &last
                && pleases(text)
            {
                return last;
            }
            if started.elapsed() > timeout {
                let last = last.unwrap_or_else(|error| format!("{error:#}"));
                bail!("{what}: not within {timeout:?}; last seen:\n{last}");
            }
            std::thread::sleep(POLL);
        }
    }
}

/// Whether it failed for a reason of [`PASSING`].
fn passes(output: &Output) -> bool {
    let said = String::from_utf8_lossy(&output.stderr);
    !output.status.success() && PASSING.iter().any(|reason| said.contains(reason))
}
