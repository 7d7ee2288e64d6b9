//! Cilium beside us: refused at the start where both would capture, and watched from then on; what is wrong is said in
//! readiness, in an event on the node and in a metric, until it is right.

use std::{sync::Arc, time::Duration};

use anyhow::{Result, bail};
use tokio_util::sync::CancellationToken;

use crate::{
    admin::{
        Metrics, Task,
        labels::{By, CiliumSetting, Closed as _},
    },
    kernel::Node,
    plan::cilium::{Finding, Setting, judge},
    watch::{About, Api, Cilium, Kind, Notice, Source},
};

/// An API server that is away holds up no start: pods that are captured already wait for it.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often the node is looked at again: nobody tells of programs that come and go.
const LOOK_AGAIN: Duration = Duration::from_secs(60);

/// Fails where Cilium captures pods itself.
pub(super) async fn refuse(source: &Source) -> Result<()> {
    let Source::Api(api) = source else {
        return Ok(());
    };
    let config = match tokio::time::timeout(PATIENCE, api.cilium_config()).await {
        Ok(Ok(config)) => config,
        Ok(Err(error)) => {
            tracing::warn!(%error, "Cilium's configuration could not be read yet");
            return Ok(());
        }
        Err(_) => return Ok(()),
    };
    if let Some(fatal) = judge(config.as_ref(), None).iter().find(|f| f.is_fatal()) {
        bail!("{fatal}");
    }
    Ok(())
}

/// Judges at each change, until the end.
pub(super) async fn keep(
    source: Arc<Source>,
    node: Arc<Node>,
    metrics: Arc<Metrics>,
    task: Task,
    end: CancellationToken,
) {
    task.set_ready();
    let Source::Api(api) = &*source else {
        return;
    };
    let mut config = api.cilium();
    let mut before = Vec::new();
    loop {
        let known = config.borrow_and_update().clone();
        let socket_lb = look(&node).await;
        let findings = match &known {
            Cilium::Unknown => Vec::new(),
            Cilium::Absent => judge(None, socket_lb),
            Cilium::Configured(settings) => judge(Some(settings), socket_lb),
        };
        if findings != before {
            tell(api, &metrics, &task, &before, &findings);
            before = findings;
        }
        tokio::select! {
            () = end.cancelled() => return,
            () = tokio::time::sleep(LOOK_AGAIN) => {}
            changed = config.changed() => if changed.is_err() { return },
        }
    }
}

/// Whether Cilium's socket load balancing is at work here; none where that cannot be seen.
async fn look(node: &Arc<Node>) -> Option<bool> {
    let node = Arc::clone(node);
    let look = move || node.runs_at_root("cil_sock4_connect");
    match tokio::task::spawn_blocking(look).await {
        Ok(Ok(active)) => Some(active),
        Ok(Err(error)) => {
            tracing::debug!(%error, "looking for Cilium's programs");
            None
        }
        Err(_) => None,
    }
}

fn tell(api: &Api, metrics: &Metrics, task: &Task, before: &[Finding], now: &[Finding]) {
    for setting in CiliumSetting::ALL {
        let wrong = now
            .iter()
            .any(|f| CiliumSetting::from(f.setting) == *setting);
        metrics
            .cilium_findings
            .get_or_create(&By(*setting))
            .set(wrong.into());
    }
    for finding in now.iter().filter(|f| !before.contains(f)) {
        tracing::warn!("{finding}");
        api.event(Notice {
            about: About::Node,
            kind: Kind::Warning,
            // Events of one reason are merged.
            reason: match finding.setting {
                Setting::Ztunnel => "CulvertCiliumZtunnel",
                Setting::CniExclusive => "CulvertCiliumExclusive",
                Setting::SocketLb => "CulvertCiliumSocketLB",
            },
            action: "Check",
            note: finding.to_string(),
        });
    }
    if now.is_empty() {
        tracing::info!("nothing is wrong with Cilium's settings any more");
    }
    let all: Vec<String> = now.iter().map(ToString::to_string).collect();
    if now.iter().any(Finding::is_fatal) {
        task.set_not_ready(all.join("; "));
    } else {
        task.set_ready_but(all.join("; "));
    }
}
