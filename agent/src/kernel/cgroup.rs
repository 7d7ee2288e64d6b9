//! Finding the cgroup v2 root, where node programs see every socket of the machine.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use nix::sys::statfs;

use super::error::{Error, Result};

const OPERATION: &str = "use as cgroup v2 root";
const CGROUP2_MAGIC: i64 = 0x6367_7270;

/// Mount point of the v2 hierarchy: `/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` on hybrid hosts.
pub fn find_root() -> Result<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo")
        .map_err(|e| Error::system("read", "/proc/self/mountinfo", e))?;
    parse_mounts(&table).ok_or_else(|| {
        Error::wrong(
            "find",
            "the cgroup v2 hierarchy",
            "none is mounted",
            "mount it with `mount -t cgroup2 none /sys/fs/cgroup` (or beside v1, at /sys/fs/cgroup/unified), or name a \
             directory with --cgroup-root",
        )
    })
}

/// First cgroup2 mount of a mountinfo table that shows the hierarchy from its root.
fn parse_mounts(table: &str) -> Option<PathBuf> {
    table.lines().find_map(|line| {
        let (mount, fs) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        (fs.starts_with("cgroup2 ") && root == "/")
            .then(|| PathBuf::from(point.replace("\\040", " ")))
    })
}

/// Opens a directory to attach to. Found by looking it must be the node's root; named by hand it may be any
/// cgroup, and the programs then see what is below it only.
pub fn open(path: &Path, named: bool) -> Result<File> {
    let fail = |e: io::Error| {
        Error::system(OPERATION, path.display(), e)
            .cured_by("name a directory of the v2 hierarchy with --cgroup-root")
    };
    let dir = File::open(path).map_err(fail)?;
    let kind = statfs::fstatfs(&dir).map_err(|e| fail(e.into()))?;
    if kind.filesystem_type().0 != CGROUP2_MAGIC {
        return Err(Error::wrong(
            OPERATION,
            path.display(),
            "it is not on a cgroup v2 hierarchy",
            "mount one with `mount -t cgroup2 none DIR`, or name its directory with --cgroup-root",
        ));
    }
    const ROOT_INODE: u64 = 1;
    if !named && dir.metadata().map_err(fail)?.ino() != ROOT_INODE {
        return Err(Error::wrong(
            OPERATION,
            path.display(),
            "it is the root of a cgroup namespace, not of the node: sockets of pods would not be seen",
            "mount the host's hierarchy into this container (hostPath) and name it with --cgroup-root",
        ));
    }
    Ok(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_v2_mount_on_pure_and_hybrid_hosts() {
        let pure =
            "29 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(parse_mounts(pure), Some("/sys/fs/cgroup".into()));
        let hybrid = "30 29 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                      31 29 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        assert_eq!(parse_mounts(hybrid), Some("/sys/fs/cgroup/unified".into()));
        let inside = "31 29 0:28 /../pod1 /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        assert_eq!(
            parse_mounts(inside),
            None,
            "a bind mount of a part is not the root"
        );
        assert_eq!(parse_mounts("1 2 0:1 / / rw - ext4 /dev/a rw\n"), None);
    }
}
