//! `culvert status`: asks the agent how it stands; while it is away, the kernel.

use std::{
    fmt::Write as _,
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use culvert::{
    admin::{
        StatusReport,
        status::{PodState, PodStatus},
    },
    kernel::{Node, inspect},
};
use culvert_cni::{
    api,
    client::{self, Failure},
};
use serde_json::json;

use super::{
    Global,
    output::{columns, print, row},
};

/// Where the agent answers.
const PATH: &str = "/v1/status";
/// It answers from memory.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The agent's socket.
    #[arg(long, env = "CULVERT_AGENT_SOCKET", default_value = api::SOCKET, value_name = "FILE")]
    agent_socket: PathBuf,
}

/// Succeeds when the agent answers and is ready.
pub(super) fn run(global: &Global, args: &Args) -> anyhow::Result<ExitCode> {
    let answer: Result<StatusReport, Failure> =
        client::get(&args.agent_socket, PATH, Instant::now() + PATIENCE);
    match answer {
        Ok(report) => {
            print(global.output, &report, table)?;
            Ok(if report.readiness.ready {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            })
        }
        Err(failure) => {
            without_agent(global, &failure)?;
            Ok(ExitCode::FAILURE)
        }
    }
}

/// What the kernel says, and that nobody else does.
fn without_agent(global: &Global, failure: &Failure) -> anyhow::Result<()> {
    let cure = match failure {
        Failure::Away { cause, .. } if cause.kind() == std::io::ErrorKind::PermissionDenied => {
            "run as root"
        }
        Failure::Away { .. } => {
            "see whether its pod runs on this node (`kubectl get pods -A -o wide`, label app=culvert), or start `culvert \
             agent`; --agent-socket names another socket"
        }
        _ => "its log says more; the readiness of its pod shows whether it lives",
    };
    let pods = Node::open(&global.bpffs)?
        .map(|node| inspect::list(&node))
        .transpose()?;
    let value = json!({ "agent": null, "error": failure.to_string(), "cure": cure, "loaded": pods.is_some(), "kernel": pods });
    print(global.output, &value, |_| {
        let mut text = format!("agent: away: {failure}; {cure}\n");
        let Some(pods) = &pods else {
            let _ = writeln!(
                text,
                "kernel: nothing is loaded at {}: no pod of this node is captured",
                global.bpffs.display()
            );
            return text;
        };
        text.push_str(
            "kernel: programs are loaded; pods that are enrolled stay so. What follows is what the kernel alone knows\n\n",
        );
        let mut rows = vec![row!["COOKIE", "STATE", "NETNS", "ADDRESSES"]];
        rows.extend(pods.iter().map(|pod| {
            let path = pod
                .path
                .as_ref()
                .map_or("-".to_owned(), |p| p.display().to_string());
            row![
                pod.cookie,
                format!("{:?}", pod.state).to_lowercase(),
                path,
                words(&pod.addresses)
            ]
        }));
        text.push_str(&columns(&rows));
        text
    })
}

fn words<T: ToString>(all: &[T]) -> String {
    match all {
        [] => "-".to_owned(),
        all => all.iter().map(T::to_string).collect::<Vec<_>>().join(" "),
    }
}

fn seconds(count: u64) -> humantime::FormattedDuration {
    humantime::format_duration(Duration::from_secs(count))
}

