//! Rights at the API server that the agent lacks, said by name: most of them are missed only when they are needed, which
//! may be days later.

use std::{sync::Arc, time::Duration};

use tokio_util::sync::CancellationToken;

use crate::{
    admin::Task,
    watch::{About, Kind, Notice, Source, preflight::Right, rbac::Scope},
};

/// While something is refused.
const LOOK_AGAIN: Duration = Duration::from_secs(10);
/// While nothing is: it costs one request a right.
const LOOK_SELDOM: Duration = Duration::from_secs(3600);

/// Asks at the start, and from then on until the end.
pub(super) async fn keep(
    source: Arc<Source>,
    own: Option<String>,
    task: Task,
    end: CancellationToken,
) {
    task.set_ready();
    let Source::Api(api) = &*source else {
        return;
    };
    let mut before = String::new();
    loop {
        let asked = tokio::select! {
            () = end.cancelled() => return,
            asked = api.rights(own.as_deref().unwrap_or_default()) => asked,
        };
        let pause = match asked {
            Ok(mut rights) => {
                // Without a namespace of its own it has no use for them.
                rights.retain(|right| own.is_some() || right.rule.scope != Scope::Own);
                let missing = complaint(&rights);
                if missing != before {
                    tell(&source, &task, &missing);
                    before = missing;
                }
                if before.is_empty() {
                    LOOK_SELDOM
                } else {
                    LOOK_AGAIN
                }
            }
            Err(error) => {
                tracing::debug!(%error, "asking for rights");
                LOOK_AGAIN
            }
        };
        tokio::select! {
            () = end.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
    }
}

fn tell(source: &Source, task: &Task, missing: &str) {
    // Pods are served all the same, as far as it goes; what does not go without is not ready under its own name.
    task.set_ready_but(missing);
    if missing.is_empty() {
        return;
    }
    tracing::warn!("{missing}");
    source.event(Notice {
        about: About::Node,
        kind: Kind::Warning,
        reason: "CulvertRights",
        action: "Check",
        note: missing.to_owned(),
    });
}

/// What is refused, what for, and the cure; empty when nothing is.
fn complaint(rights: &[Right]) -> String {
    let refused: Vec<String> = rights
        .iter()
        .filter(|right| !right.refused.is_empty())
        .map(ToString::to_string)
        .collect();
    if refused.is_empty() {
        return String::new();
    }
    format!(
        "the API server refuses the agent: {}; grant it to the agent's service account: the chart's roles list what is \
         needed",
        refused.join("; ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::watch::rbac::RULES;

    #[test]
    fn only_what_is_refused_is_complained_of() {
        let right = |index: usize, refused: &[&'static str]| Right {
            rule: &RULES[index],
            namespace: (index > 5).then(|| "there".to_owned()),
            refused: refused.to_vec(),
        };
        assert_eq!(complaint(&[right(0, &[]), right(1, &[])]), "");
        let said = complaint(&[
            right(0, &["list", "watch"]),
            right(1, &[]),
            right(6, &["get"]),
        ]);
        assert!(
            said.contains("list, watch pods (pods of this node"),
            "{said}"
        );
        assert!(
            said.contains("get daemonsets.apps in namespace there (on SIGTERM"),
            "{said}"
        );
        assert!(!said.contains("pods/status"), "{said}");
    }
}
