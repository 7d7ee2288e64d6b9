//! What outlives the agent: the decision file that the plugin reads while there is no agent, and the list of captured
//! pods for the next agent, should it find no API server.
//!
//! Both only ever say less than is true when they are old or missing; neither is read while better is to be had.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use culvert_cni::{
    atomic,
    decisions::{Decisions, Standing},
};
use serde::{Deserialize, Serialize};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    kernel::pod::Policy,
    model::{Cluster, keys},
    plan::membership::{self, Settings},
};

/// An unchanged file is written anew this often, so that its age tells when the agent last ran.
const REFRESH: Duration = Duration::from_secs(300);
/// After a write that failed, the next.
const RETRY: Duration = Duration::from_secs(5);
/// Changes closer together than this are written as one.
const GATHER: Duration = Duration::from_millis(200);

/// Where every namespace stands.
#[must_use]
pub fn decisions(cluster: &Cluster, settings: &Settings) -> Decisions {
    let standing = |name: &String, labels: &BTreeMap<String, String>| {
        let opted_in = cluster.opted_in.get(name).copied().unwrap_or(0);
        if labels.get(keys::DATAPLANE_MODE).map(String::as_str) == Some(keys::AMBIENT) {
            Standing::Mesh
        } else if membership::could_be_in(name, labels, opted_in, settings) {
            Standing::OptedIn
        } else {
            Standing::Outside
        }
    };
    let namespaces = cluster
        .namespaces
        .iter()
        .map(|(name, ns)| (name.clone(), standing(name, &ns.labels)));
    Decisions::new(
        settings.selectors != membership::default_selectors(),
        settings.excluded_namespaces.clone(),
        namespaces.collect(),
    )
}

/// Keeps the decision file up to date until cancelled. `failed` hears of each write that fails, and that one worked
/// again.
pub async fn keep(
    path: PathBuf,
    mut cluster: watch::Receiver<Cluster>,
    settings: Settings,
    end: CancellationToken,
    failed: impl Fn(Option<io::Error>) + Send,
) {
    let mut published: Option<(Decisions, Instant)> = None;
    loop {
        let mut pause = REFRESH;
        let now = {
            let cluster = cluster.borrow_and_update();
            (cluster.listed && cluster.opted_in_listed).then(|| decisions(&cluster, &settings))
        };
        if let Some(now) = now {
            let same = published.as_ref().is_some_and(|(before, at)| {
                at.elapsed() < REFRESH
                    && (
                        before.custom_selectors,
                        &before.excluded,
                        &before.namespaces,
                    ) == (now.custom_selectors, &now.excluded, &now.namespaces)
            });
            if !same {
                match write(path.clone(), now).await {
                    Ok(written) => {
                        published = Some((written, Instant::now()));
                        failed(None);
                    }
                    Err(error) => {
                        pause = RETRY;
                        failed(Some(error));
                    }
                }
            }
        }
        tokio::select! {
            () = end.cancelled() => return,
            changed = cluster.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(pause) => {}
        }
        tokio::time::sleep(GATHER).await;
    }
}

/// Writes the decisions, and gives them back. A disk that is busy takes seconds to say that they are there.
async fn write(path: PathBuf, decisions: Decisions) -> io::Result<Decisions> {
    let write = move || {
        path.parent().map_or(Ok(()), std::fs::create_dir_all)?;
        decisions.publish(&path)?;
        Ok(decisions)
    };
    let written = tokio::task::spawn_blocking(write).await;
    written.unwrap_or_else(|error| Err(io::Error::other(error)))
}

/// A captured pod, for the next agent.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Remembered {
    /// Cookie of its network namespace: of no use once the node has booted anew, and never another's.
    pub cookie: u64,
    /// `metadata.uid`.
    pub uid: String,
    /// Its UID on the node where that is another (static pods).
    pub static_uid: Option<String>,
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
    /// `spec.serviceAccountName`.
    pub service_account: String,
    /// The runtime's name for its sandbox, where the plugin brought it.
    pub sandbox: Option<String>,
    /// ztunnel served it.
    pub served: bool,
    /// As what it was captured, unless it was being let go.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<Policy>,
}

/// Writes the list. It need not outlive the node's running: cookies do not either.
pub fn remember(path: &Path, pods: &[Remembered]) -> io::Result<()> {
    atomic::replace(path, &serde_json::to_vec(pods)?, 0o600)
}

/// Reads the list; one that is missing or broken is empty.
#[must_use]
pub fn recall(path: &Path) -> Vec<Remembered> {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "reading the list of captured pods");
            return Vec::new();
        }
    };
    serde_json::from_slice(&text).unwrap_or_else(|error| {
        tracing::warn!(path = %path.display(), %error, "the list of captured pods is broken");
        Vec::new()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Namespace;

    #[test]
    fn namespaces_stand_where_their_labels_and_pods_put_them() {
        let mut cluster = Cluster::default();
        for (name, mode) in [("plain", None), ("mesh", Some("ambient")), ("mixed", None)] {
            let labels = mode.map(|m| (keys::DATAPLANE_MODE.to_owned(), m.to_owned()));
            let namespace = Namespace {
                labels: labels.into_iter().collect(),
                ..Namespace::default()
            };
            cluster.namespaces.insert(name.into(), namespace);
        }
        cluster.opted_in.insert("mixed".into(), 2);
        let found = decisions(&cluster, &Settings::default());
        assert!(!found.custom_selectors);
        assert_eq!(
            found.namespaces,
            [
                ("mesh".to_owned(), Standing::Mesh),
                ("mixed".to_owned(), Standing::OptedIn),
                ("plain".to_owned(), Standing::Outside)
            ]
            .into()
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_write_that_failed_is_tried_again_soon() {
        let dir = std::env::temp_dir().join(format!("culvert-publish-{}", std::process::id()));
        let path = dir.join("below/decisions.json");
        // Where a directory has to be made, there is a file.
        std::fs::write(&dir, "in the way").unwrap();
        let (outcomes, mut heard) = tokio::sync::mpsc::unbounded_channel();
        let cluster = watch::Sender::new(Cluster {
            listed: true,
            opted_in_listed: true,
            ..Cluster::default()
        });
        let end = CancellationToken::new();
        let kept = tokio::spawn(keep(
            path.clone(),
            cluster.subscribe(),
            Settings::default(),
            end.clone(),
            move |error| {
                let _heard = outcomes.send(error.is_none());
            },
        ));
        assert_eq!(heard.recv().await, Some(false));
        assert_eq!(heard.recv().await, Some(false));
        std::fs::remove_file(&dir).unwrap();
        let started = Instant::now();
        assert_eq!(heard.recv().await, Some(true));
        assert!(started.elapsed() < Duration::from_secs(10));
        assert!(path.exists());
        end.cancel();
        kept.await.unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
