//! `culvert preflight`: everything the agent needs of the host and, asked to look there, of the cluster.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use culvert::{
    kernel::preflight::{self, Check},
    plan::cilium,
    watch::{Api, Options, client, preflight::rights},
};
use serde_json::json;

use super::{
    Global,
    output::{columns, print, row},
};

/// Check for every capability, mount and kernel feature at once; with --kubernetes for the agent's rights and Cilium's
/// settings as well.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Ask the API server too, as the pod's service account.
    #[arg(long)]
    kubernetes: bool,
    /// Ask the API server too, as this file says.
    #[arg(long, env = "CULVERT_KUBECONFIG", value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// The agent's own namespace.
    #[arg(
        long,
        env = "POD_NAMESPACE",
        default_value = "culvert-system",
        value_name = "NAME"
    )]
    namespace: String,
}

/// Fails when something is missing.
pub(crate) fn run(global: &Global, args: &Args) -> anyhow::Result<ExitCode> {
    let mut checks = preflight::run(&global.bpffs, global.cgroup_root.as_deref());
    if args.kubernetes || args.kubeconfig.is_some() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("starting a runtime")?;
        checks.extend(runtime.block_on(cluster(args)));
    }
    let ok = checks.iter().all(|c| c.ok);
    print(
        global.output,
        &json!({ "ok": ok, "checks": checks }),
        |_| {
            let mut rows = vec![row!["CHECK", "", "WHAT WAS SEEN"]];
            for c in &checks {
                let cure = if c.ok {
                    String::new()
                } else {
                    format!("; cure: {}", c.cure)
                };
                rows.push(row![
                    c.name,
                    if c.ok { "ok" } else { "MISSING" },
                    format!("{}{cure}", c.detail)
                ]);
            }
            columns(&rows)
        },
    )?;
    Ok(if ok {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// What the API server says; that it does not answer is one thing missing more.
async fn cluster(args: &Args) -> Vec<Check> {
    ask(args).await.unwrap_or_else(|error| {
        vec![Check {
            name: "API server".into(),
            ok: false,
            detail: error.to_string(),
            cure: "give --kubeconfig, or run it in the agent's pod".to_owned(),
        }]
    })
}

async fn ask(args: &Args) -> culvert::watch::Result<Vec<Check>> {
    let config = client::config(args.kubeconfig.as_deref()).await?;
    let client = client::connect(&config)?;
    let mut checks = Vec::new();
    for right in rights(&client, &args.namespace).await? {
        let group = match right.rule.group {
            "" => String::new(),
            group => format!(".{group}"),
        };
        let verbs = |verbs: &[&str]| verbs.join(", ");
        checks.push(Check {
            name: format!("right on {}{group}", right.rule.resource).into(),
            ok: right.refused.is_empty(),
            detail: if right.refused.is_empty() {
                verbs(right.rule.verbs)
            } else {
                format!("refused: {}", verbs(&right.refused))
            },
            cure: match (&right.namespace, right.refused.is_empty()) {
                (_, true) => String::new(),
                (Some(namespace), _) => format!(
                    "grant it to the agent's service account in namespace {namespace}, for: {}",
                    right.rule.why
                ),
                (None, _) => format!(
                    "grant it to the agent's service account in a ClusterRole, for: {}",
                    right.rule.why
                ),
            },
        });
    }
    let api = Api::new(
        client,
        Options {
            node: String::new(),
            instance: String::new(),
            opt_in: [].into(),
        },
    );
    // Refused is said above already.
    let Ok(config) = api.cilium_config().await else {
        return Ok(checks);
    };
    let findings = cilium::judge(config.as_ref(), None);
    for finding in &findings {
        checks.push(Check {
            name: "Cilium".into(),
            ok: false,
            detail: format!("{}: {}", finding.seen, finding.effect),
            cure: finding.cure.clone(),
        });
    }
    if findings.is_empty() {
        let detail = match config {
            Some(_) => "its settings are fine",
            None => "not installed",
        };
        checks.push(Check {
            name: "Cilium".into(),
            ok: true,
            detail: detail.to_owned(),
            cure: String::new(),
        });
    }
    Ok(checks)
}
