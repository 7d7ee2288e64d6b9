//! Removes what labs of processes that are gone have left behind. It must never touch a name that is not a lab's, nor
//! one whose process lives.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::kill;
use nix::unistd::Pid;

use crate::paths::{NETNS_DIR, owner_pid};
use crate::{bpffs, cgroup};

/// Sweeps every place labs leave names in.
pub(crate) fn leftovers() -> Result<()> {
    for path in orphans(&bpffs::root()?) {
        remove_tree(&path)?;
    }
    for path in orphans(Path::new(NETNS_DIR)) {
        remove_netns(&path)?;
    }
    for path in orphans(&cgroup::root()?) {
        cgroup::remove(&path)?;
    }
    for path in orphans(&std::env::temp_dir()) {
        remove_tree(&path)?;
    }
    Ok(())
}

/// Removes a directory and all below it; one that is gone is fine.
pub(crate) fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Takes a namespace's path away; the namespace itself lives on while something is in it.
pub(crate) fn remove_netns(path: &Path) -> Result<()> {
    // Not mounted is fine: the run may have died between making the file and mounting on it.
    let _not_mounted = umount2(path, MntFlags::MNT_DETACH);
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}

fn orphans(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter(|entry| {
            entry
                .file_name()
                .to_str()
                .and_then(owner_pid)
                .is_some_and(|pid| !alive(pid))
        })
        .map(|entry| entry.path())
        .collect()
}

fn alive(pid: i32) -> bool {
    kill(Pid::from_raw(pid), None) != Err(nix::errno::Errno::ESRCH)
}
