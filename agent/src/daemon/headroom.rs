//! ztunnels that run short of file descriptors, said before pods get stuck: each pod takes several, and a ztunnel at its
//! limit refuses the next, or connections of all.

use std::{sync::Arc, time::Duration};

use crate::{
    admin::{Metrics, Task},
    kernel::{
        self,
        open_files::{self, OpenFiles},
    },
    watch::{About, Kind, Notice, Source},
    zds,
};

/// A namespace's worth of pods may be enrolled in a second; looking costs two reads a ztunnel.
const LOOK_AGAIN: Duration = Duration::from_secs(10);
/// From here on it is said.
const NEAR: u64 = 80;
/// What is said changes in such steps, or it would change with every connection.
const STEP: u64 = 5;

/// Looks again and again.
pub(super) async fn keep(zds: zds::Server, source: Arc<Source>, metrics: Arc<Metrics>, task: Task) {
    task.set_ready();
    let mut before = String::new();
    loop {
        let pids = zds.status().peers.iter().map(|peer| peer.pid).collect();
        let found = look(pids).await;
        let fullest = found.iter().map(|(_, files)| *files);
        let fullest = fullest.max_by_key(OpenFiles::percent);
        let number = |n: Option<u64>| n.map_or(0, |n| i64::try_from(n).unwrap_or(i64::MAX));
        metrics
            .ztunnel_open_files
            .set(number(fullest.map(|f| f.open)));
        metrics
            .ztunnel_open_files_limit
            .set(number(fullest.map(|f| f.limit)));
        let now = complaint(&found);
        if now != before {
            task.set_ready_but(now.clone());
            if !now.is_empty() {
                tracing::warn!("{now}");
                source.event(Notice {
                    about: About::Node,
                    kind: Kind::Warning,
                    reason: "CulvertZtunnelFiles",
                    action: "Check",
                    note: now.clone(),
                });
            }
            before = now;
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

async fn look(pids: Vec<u32>) -> Vec<(u32, OpenFiles)> {
    if pids.is_empty() {
        return Vec::new();
    }
    let look = move || {
        let each = pids
            .into_iter()
            .filter_map(|pid| match open_files::of(pid) {
                Ok(files) => Some((pid, files?)),
                Err(error) => {
                    unseen(pid, &error);
                    None
                }
            });
        each.collect()
    };
    tokio::task::spawn_blocking(look).await.unwrap_or_default()
}

fn unseen(pid: u32, error: &kernel::Error) {
    tracing::debug!(pid, %error, "looking at ztunnel's open files");
}

/// What is to be said of them; empty when none is near its limit.
fn complaint(found: &[(u32, OpenFiles)]) -> String {
    let near = found.iter().filter(|(_, files)| files.percent() >= NEAR);
    let near: Vec<String> = near
        .map(|(pid, files)| {
            let percent = files.percent() / STEP * STEP;
            format!(
                "ztunnel, process {pid}, has {percent} % or more of the {} files open that it may",
                files.limit
            )
        })
        .collect();
    if near.is_empty() {
        return String::new();
    }
    format!(
        "{}: at the limit it takes no further pod and no connection; raise the limit of open files of its container \
         (LimitNOFILE= of the container runtime's service) and restart it, or keep fewer pods on this node",
        near.join("; ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_those_near_their_limit_are_complained_of() {
        let files = |open| OpenFiles { open, limit: 1000 };
        assert_eq!(complaint(&[]), "");
        assert_eq!(complaint(&[(1, files(799))]), "");
        let said = complaint(&[(1, files(10)), (2, files(874))]);
        assert!(
            said.contains("process 2, has 85 % or more of the 1000"),
            "{said}"
        );
        assert!(!said.contains("process 1,"), "{said}");
        assert!(said.contains("LimitNOFILE"), "{said}");
        assert_eq!(
            said,
            complaint(&[(2, files(850))]),
            "a connection more or less is nothing new"
        );
    }
}
