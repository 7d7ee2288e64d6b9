//! `culvert netns ...`: manual control, usable without any agent.

mod attach;

use std::{
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use culvert::kernel::{
    Netns, Node, inspect, kubelet,
    pod::{self, Detached},
    track::Rescanner,
};
use culvert_ebpf::abi::PROBES_KUBELET;
use serde_json::json;

use super::{
    Global,
    output::{Format, columns, print, row},
};

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Capture namespaces, or change how an enrolled one is treated. Loads the node programs if need be.
    Attach(attach::Args),
    /// Let namespaces go: new connections go direct at once, old ones live on.
    Detach {
        /// Namespace file: /run/netns/NAME, /proc/PID/ns/net.
        #[arg(long, required = true, value_name = "PATH")]
        netns: Vec<PathBuf>,
        /// Wait this long for connections that still use our rules; then leave the rules to a later detach.
        #[arg(long, default_value_t = 0, value_name = "SECONDS")]
        wait: u64,
    },
    /// Namespaces with anything of ours.
    List,
    /// What is programmed in one, whether it is whole, its listeners and counters.
    Show {
        /// Namespace file.
        #[arg(long, value_name = "PATH")]
        netns: PathBuf,
    },
    /// Keep enrolled namespaces in step with their addresses and interfaces until interrupted.
    Watch,
}

pub(crate) fn run(global: &Global, command: &Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Attach(args) => attach::run(global, args),
        Command::Detach { netns, wait } => detach(global, netns, *wait),
        Command::List => list(global),
        Command::Show { netns } => show(global, netns),
        Command::Watch => watch(global),
    }
}

fn open(global: &Global) -> anyhow::Result<Node> {
    Node::open(&global.bpffs)?.with_context(|| {
        format!(
            "nothing is loaded at {}: `culvert load` or `culvert netns attach` does so",
            global.bpffs.display()
        )
    })
}

fn report_failures(
    global: &Global,
    failed: Vec<culvert::kernel::Error>,
) -> anyhow::Result<ExitCode> {
    let code = if failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    };
    for error in failed {
        super::output::error(global.output, &error.into());
    }
    Ok(code)
}

fn table(rows: &[serde_json::Value], keys: &[&str]) -> String {
    let mut out = vec![keys.iter().map(|k| k.to_uppercase()).collect::<Vec<_>>()];
    out.extend(rows.iter().map(|r| {
        keys.iter()
            .map(|k| {
                r[*k]
                    .as_str()
                    .map_or_else(|| r[*k].to_string(), str::to_owned)
            })
            .collect()
    }));
    columns(&out)
}

fn detach(global: &Global, paths: &[PathBuf], wait: u64) -> anyhow::Result<ExitCode> {
    let Some(node) = Node::open(&global.bpffs)? else {
        print(global.output, &json!({ "pods": [] }), |_| {
            "nothing is loaded, so nothing is enrolled".to_owned()
        })?;
        return Ok(ExitCode::SUCCESS);
    };
    let mut done = Vec::new();
    let mut failed = Vec::new();
    let mut missing = Vec::new();
    for path in paths {
        match Netns::open(path)
            .and_then(|netns| detach_one(&node, &netns, Duration::from_secs(wait)))
        {
            Ok((outcome, cookie)) => {
                let (result, connections) = match outcome {
                    Detached::Gone => ("detached", 0),
                    Detached::Draining(n) => ("draining", n),
                    Detached::NotEnrolled => ("not enrolled", 0),
                };
                done.push(json!({ "netns": path, "cookie": cookie, "result": result, "connections": connections }));
            }
            Err(error) if !path.exists() => missing.push((path, error)),
            Err(error) => failed.push(error),
        }
    }
    // Namespaces that are gone have no file to name them by. What was named is done by now, so that this does not
    // answer for it.
    let collected = pod::collect(&node)?;
    for (path, error) in missing {
        if collected > 0 {
            tracing::info!(%error, "the namespace is gone");
            done.push(json!({ "netns": path, "cookie": null, "result": "gone", "connections": 0 }));
        } else {
            failed.push(error);
        }
    }
    print(
        global.output,
        &json!({ "pods": done, "collected": collected }),
        |_| {
            let mut text = table(&done, &["netns", "cookie", "result", "connections"]);
            if done.iter().any(|d| d["result"] == "draining") {
                text.push_str(
                "\ndraining: these connections still go through ztunnel and keep the pod's rules; detach again once they \
                 have ended, or use --wait\n",
            );
            }
            if collected > 0 {
                text.push_str(&format!(
                    "\ncleaned up after {collected} namespaces that are gone or drained\n"
                ));
            }
            text
        },
    )?;
    report_failures(global, failed)
}

