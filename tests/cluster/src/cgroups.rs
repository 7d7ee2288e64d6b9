//! The cgroups below which a node's kubelet keeps its pods: two kubelets on one kernel take each other's pods for orphans
//! unless each has a root of its own. It makes and removes exactly those.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

/// Processes that were killed leave their cgroups a moment later.
const GONE: Duration = Duration::from_secs(20);

/// Makes `/name` in every v1 hierarchy, or in the v2 one where there are none.
pub(crate) fn create(name: &str) -> Result<()> {
    for root in pods_in(&mounts()?) {
        let dir = root.join(name);
        fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
        // A cpuset begins empty, and lets no process in until it is not.
        for file in ["cpuset.cpus", "cpuset.mems"] {
            if let Ok(value) = fs::read_to_string(root.join(file))
                && !value.trim().is_empty()
            {
                let file = dir.join(file);
                fs::write(&file, value).with_context(|| format!("writing {}", file.display()))?;
            }
        }
    }
    Ok(())
}

/// Removes `/name` with all below it, everywhere. Its processes must have been killed.
pub(crate) fn remove(name: &str) -> Result<()> {
    let started = Instant::now();
    loop {
        // On a hybrid machine runc leaves empty ones in the v2 hierarchy too.
        let left: Vec<_> = mounts()?
            .into_iter()
            .map(|(_, root)| root.join(name))
            .filter(|dir| dir.exists() && !remove_tree(dir))
            .collect();
        if left.is_empty() {
            return Ok(());
        }
        if started.elapsed() > GONE {
            bail!("cgroups with live processes: {left:?}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// True when it is gone.
fn remove_tree(dir: &Path) -> bool {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path());
        }
    }
    fs::remove_dir(dir).is_ok()
}

/// The v2 hierarchy, wherever it is mounted.
pub(crate) fn v2() -> Result<PathBuf> {
    mounts()?
        .into_iter()
        .find_map(|(kind, root)| (kind == "cgroup2").then_some(root))
        .context("no cgroup2 is mounted: mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified")
}

/// The kinds and places of all hierarchies.
fn mounts() -> Result<Vec<(String, PathBuf)>> {
    let table =
        fs::read_to_string("/proc/self/mountinfo").context("reading /proc/self/mountinfo")?;
    Ok(mounts_in(&table))
}

fn mounts_in(table: &str) -> Vec<(String, PathBuf)> {
    table
        .lines()
        .filter_map(|line| {
            let (mount, kind) = line.split_once(" - ")?;
            let kind = kind.split(' ').next()?;
            kind.starts_with("cgroup").then_some(())?;
            Some((kind.to_owned(), mount.split(' ').nth(4)?.into()))
        })
        .collect()
}

/// Where pods are put: in all v1 hierarchies, in the v2 one where there are none.
fn pods_in(mounts: &[(String, PathBuf)]) -> Vec<&Path> {
    let of = |wanted: &str| -> Vec<&Path> {
        mounts
            .iter()
            .filter(|(kind, _)| kind == wanted)
            .map(|(_, root)| root.as_path())
            .collect()
    };
    let v1 = of("cgroup");
    if v1.is_empty() { of("cgroup2") } else { v1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_go_to_the_v1_hierarchies_where_there_are_any() {
        let v1 = "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu";
        let v2 = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw";
        let hybrid = mounts_in(&format!(
            "{v1}\n{v2}\n31 1 0:28 / /tmp rw - tmpfs tmpfs rw\n"
        ));
        assert_eq!(hybrid.len(), 2);
        assert_eq!(pods_in(&hybrid), [Path::new("/sys/fs/cgroup/cpu")]);
        assert_eq!(
            pods_in(&mounts_in(v2)),
            [Path::new("/sys/fs/cgroup/unified")]
        );
    }
}
