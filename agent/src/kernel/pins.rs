//! The pin directory on bpffs: where everything outlives its maker, and the one lock over it.
//!
//! Layout: `maps/NAME`, `links/PROGRAM`, `pods/COOKIE` (the link of that pod's `culvert_enter`). What is
//! half made lives in `new-PID` until it is renamed into place. What another version left is in `before-N`, each laid out
//! like the whole, see [`super::earlier`].

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{Flock, FlockArg},
    sys::statfs,
};

use super::error::{Error, Result};
use super::netns::NetnsCookie;

/// Default place on a bpffs that most distributions mount.
pub const DEFAULT: &str = "/sys/fs/bpf/culvert";

/// Names of [`Pins::earlier`] begin so.
const EARLIER: &str = "before-";

/// bpffs, from linux/magic.h.
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;

/// The pin directory.
#[derive(Clone, Debug)]
pub struct Pins {
    root: PathBuf,
}

/// Held while kernel state changes; two agents, or an agent and a person, take turns.
#[derive(Debug)]
pub struct Lock(#[expect(dead_code, reason = "released by being dropped")] Flock<File>);

impl Pins {
    /// Names a directory; looks at nothing.
    #[must_use]
    pub fn at(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    /// The directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where a map is pinned.
    #[must_use]
    pub fn map(&self, name: &str) -> PathBuf {
        self.root.join("maps").join(name)
    }

    /// Where a node program's link is pinned.
    #[must_use]
    pub fn link(&self, program: &str) -> PathBuf {
        self.root.join("links").join(program)
    }

    /// Where a pod's link is pinned.
    #[must_use]
    pub fn pod(&self, cookie: NetnsCookie) -> PathBuf {
        self.root.join("pods").join(cookie.to_string())
    }

    /// Is there anything of ours?
    #[must_use]
    pub fn exist(&self) -> bool {
        self.root.join("maps").exists()
    }

    /// A pod whose link is pinned, by cookie.
    pub fn pods(&self) -> Vec<NetnsCookie> {
        let entries = fs::read_dir(self.root.join("pods"))
            .into_iter()
            .flatten()
            .flatten();
        let mut pods: Vec<_> = entries
            .filter_map(|e| e.file_name().to_str()?.parse().ok().map(NetnsCookie))
            .collect();
        pods.sort_unstable();
        pods
    }

    /// What other versions left, the oldest first.
    #[must_use]
    pub fn earlier(&self) -> Vec<Self> {
        let mut numbers = self.earlier_numbers();
        numbers.sort_unstable();
        numbers
            .into_iter()
            .map(|number| self.numbered(number))
            .collect()
    }

    /// A place beside those, where nothing is yet.
    pub(super) fn next_earlier(&self) -> Self {
        let last = self.earlier_numbers().into_iter().max();
        self.numbered(last.map_or(1, |last| last + 1))
    }

    fn numbered(&self, number: u32) -> Self {
        Self::at(&self.root.join(format!("{EARLIER}{number}")))
    }

    fn earlier_numbers(&self) -> Vec<u32> {
        let entries = fs::read_dir(&self.root).into_iter().flatten().flatten();
        entries
            .filter_map(|e| {
                let name = e.file_name();
                name.to_str()?.strip_prefix(EARLIER)?.parse().ok()
            })
            .collect()
    }

    /// The nearest existing directory at or above the root is a bpffs?
    pub fn check_bpffs(&self) -> Result<()> {
        let existing = self
            .root
            .ancestors()
            .find(|p| p.exists())
            .unwrap_or(Path::new("/"));
        let kind = statfs::statfs(existing)
            .map_err(|e| Error::system("examine", existing.display(), io::Error::from(e)))?;
        if kind.filesystem_type().0 & 0xffff_ffff == BPF_FS_MAGIC {
            return Ok(());
        }
        Err(Error::wrong(
            "pin below",
            self.root.display(),
            "no bpffs is mounted there",
            "mount it on the host with `mount -t bpf bpf /sys/fs/bpf` (systemd does so by itself), or name another \
             with --bpffs",
        )
        .for_now())
    }

    /// Makes the directory, takes the lock, waiting for whoever has it, and sweeps.
    pub fn lock(&self) -> Result<Lock> {
        self.check_bpffs()?;
        self.make_directories()?;
        let lock = self.lock_existing()?;
        self.sweep()?;
        Ok(lock)
    }

    pub(super) fn make_directories(&self) -> Result<()> {
        for dir in [
            self.root.clone(),
            self.root.join("pods"),
            self.root.join("links"),
        ] {
            fs::create_dir_all(&dir)
                .map_err(|e| Error::system("make directory", dir.display(), e))?;
        }
        Ok(())
    }

    /// Takes the lock of a directory that must be there.
    pub fn lock_existing(&self) -> Result<Lock> {
        let dir =
            File::open(&self.root).map_err(|e| Error::system("open", self.root.display(), e))?;
        Flock::lock(dir, FlockArg::LockExclusive)
            .map(Lock)
            .map_err(|(_, e)| Error::system("lock", self.root.display(), e.into()))
    }

    /// Removes every pin, not the directory itself. Killed half-way it leaves what the next call, or the next
    /// load, clears away.
    pub fn clear(&self) -> Result<()> {
        remove(&self.root.join("pods"))?;
        // In one step there is nothing loaded any more; programs keep their maps until their links are gone.
        let maps = self.root.join("maps");
        if maps.exists() {
            publish(&maps, &self.scratch()?.join("maps"))?;
        }
        remove(&self.root.join("links"))?;
        self.sweep()
    }

    /// Removes what makers that died have left.
    fn sweep(&self) -> Result<()> {
        for entry in fs::read_dir(&self.root).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with("new-") {
                remove(&entry.path())?;
            }
        }
        Ok(())
    }

    /// A fresh directory for things in the making; leftovers of makers that died are removed.
    pub fn scratch(&self) -> Result<PathBuf> {
        self.sweep()?;
        let dir = self.root.join(format!("new-{}", std::process::id()));
        fs::create_dir(&dir).map_err(|e| Error::system("make directory", dir.display(), e))?;
        Ok(dir)
    }
}

/// Moves into place.
pub fn publish(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).map_err(|e| Error::system("publish", to.display(), e))
}

/// Removes a pin or a directory of pins; gone already is fine.
pub fn remove(path: &Path) -> Result<()> {
    let result = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => {
            for entry in fs::read_dir(path).into_iter().flatten().flatten() {
                remove(&entry.path())?;
            }
            fs::remove_dir(path)
        }
        Ok(_) => fs::remove_file(path),
        Err(e) => Err(e),
    };
    match result {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(Error::system("remove", path.display(), e))
        }
        _ => Ok(()),
    }
}