fn detach_one(
    node: &Node,
    netns: &Netns,
    wait: Duration,
) -> culvert::kernel::Result<(Detached, culvert::kernel::NetnsCookie)> {
    let end = Instant::now() + wait;
    loop {
        let outcome = pod::detach(node, netns)?;
        if !matches!(outcome, Detached::Draining(_)) || Instant::now() >= end {
            return Ok((outcome, netns.cookie()));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn list(global: &Global) -> anyhow::Result<ExitCode> {
    let pods = match Node::open(&global.bpffs)? {
        Some(node) => inspect::list(&node)?,
        None => Vec::new(),
    };
    print(global.output, &json!({ "pods": pods }), |_| {
        let mut rows = vec![row!["COOKIE", "STATE", "NETNS", "ADDRESSES"]];
        for pod in &pods {
            let addresses: Vec<String> = pod.addresses.iter().map(ToString::to_string).collect();
            let path = pod
                .path
                .as_ref()
                .map_or("-".to_owned(), |p| p.display().to_string());
            rows.push(row![
                pod.cookie,
                format!("{:?}", pod.state).to_lowercase(),
                path,
                addresses.join(" ")
            ]);
        }
        columns(&rows)
    })?;
    Ok(ExitCode::SUCCESS)
}

fn show(global: &Global, path: &std::path::Path) -> anyhow::Result<ExitCode> {
    let netns = Netns::open(path)?;
    let node = open(global)?;
    let report = inspect::show(&node, &netns)?.with_context(|| {
        format!(
            "{} is not enrolled: `culvert netns list` shows what is",
            path.display()
        )
    })?;
    print(global.output, &report, |r| {
        let mut text = format!(
            "{}: {}, {}\n",
            path.display(),
            format!("{:?}", r.summary.state).to_lowercase(),
            if r.whole { "whole" } else { "NOT WHOLE" }
        );
        let mut section = |title: &str, lines: Vec<String>| {
            if !lines.is_empty() {
                text.push_str(&format!("{title}:\n"));
                lines
                    .iter()
                    .for_each(|l| text.push_str(&format!("  {l}\n")));
            }
        };
        section("problems", r.problems.clone());
        section("notes", r.notes.clone());
        section(
            "addresses",
            r.summary
                .addresses
                .iter()
                .map(ToString::to_string)
                .collect(),
        );
        section(
            "policy",
            r.policy.iter().map(|(k, v)| format!("{k}: {v}")).collect(),
        );
        let listener = |l: &inspect::Listener| {
            format!(
                "{} {} (socket {}, rank {})",
                l.role,
                l.local.as_deref().unwrap_or("gone"),
                l.socket,
                l.rank
            )
        };
        section("listeners", r.listeners.iter().map(listener).collect());
        section("programmed", r.programmed.clone());
        let hooks = r.dns.iter().map(|hooks| {
            let at = hooks
                .cgroup
                .as_ref()
                .map_or("-".to_owned(), |path| path.display().to_string());
            format!("programs at {at}")
        });
        section("dns", hooks.collect());
        let counted = r.counters.iter().filter(|(_, n)| **n > 0);
        section(
            "counters",
            counted.map(|(k, n)| format!("{k}: {n}")).collect(),
        );
        section(
            "connections with our marks",
            vec![r.marked_connections.to_string()],
        );
        text
    })?;
    Ok(ExitCode::SUCCESS)
}

fn watch(global: &Global) -> anyhow::Result<ExitCode> {
    let node = Arc::new(open(global)?);
    let mut rescanner = Rescanner::new(&node);
    let mut follower = None;
    let mut watched = usize::MAX;
    loop {
        let wanted = node.config()?.probe_source == PROBES_KUBELET;
        if wanted != follower.is_some() {
            follower = wanted.then(|| follow_kubelet(global, &node)).transpose()?;
        }
        let round = rescanner.run_once(Duration::from_millis(500));
        if round.watched != watched || round.synced > 0 {
            watched = round.watched;
            match global.output {
                Format::Json | Format::Yaml => println!(
                    "{}",
                    json!({ "watched": round.watched, "synced": round.synced })
                ),
                Format::Table => println!(
                    "watching {} pods, {} brought up to date",
                    round.watched, round.synced
                ),
            }
        }
    }
}

/// Says whose probes are vouched for, whenever that changes.
fn follow_kubelet(global: &Global, node: &Arc<Node>) -> anyhow::Result<kubelet::Follower> {
    let output = global.output;
    let names = kubelet::NAMES.map(str::to_owned).to_vec();
    let tell = move |force| match (force, output) {
        (kubelet::InForce::Processes { pids }, Format::Json | Format::Yaml) => {
            println!("{}", json!({ "kubelet": pids }));
        }
        (kubelet::InForce::Processes { pids }, Format::Table) => {
            println!("vouching for the kubelet, process {pids:?}");
        }
        (kubelet::InForce::Nobody { why }, Format::Json | Format::Yaml) => {
            println!("{}", json!({ "kubelet": null, "why": why }));
        }
        (kubelet::InForce::Nobody { why }, Format::Table) => {
            println!("vouching for nobody: {why}");
        }
    };
    Ok(kubelet::Follower::start(Arc::clone(node), names, tell)?)
}
