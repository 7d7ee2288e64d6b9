//! The counters, told to whoever connects: the proof that the proxy was in the path.
//!
//! Owns the statistics socket and the form of its one line of JSON.

use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;

use anyhow::Context as _;
use serde::Serialize;
use tokio::io::AsyncWriteExt as _;
use tokio::net::UnixListener;

use crate::counters::Snapshot;
use crate::manager::Pods;

/// One pod in the statistics.
#[derive(Debug, Serialize)]
pub struct PodStats {
    uid: String,
    name: String,
    namespace: String,
    netns_inode: u64,
    #[serde(flatten)]
    counters: Snapshot,
}

/// What one connection is told.
#[derive(Debug, Serialize)]
pub struct Stats {
    pid: u32,
    pods: Vec<PodStats>,
}

/// The counters of all pods, sorted by UID.
#[must_use]
pub fn collect(pods: &Pods) -> Stats {
    let mut pods: Vec<_> = pods
        .all()
        .iter()
        .map(|pod| PodStats {
            uid: pod.workload.uid.clone(),
            name: pod.workload.info.name.clone(),
            namespace: pod.workload.info.namespace.clone(),
            netns_inode: pod.netns.inode(),
            counters: pod.counters.snapshot(),
        })
        .collect();
    pods.sort_by(|a, b| a.uid.cmp(&b.uid));
    Stats {
        pid: std::process::id(),
        pods,
    }
}

/// Opens the statistics socket; a stale one is taken away.
///
/// # Errors
/// When the path is taken by something else or cannot be written.
pub fn bind(path: &Path) -> anyhow::Result<UnixListener> {
    match std::fs::symlink_metadata(path) {
        Ok(meta) if meta.file_type().is_socket() => {
            std::fs::remove_file(path)
                .with_context(|| format!("cannot remove the stale socket {}", path.display()))?;
        }
        Ok(_) => anyhow::bail!(
            "{} is there and not a socket: choose another path for --stats",
            path.display()
        ),
        Err(_) => {}
    }
    UnixListener::bind(path).with_context(|| {
        format!(
            "cannot listen on {}: does its directory exist?",
            path.display()
        )
    })
}

/// Answers every connection with one line and closes it.
pub async fn serve(listener: UnixListener, pods: Pods) {
    loop {
        let Ok((mut stream, _)) = listener.accept().await else {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            continue;
        };
        match serde_json::to_vec(&collect(&pods)) {
            Ok(mut line) => {
                line.push(b'\n');
                // A reader that has gone away misses its line and nothing else.
                let _ = stream.write_all(&line).await;
            }
            Err(error) => tracing::error!(%error, "cannot write the statistics"),
        }
    }
}
