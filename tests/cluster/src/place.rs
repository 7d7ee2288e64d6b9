//! Where things of clusters lie, and the scratch directory of one. It owns names and directories; it starts nothing.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use nix::fcntl::{Flock, FlockArg};

/// The file that says what a cluster consists of.
pub(crate) const STATE: &str = "state.json";

/// Everything that outlives a test: binaries, images, what runs.
pub(crate) fn cluster_dir() -> Result<PathBuf> {
    let dir = match std::env::var_os("CULVERT_CLUSTER_DIR") {
        Some(dir) if !dir.is_empty() => PathBuf::from(dir),
        _ => target_dir().join("cluster"),
    };
    fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
    // Servers get absolute paths: entering a mount namespace changes the working directory.
    dir.canonicalize()
        .with_context(|| format!("looking {} up", dir.display()))
}

/// The top of the tree.
pub(crate) fn root() -> PathBuf {
    let mut root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    root.pop();
    root.pop();
    root
}

/// Cargo's output directory.
pub(crate) fn target_dir() -> PathBuf {
    ["CULVERT_TARGET_DIR", "CARGO_TARGET_DIR"]
        .into_iter()
        .find_map(|name| std::env::var_os(name).filter(|dir| !dir.is_empty()))
        .map_or_else(|| root().join("target"), |dir| root().join(dir))
}

/// Whether what has ended is to be kept for a look.
pub(crate) fn keep() -> bool {
    std::env::var_os("CULVERT_KEEP").is_some_and(|value| value != "0" && !value.is_empty())
}

/// The directory of something running. It is removed with the value; after a panic its logs move to `failed/`.
#[derive(Debug)]
pub(crate) struct Scratch {
    path: PathBuf,
    name: String,
    _lock: Flock<File>,
}

impl Scratch {
    /// Makes a directory for `name`.
    pub(crate) fn create(name: &str, serial: u32) -> Result<Self> {
        ensure!(
            !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-'),
            "the name {name:?} becomes part of file names: use letters, digits and '-'"
        );
        let cluster = cluster_dir()?;
        let run = cluster.join("run");
        fs::create_dir_all(&run).with_context(|| format!("making {}", run.display()))?;
        let path = run.join(format!("{name}-{}-{serial}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("making {}", path.display()))?;
        let lock =
            lock(&path)?.with_context(|| format!("{} is somebody else's", path.display()))?;
        Ok(Self {
            path,
            name: name.to_owned(),
            _lock: lock,
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Removes it, unless what has ended is to be kept.
    pub(crate) fn remove(&self) {
        if keep() {
            eprintln!("kept: {}", self.path.display());
        } else if let Err(error) = fs::remove_dir_all(&self.path) {
            eprintln!("removing {}: {error}", self.path.display());
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if std::thread::panicking() {
            match keep_logs(&self.path, &self.name) {
                Ok(kept) => eprintln!("logs: {}", kept.display()),
                Err(error) => eprintln!("keeping logs of {}: {error}", self.path.display()),
            }
        }
        self.remove();
    }
}

/// Copies the logs of something that has failed to where they stay, and says where: below the tree's own target directory,
/// whoever else has the same binaries. Only the last failure of a name is of interest.
pub(crate) fn keep_logs(dir: &Path, name: &str) -> Result<PathBuf> {
    let failed = target_dir().join("cluster/failed").join(name);
    let _none = fs::remove_dir_all(&failed);
    copy_logs(dir, &failed, 1)?;
    for entry in fs::read_dir(dir)?.flatten() {
        let pods = entry.path().join("var/log/pods");
        if pods.is_dir() {
            copy_logs(&pods, &failed.join(entry.file_name()).join("pods"), 2)?;
        }
    }
    Ok(failed)
}

/// Copies `*.log`, and those of `deeper` levels of directories.
fn copy_logs(from: &Path, to: &Path, deeper: u32) -> std::io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)?.flatten() {
        let (path, copy) = (entry.path(), to.join(entry.file_name()));
        if path.extension().is_some_and(|kind| kind == "log") {
            // A log may go while it is looked at.
            let _gone = fs::copy(path, copy);
        } else if deeper > 0 && entry.file_type()?.is_dir() {
            copy_logs(&path, &copy, deeper - 1)?;
        }
    }
    Ok(())
}

/// Takes the lock that says whose a directory is; `None` while another process has it.
pub(crate) fn lock(dir: &Path) -> Result<Option<Flock<File>>> {
    let file = dir.join("lock");
    let open = File::create(&file).with_context(|| format!("making {}", file.display()))?;
    Ok(Flock::lock(open, FlockArg::LockExclusiveNonblock).ok())
}
