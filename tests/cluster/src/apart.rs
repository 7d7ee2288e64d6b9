//! A cgroup of a test's own in the v2 hierarchy, in which a whole cluster lives: programs on cgroups that act on every
//! socket below them (Cilium's socket load balancing for pods) then act on that cluster and not on others beside it. On
//! this kind of machine no pod is anywhere in that hierarchy but where its node was started.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use crate::cgroups;

/// How long processes that were ended may stay.
const PATIENCE: Duration = Duration::from_secs(30);

/// This process, and all it starts, in a cgroup of their own until this is dropped.
#[derive(Debug)]
pub struct Apart {
    dir: PathBuf,
    before: PathBuf,
}

impl Apart {
    /// Moves this process there.
    ///
    /// # Errors
    /// When the cgroup cannot be made, or this is not root.
    pub fn enter(name: &str) -> Result<Self> {
        let (before, dir) = (current()?, cgroups::v2()?.join(name));
        if !dir.exists() {
            fs::create_dir(&dir).with_context(|| format!("making {}", dir.display()))?;
        }
        enter(&dir)?;
        Ok(Self { dir, before })
    }

    /// The cgroup.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

impl Drop for Apart {
    fn drop(&mut self) {
        let began = Instant::now();
        let mut left = enter(&self.before);
        while left.is_ok() && self.dir.exists() && began.elapsed() < PATIENCE {
            if fs::remove_dir(&self.dir).is_err() {
                thread::sleep(Duration::from_millis(100));
            }
        }
        if left.is_ok() && self.dir.exists() {
            left = Err(anyhow::anyhow!("processes are left in it"));
        }
        if let Err(error) = left {
            eprintln!("{} stays: {error:#}", self.dir.display());
        }
    }
}

fn enter(dir: &Path) -> Result<()> {
    let file = dir.join("cgroup.procs");
    fs::write(&file, std::process::id().to_string())
        .with_context(|| format!("moving this process into {}", file.display()))
}

/// The cgroup that this process is in.
pub(crate) fn current() -> Result<PathBuf> {
    let text = fs::read_to_string("/proc/self/cgroup").context("reading /proc/self/cgroup")?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"));
    Ok(cgroups::v2()?.join(path.context("no v2 hierarchy in /proc/self/cgroup")?))
}
