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
    model::{Cluster, keys},
    plan::membership::{self, Settings},
};

/// An unchanged file is written anew this often, so that its age tells when the agent last ran.
const REFRESH: Duration = Duration::from_secs(300);
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
                let made = path.parent().map_or(Ok(()), std::fs::create_dir_all);
                match made.and_then(|()| now.publish(&path)) {
                    Ok(()) => {
                        published = Some((now, Instant::now()));
                        failed(None);
                    }
                    Err(error) => failed(Some(error)),
                }
            }
        }
        tokio::select! {
            () = end.cancelled() => return,
            changed = cluster.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(REFRESH) => {}
        }
        tokio::time::sleep(GATHER).await;
    }
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
}
