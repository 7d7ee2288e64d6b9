//! What is to be known after a failure, written down where it stays: logs of servers and pods, what the API server says of
//! nodes and of the pods of the system, and how each agent stands. It changes nothing, and what cannot be had is said in
//! its place.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::api::Api;
use crate::mesh::{AGENT, PROXY};
use crate::place;

/// One that does not answer tells nothing either.
const PATIENCE: &str = "--request-timeout=60s";

/// Keeps it under a name, in place of what was kept under it before, and says where.
pub(crate) fn keep(api: &Api, name: &str) -> Result<PathBuf> {
    // Servers of the cluster and of its nodes, and pods of the system, first.
    let dir = place::keep_logs(&api.spec().dir, name)?;
    describe(api, &dir)?;
    for (daemonset, namespace) in [AGENT, PROXY] {
        keep_pods(api, &dir, daemonset, namespace)?;
    }
    Ok(dir)
}

/// The same after an error of something that no test's namespace stands for; the error stays what it is.
pub(crate) fn keep_after(api: &Api, name: &str) {
    match keep(api, name) {
        Ok(dir) => eprintln!("nodes, pods, events and logs: {}", dir.display()),
        Err(error) => eprintln!("keeping what {name} was like: {error:#}"),
    }
}

/// The whole, as the API server has it.
pub(crate) fn describe(api: &Api, dir: &Path) -> Result<()> {
    for (file, args) in [
        ("nodes.log", &["get", "nodes,pods", "-A", "-o", "wide"][..]),
        ("describe-nodes.log", &["describe", "nodes"]),
        ("describe-pods.log", &["describe", "pods", "-A"]),
        (
            "events-everywhere.log",
            &["get", "events", "-A", "--sort-by=.lastTimestamp"],
        ),
    ] {
        write(&dir.join(file), &ask(api, args))?;
    }
    Ok(())
}

/// What each pod of a DaemonSet has said, the container before its container too, and how each agent stands.
fn keep_pods(api: &Api, dir: &Path, daemonset: &str, namespace: &str) -> Result<()> {
    let describe = ask(api, &["describe", "daemonset,pods", "-n", namespace]);
    write(&dir.join(format!("describe-{namespace}.log")), &describe)?;
    let names = "custom-columns=:.metadata.name,:.spec.nodeName";
    let pods = ask(
        api,
        &["get", "pods", "-n", namespace, "--no-headers", "-o", names],
    );
    for line in pods.lines() {
        let mut words = line.split_whitespace();
        let (Some(pod), Some(node)) = (words.next(), words.next()) else {
            continue;
        };
        if !pod.starts_with(daemonset) {
            continue;
        }
        let logs = ["logs", "-n", namespace, pod, "--tail=5000"];
        let previous = [&logs[..], &["--previous"]].concat();
        let mut files = vec![("log", logs.to_vec()), ("previous.log", previous)];
        if daemonset == AGENT.0 {
            let status = ["/bin/culvert", "status", "-o", "json"];
            let exec = [&["exec", "-n", namespace, pod, "--"][..], &status].concat();
            files.push(("status.json", exec));
        }
        for (file, args) in files {
            let path = dir.join(format!("{node}-{pod}.{file}"));
            write(&path, &ask(api, &args))?;
        }
    }
    Ok(())
}

/// What kubectl says, good or bad. Nothing is tried again: who is away stays away.
pub(crate) fn ask(api: &Api, args: &[&str]) -> String {
    match api.admin().output(&[&[PATIENCE][..], args].concat(), "") {
        Ok(output) => {
            let said = [output.stdout, output.stderr].concat();
            String::from_utf8_lossy(&said).into_owned()
        }
        Err(error) => format!("{error:#}"),
    }
}

pub(crate) fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}
