//! Where things of a lab lie, and how their names say to which process they belong. Pure names: creates nothing.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

/// Every name of ours in a shared place begins with this.
pub(crate) const PREFIX: &str = "culvert-test-";

/// Where namespaces get a path.
pub(crate) const NETNS_DIR: &str = "/run/netns";

/// The mounts of this process that matter to a lab.
pub(crate) fn mount_points(fstype: &str) -> Result<Vec<PathBuf>> {
    let table = std::fs::read_to_string("/proc/self/mountinfo")
        .context("reading /proc/self/mountinfo: is /proc mounted?")?;
    Ok(mounts_in(&table, fstype))
}

fn mounts_in(table: &str, fstype: &str) -> Vec<PathBuf> {
    table
        .lines()
        .filter_map(|line| {
            let (mount, kind) = line.split_once(" - ")?;
            (kind.split(' ').next()? == fstype).then_some(())?;
            Some(PathBuf::from(mount.split(' ').nth(4)?))
        })
        .collect()
}

/// `culvert-test-<name>-<pid>[_<n>]`.
pub(crate) fn lab_id(name: &str, attempt: u32) -> Result<String> {
    ensure!(
        !name.is_empty()
            && name
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_'),
        "a lab's name {name:?} becomes part of file names: use letters, digits, '-' and '_'"
    );
    let pid = std::process::id();
    Ok(if attempt == 0 {
        format!("{PREFIX}{name}-{pid}")
    } else {
        // No dot: bpffs keeps names with one for itself.
        format!("{PREFIX}{name}-{pid}_{attempt}")
    })
}

/// The process that a name of ours belongs to.
pub(crate) fn owner_pid(file_name: &str) -> Option<i32> {
    let rest = file_name.strip_prefix(PREFIX)?;
    // A namespace's file is called `<lab id>@<namespace>`.
    let id = rest.split('@').next()?;
    let last = id.rsplit('-').next()?;
    last.split('_').next()?.parse().ok()
}

/// A binary of this workspace: from the environment, or beside the running one.
pub(crate) fn binary(env: &str, name: &str, cure: &str) -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(env) {
        let path = PathBuf::from(path);
        ensure!(
            path.is_file(),
            "{env}={} is no file: point it at the {name} binary",
            path.display()
        );
        return Ok(path);
    }
    let me = std::env::current_exe().context("finding the running binary")?;
    // Test binaries lie in target/<profile>/deps, the others in target/<profile>.
    let found = me
        .ancestors()
        .skip(1)
        .take(2)
        .map(|dir| dir.join(name))
        .find(|path| path.is_file());
    found.with_context(|| {
        format!(
            "no {name} binary beside {}: {cure}, or set {env}",
            me.display()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_their_owner() {
        assert_eq!(owner_pid("culvert-test-two-words-42"), Some(42));
        assert_eq!(owner_pid("culvert-test-x-42_3"), Some(42));
        assert_eq!(owner_pid("culvert-test-x-42@pod-7"), Some(42));
        assert_eq!(owner_pid("culvert"), None);
        assert_eq!(owner_pid("culvert-test-x"), None);
    }

    #[test]
    fn mounts_are_found_by_type() {
        let table = "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                     41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:4 - cgroup2 cgroup2 rw\n";
        assert_eq!(
            mounts_in(table, "cgroup2"),
            [PathBuf::from("/sys/fs/cgroup/unified")]
        );
        assert!(mounts_in(table, "bpf").is_empty());
    }
}
