//! A Kubernetes namespace for one test in a cluster that several tests share. It goes with the value; when its test
//! fails, what is to be known about its pods stays.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::sync::Once;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::api::Api;
use crate::kubectl::IN_TIME;
use crate::{evidence, place};

/// Generous: the machine may be busy with other things, and a Cilium that has just been started compiles its programs,
/// for both nodes at once, before it gives a pod its network.
const READY: Duration = Duration::from_secs(300);

/// One line a pod, under one of headings.
const READINESS: &str = "custom-columns=NAME:.metadata.name,PHASE:.status.phase,GOES:.metadata.deletionTimestamp,\
                         READY:.status.conditions[?(@.type==\"Ready\")].status";

/// A namespace that only one test uses.
#[derive(Debug)]
pub struct Namespace<'a> {
    api: &'a Api,
    name: String,
    kept: Once,
}

impl Api {
    /// Makes a namespace, with labels as `key=value`. What is left of one of that name goes first. Pods can be made in
    /// it: its service account is there.
    ///
    /// # Errors
    /// When the API server refuses it, what is left of an earlier one does not go, or no controller makes the service
    /// account; then nodes, pods and logs are kept.
    pub fn namespace(&self, name: &str, labels: &[&str]) -> Result<Namespace<'_>> {
        self.make_namespace(name, labels)
            .inspect_err(|_| evidence::keep_after(self, name))
    }

    fn make_namespace(&self, name: &str, labels: &[&str]) -> Result<Namespace<'_>> {
        self.kubectl(&["delete", "namespace", name, "--ignore-not-found", IN_TIME])?;
        self.kubectl(&["create", "namespace", name])?;
        let namespace = Namespace {
            api: self,
            name: name.to_owned(),
            kept: Once::new(),
        };
        if !labels.is_empty() {
            self.kubectl(&[&["label", "namespace", name], labels].concat())?;
        }
        // Its controller may lag behind on a busy machine, and pods are refused until then.
        let timeout = format!("--timeout={}s", READY.as_secs());
        namespace.kubectl(&["wait", "--for=create", "serviceaccount/default", &timeout])?;
        Ok(namespace)
    }
}

impl Namespace<'_> {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs kubectl in it.
    ///
    /// # Errors
    /// When it fails; the error holds what it said.
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.api
            .kubectl(&[&["--namespace", &self.name][..], args].concat())
    }

    /// Applies manifests that name no namespace.
    ///
    /// # Errors
    /// When the API server refuses one.
    pub fn apply(&self, manifests: &str) -> Result<String> {
        let args = ["--namespace", &self.name, "apply", "--validate=strict"];
        self.api
            .admin()
            .run_with(&[&args[..], &["-f", "-"]].concat(), manifests)
    }

    /// Waits until all pods there are ready, at least one; those that are on their way out do not count.
    ///
    /// # Errors
    /// When one is not in time.
    pub fn wait_until_ready(&self) -> Result<()> {
        // `kubectl wait` gives up on all when one of them goes.
        let args = ["--namespace", &self.name, "get", "pods", "-o", READINESS];
        let what = format!("all pods of {} are ready", self.name);
        let api = self.api.admin();
        api.wait_until(&what, READY, &args, all_ready).map(drop)
    }

    /// Runs a command in a pod (`NAME`, or `daemonset/NAME` and the like) and returns what it printed.
    ///
    /// # Errors
    /// When it fails; the error holds what it said.
    pub fn exec(&self, pod: &str, command: &[&str]) -> Result<String> {
        self.kubectl(&[&["exec", pod, "--"], command].concat())
    }

    /// What a pod's port answers to an HTTP request for `/` that comes by `kubectl port-forward`: head and body.
    ///
    /// # Errors
    /// When kubectl does not forward, or nothing answers.
    pub fn get_forwarded(&self, pod: &str, port: u16) -> Result<String> {
        let (pod, port) = (format!("pod/{pod}"), format!(":{port}"));
        let mut forward = self
            .api
            .admin()
            .command(&["--namespace", &self.name, "port-forward", &pod, &port])
            .stdout(Stdio::piped())
            .spawn()?;
        let answer = request(&mut forward);
        forward.kill()?;
        forward.wait()?;
        answer
    }

    /// Writes down what is to be known after a failure, the first time: what puts things back when a test fails calls it
    /// before that, and it is called when the namespace goes.
    pub fn keep(&self) {
        self.kept.call_once(|| match self.write_down() {
            Ok(dir) => eprintln!("pods, events, logs and agents: {}", dir.display()),
            Err(error) => eprintln!("keeping what {} was like: {error:#}", self.name),
        });
    }

    fn write_down(&self) -> Result<PathBuf> {
        let dir = evidence::keep(self.api, &self.name)?;
        // A selector that every pod fits: without one, kubectl wants a name.
        let all = "--selector=!culvert.test/none";
        let logs = ["logs", all, "--all-containers", "--prefix", "--tail=500"];
        for (file, args) in [
            ("pods.log", &["get", "all", "-o", "wide"][..]),
            ("describe.log", &["describe", "pods"]),
            ("events.log", &["get", "events", "--sort-by=.lastTimestamp"]),
            ("containers.log", &logs),
        ] {
            let args = [&["--namespace", &self.name][..], args].concat();
            evidence::write(&dir.join(file), &evidence::ask(self.api, &args))?;
        }
        Ok(dir)
    }
}

impl Drop for Namespace<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.keep();
        }
        if place::keep() {
            eprintln!("kept: namespace {}", self.name);
            return;
        }
        let delete = ["delete", "namespace", &self.name, "--wait=false"];
        if let Err(error) = self.api.kubectl(&delete) {
            eprintln!("{error:#}");
        }
    }
}

/// Asks by a forwarder that is starting.
fn request(forward: &mut Child) -> Result<String> {
    let output = forward.stdout.take().context("no output of kubectl")?;
    // Kept until the end: kubectl writes to it again.
    let mut output = BufReader::new(output);
    let mut line = String::new();
    output.read_line(&mut line)?;
    // Forwarding from 127.0.0.1:40123 -> 8080
    let at = line.split_whitespace().nth(2);
    let at = at.with_context(|| format!("kubectl port-forward said {line:?}"))?;
    let mut stream = TcpStream::connect(at)?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Whether a table of [`READINESS`] has a pod, and none that has yet to become ready.
fn all_ready(table: &str) -> bool {
    let mut pods = table
        .lines()
        .skip(1)
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .filter(|pod| pod.get(2) == Some(&"<none>"))
        .peekable();
    pods.peek().is_some() && pods.all(|pod| pod.get(3) == Some(&"True"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_that_go_are_not_waited_for_and_none_is_not_all() {
        let head = "NAME PHASE GOES READY\n";
        let table = |pods: &str| all_ready(&format!("{head}{pods}"));
        assert!(!table(""));
        assert!(table(
            "a Running <none> True\nb Failed 2026-01-01T00:00:00Z False\n"
        ));
        assert!(!table("a Running <none> True\nb Pending <none> <none>\n"));
        assert!(!table("a Running 2026-01-01T00:00:00Z True\n"));
        assert!(!table("a Running <none> False\n"));
    }
}
