//! What `/proc` says of processes: which there are, and whose pod a cgroup path names.
//!
//! Reads only, and below a root that is given, so that recorded trees are read like living ones. It knows what the
//! cgroup of a pod looks like, not what a pod is. Processes end while one looks: whatever is gone is left out.

use std::{
    fs::{self, File},
    io::{self, Read},
    path::Path,
};

use super::error::{Error, Result};

/// Where the kernel shows processes.
pub const PROC: &str = "/proc";

/// The process numbers below `root`, in no order.
pub fn processes(root: &Path) -> Result<impl Iterator<Item = u32>> {
    let entries = fs::read_dir(root).map_err(|e| {
        Error::system("read", root.display(), e).cured_by(
            "mount /proc there; an agent in a container needs hostPID to see the node's processes",
        )
    })?;
    Ok(entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok()))
}

/// Reads a process's file into `buffer`; false when the process is gone.
pub(super) fn read(root: &Path, pid: u32, name: &str, buffer: &mut Vec<u8>) -> Result<bool> {
    buffer.clear();
    let path = root.join(pid.to_string()).join(name);
    match File::open(&path).and_then(|mut file| file.read_to_end(buffer)) {
        Ok(_) => Ok(true),
        Err(error) if vanished(&error) => Ok(false),
        Err(error) => Err(Error::system("read", path.display(), error)),
    }
}

/// The process ended, or gave the thing asked for back before it did.
pub(super) fn vanished(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH))
}

/// The UID of the pod a process belongs to, from its `/proc/PID/cgroup`: with dashes, or the 32 hexadecimal digits of
/// a static pod's hash.
///
/// Any hierarchy may tell: on hybrid hosts the v2 line often stays at the root. What is recognised is the part of the
/// path that the kubelet names, `pod<UID>` (cgroupfs driver) or `...-pod<UID>.slice` (systemd driver), wherever it
/// stands: below `/kubepods`, a cgroup root of the kubelet's own, kind's `kubelet.slice`, the path of a nested node,
/// or, seen from a cgroup namespace, below nothing but `..`. With a pod's processes inside a pod the innermost counts.
#[must_use]
pub fn pod_uid(cgroup: &[u8]) -> Option<String> {
    cgroup.split(|b| *b == b'\n').find_map(|line| {
        // hierarchy:controllers:path, and the path may hold colons.
        let path = line.splitn(3, |b| *b == b':').nth(2)?;
        path.rsplit(|b| matches!(b, b'/' | b':')).find_map(uid_of)
    })
}

/// The UID in one part of a cgroup path.
fn uid_of(part: &[u8]) -> Option<String> {
    // A removed cgroup is still named to those who linger in it.
    let part = part.strip_suffix(b" (deleted)").unwrap_or(part);
    let part = part.strip_suffix(b".slice").unwrap_or(part);
    [UUID, HASH].into_iter().find_map(|length| {
        let (before, uid) = part.split_at(part.len().checked_sub(length)?);
        let parent = before.strip_suffix(b"pod")?;
        let whole = parent.is_empty() || parent.ends_with(b"-");
        whole.then(|| canonical(uid)).flatten()
    })
}

/// Digits of a UID with its four dashes.
const UUID: usize = 36;
/// Digits of a static pod's hash.
const HASH: usize = 32;

/// With dashes, as the API writes it; systemd's names have underscores in their place.
fn canonical(uid: &[u8]) -> Option<String> {
    const DASHES: [usize; 4] = [8, 13, 18, 23];
    let separator = uid
        .get(DASHES[0])
        .copied()
        .filter(|b| matches!(b, b'-' | b'_'));
    let well_formed = uid.iter().enumerate().all(|(at, byte)| {
        if uid.len() == UUID && DASHES.contains(&at) {
            Some(*byte) == separator
        } else {
            byte.is_ascii_hexdigit()
        }
    });
    let text = str::from_utf8(uid).ok().filter(|_| well_formed)?;
    Some(text.replace('_', "-"))
}

#[cfg(test)]
#[path = "procfs_tests.rs"]
mod tests;