fn table(report: &StatusReport) -> String {
    let mut text = format!(
        "node {}: agent {}, process {}, up {}, {}\n",
        report.node,
        report.version,
        report.pid,
        seconds(report.uptime_seconds),
        if report.readiness.ready {
            "ready"
        } else {
            "NOT READY"
        }
    );
    let tasks = report.readiness.tasks.iter();
    for task in tasks.filter(|t| !t.ready || !t.reason.is_empty()) {
        let _ = writeln!(
            text,
            "  {}: {} (for {})",
            task.name,
            task.reason,
            seconds(task.for_seconds)
        );
    }
    if report.ztunnels.is_empty() {
        text.push_str("ztunnel: none is connected; new pods of the mesh wait for one\n");
    }
    for ztunnel in &report.ztunnels {
        let _ = write!(
            text,
            "ztunnel: process {}, connected for {}, {}",
            ztunnel.pid,
            seconds(ztunnel.connected_seconds),
            count(ztunnel.pods, "pod")
        );
        if !ztunnel.snapshot_sent {
            text.push_str(", being told of this node's pods");
        }
        if ztunnel.refused > 0 {
            let _ = write!(text, ", REFUSES {}", ztunnel.refused);
        }
        text.push('\n');
    }
    text.push('\n');
    if report.pods.is_empty() {
        text.push_str("no pod of this node belongs to the mesh: label a namespace or a pod istio.io/dataplane-mode=ambient\n");
        return text;
    }
    let mut pods: Vec<&PodStatus> = report.pods.iter().collect();
    pods.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
    let mut rows = vec![row![
        "NAMESPACE",
        "POD",
        "STATE",
        "REDIRECTION",
        "NETNS",
        "ADDRESSES"
    ]];
    rows.extend(pods.iter().map(|pod| {
        row![
            pod.namespace,
            pod.name,
            pod.state.as_str(),
            pod.redirection.map_or("-", |r| r.as_str()),
            pod.netns_cookie.map_or("-".to_owned(), |c| c.to_string()),
            words(&pod.addresses)
        ]
    }));
    text.push_str(&columns(&rows));
    for pod in &pods {
        notes(pod, &mut text);
    }
    let enrolled = pods
        .iter()
        .filter(|p| p.state == PodState::Enrolled)
        .count();
    let wanted = pods.iter().filter(|p| p.wanted).count();
    let _ = writeln!(text, "\n{enrolled} of {wanted} enrolled");
    text
}

fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

/// What is wrong with a pod, below the table: it does not fit into one.
fn notes(pod: &PodStatus, text: &mut String) {
    let mut lines = Vec::new();
    lines.extend(pod.last_error.clone());
    lines.extend(
        pod.retry_in_seconds
            .map(|s| format!("tried again in {}", seconds(s))),
    );
    lines.extend(pod.warnings.iter().cloned());
    if lines.is_empty() {
        return;
    }
    let _ = writeln!(text, "\n{}/{}:", pod.namespace, pod.name);
    for line in lines {
        let _ = writeln!(text, "  {line}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> StatusReport {
        let value = json!({
            "node": "node-1", "version": "0.1.0", "pid": 42, "uptime_seconds": 3700,
            "readiness": { "ready": false, "tasks": [
                { "name": "programs", "ready": true, "reason": "", "for_seconds": 9 },
                { "name": "watch", "ready": false, "reason": "the API server does not answer", "for_seconds": 70 },
            ] },
            "ztunnels": [ { "pid": 7, "connected_seconds": 60, "snapshot_sent": true, "pods": 1, "refused": 1 } ],
            "pods": [
                { "namespace": "shop", "name": "web", "uid": "u1", "wanted": true, "state": "enrolled", "netns_cookie": 4711,
                  "addresses": ["10.0.0.5", "fd00::5"], "redirection": "enabled", "last_error": null,
                  "retry_in_seconds": null, "warnings": [] },
                { "namespace": "shop", "name": "api", "uid": "u2", "wanted": true, "state": "failing", "netns_cookie": null,
                  "addresses": [], "redirection": null, "last_error": "no such namespace; look for it",
                  "retry_in_seconds": 8, "warnings": ["a NetworkPolicy does not allow 15008"] },
            ],
        });
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn a_node_at_a_glance() {
        assert_eq!(
            table(&report()),
            "node node-1: agent 0.1.0, process 42, up 1h 1m 40s, NOT READY\n\
             \x20 watch: the API server does not answer (for 1m 10s)\n\
             ztunnel: process 7, connected for 1m, 1 pod, REFUSES 1\n\
             \n\
             NAMESPACE  POD  STATE     REDIRECTION  NETNS  ADDRESSES\n\
             shop       api  failing   -            -      -\n\
             shop       web  enrolled  enabled      4711   10.0.0.5 fd00::5\n\
             \n\
             shop/api:\n\
             \x20 no such namespace; look for it\n\
             \x20 tried again in 8s\n\
             \x20 a NetworkPolicy does not allow 15008\n\
             \n\
             1 of 2 enrolled\n"
        );
    }

    #[test]
    fn an_empty_node_says_what_to_do() {
        let empty = StatusReport {
            ztunnels: Vec::new(),
            pods: Vec::new(),
            ..report()
        };
        let text = table(&empty);
        assert!(text.contains("none is connected"), "{text}");
        assert!(text.contains("istio.io/dataplane-mode=ambient"), "{text}");
    }
}
