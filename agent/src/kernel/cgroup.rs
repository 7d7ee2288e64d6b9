//! Finding the cgroup v2 root, where node programs see every socket of the machine, and the cgroup of its pods.

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

const ROOT_INODE: u64 = 1;

/// Mount point of the v2 hierarchy: `/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` on hybrid hosts. In a container that is
/// where the node's own is mounted, whatever that place is called.
pub fn find_root() -> Result<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo")
        .map_err(|e| Error::system("read", "/proc/self/mountinfo", e))?;
    let is_root = |path: &PathBuf| fs::metadata(path).is_ok_and(|m| m.ino() == ROOT_INODE);
    let root = mounts(&table).map(|(_, point)| point).find(is_root);
    root.or_else(|| parse_mounts(&table)).ok_or_else(|| {
        Error::wrong(
            "find",
            "the cgroup v2 hierarchy",
            "none is mounted",
            "mount it with `mount -t cgroup2 none /sys/fs/cgroup` (or beside v1, at /sys/fs/cgroup/unified), or name a \
             directory with --cgroup-root",
        )
        .for_now()
    })
}

/// First cgroup2 mount of a mountinfo table that shows the hierarchy from its root.
fn parse_mounts(table: &str) -> Option<PathBuf> {
    mounts(table).find_map(|(root, point)| (root == "/").then_some(point))
}

/// All cgroup2 mounts of a mountinfo table: what is shown, from where our cgroup namespace begins, and where.
fn mounts(table: &str) -> impl Iterator<Item = (&str, PathBuf)> {
    table.lines().filter_map(|line| {
        let (mount, fs) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        fs.starts_with("cgroup2 ")
            .then(|| (root, PathBuf::from(point.replace("\\040", " "))))
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
    if !named && dir.metadata().map_err(fail)?.ino() != ROOT_INODE {
        return Err(Error::wrong(
            OPERATION,
            path.display(),
            "it is the root of a cgroup namespace, not of the node: sockets of pods would not be seen",
            "mount the host's /sys/fs/cgroup into this container (hostPath), at any place",
        ));
    }
    Ok(dir)
}

/// What the kernel calls a cgroup: on 64-bit kernels its inode.
pub(super) fn id(dir: &File) -> Result<u64> {
    dir.metadata()
        .map(|m| m.ino())
        .map_err(|e| Error::system("examine", "the cgroup", e))
}

/// A cgroup that a kubelet keeps its pods in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Kubepods {
    /// Its directory.
    pub(super) path: PathBuf,
    /// A process is in it, or below.
    pub(super) populated: bool,
}

/// How deep a kubelet's `cgroupRoot` may be nested; a node that is a container itself is three levels down.
const DEEPEST: usize = 5;

/// The cgroups of all kubelets below `root`, whichever driver made them: `kubepods`, `kubepods.slice`,
/// `kubelet-kubepods.slice`.
pub(super) fn kubepods(root: &Path) -> Vec<Kubepods> {
    let mut found = Vec::new();
    walk(root, DEEPEST, &mut |path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let ours =
            name == "kubepods" || name == "kubepods.slice" || name.ends_with("-kubepods.slice");
        if ours {
            let events = fs::read_to_string(path.join("cgroup.events")).unwrap_or_default();
            found.push(Kubepods {
                path: path.to_owned(),
                populated: events.lines().any(|line| line == "populated 1"),
            });
        }
        !ours
    });
    found
}

/// The directory of the cgroup with this id, at or below `root`.
pub(super) fn by_id(root: &Path, id: u64) -> Option<PathBuf> {
    let is = |path: &Path| fs::metadata(path).is_ok_and(|m| m.ino() == id);
    if is(root) {
        return Some(root.to_owned());
    }
    let mut found = None;
    walk(root, DEEPEST, &mut |path| {
        if is(path) {
            found = Some(path.to_owned());
        }
        found.is_none()
    });
    found
}

/// The directory of this process's own cgroup, where it can be seen from here.
pub(super) fn own(root: &Path) -> Option<PathBuf> {
    let text = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(root.join(path))
}

/// Visits directories below `dir`; goes into those `visit` says yes to. Cgroups come and go meanwhile.
fn walk(dir: &Path, levels: usize, visit: &mut dyn FnMut(&Path) -> bool) {
    if levels == 0 {
        return;
    }
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            let path = entry.path();
            if visit(&path) {
                walk(&path, levels - 1, visit);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kubepods_of_every_driver_at_any_depth() {
        let root = std::env::temp_dir().join(format!("culvert-kubepods-{}", std::process::id()));
        for (dir, events) in [
            (
                "kubepods.slice/kubepods-burstable.slice",
                "populated 1\nfrozen 0\n",
            ),
            ("node1/kubepods", "populated 0\nfrozen 0\n"),
            ("system.slice/kubelet.service", "populated 1\n"),
            (
                "docker/x/kubelet.slice/kubelet-kubepods.slice",
                "populated 1\n",
            ),
        ] {
            fs::create_dir_all(root.join(dir)).unwrap();
            let of = if dir.starts_with("kubepods.slice") {
                "kubepods.slice"
            } else {
                dir
            };
            fs::write(root.join(of).join("cgroup.events"), events).unwrap();
        }
        let mut found: Vec<_> = kubepods(&root)
            .into_iter()
            .map(|k| {
                (
                    k.path.strip_prefix(&root).unwrap().display().to_string(),
                    k.populated,
                )
            })
            .collect();
        fs::remove_dir_all(&root).unwrap();
        found.sort();
        assert_eq!(
            found,
            [
                (
                    "docker/x/kubelet.slice/kubelet-kubepods.slice".to_owned(),
                    true
                ),
                ("kubepods.slice".to_owned(), true),
                ("node1/kubepods".to_owned(), false),
            ]
        );
    }

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
