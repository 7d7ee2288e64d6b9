//! Removes what clusters of processes that are gone have left. It must never touch one whose process lives, nor one that
//! was meant to outlive its process.

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::Result;

use crate::place;
use crate::server::Lifetime;
use crate::state::State;

/// A directory that its maker has not locked yet is not taken for left over until it is this old.
const YOUNG: Duration = Duration::from_secs(60);

/// Looks through all clusters. What cannot be removed is said, and tried again by the next.
pub(crate) fn leftovers() -> Result<()> {
    let run = place::cluster_dir()?.join("run");
    for entry in fs::read_dir(run).into_iter().flatten().flatten() {
        let path = entry.path();
        if is_young(&path) {
            continue;
        }
        let state = State::read(&path).ok();
        // It may be a newer build's, which this one cannot judge.
        if state.is_none() && path.join(place::STATE).exists() {
            continue;
        }
        let meant = |state: &State| state.spec.lifetime == Lifetime::OnItsOwn;
        if state.as_ref().is_some_and(meant) {
            continue;
        }
        if let Ok(Some(_lock)) = place::lock(&path) {
            let swept = state
                .map_or(Ok(()), |state| state.tear_down())
                .and_then(|()| Ok(fs::remove_dir_all(&path)?));
            if let Err(error) = swept {
                eprintln!("sweeping {}: {error:#}", path.display());
            }
        }
    }
    Ok(())
}

fn is_young(path: &Path) -> bool {
    fs::metadata(path)
        .and_then(|data| data.modified())
        .is_ok_and(|at| {
            SystemTime::now()
                .duration_since(at)
                .is_ok_and(|age| age < YOUNG)
        })
}
