//! A lab's own cgroup v2, into which single threads of the test process are moved. It must not touch controllers or any
//! cgroup that is not the lab's.
//!
//! The cgroup is of type `threaded` below the root: the root is then the threaded domain, so a process of the root may
//! have some of its threads in one lab and some in another. Children forked by a thread start in its cgroup and stay
//! there over `exec`.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getpid, gettid};

use crate::paths::mount_points;

/// How long a cgroup may stay busy after its last thread was told to end.
const REMOVAL: Duration = Duration::from_secs(5);

/// The mount point of cgroup v2, wherever this machine has it.
pub(crate) fn root() -> Result<PathBuf> {
    mount_points("cgroup2")?.into_iter().next().context(
        "no cgroup v2 hierarchy is mounted: mount -t cgroup2 cgroup2 /sys/fs/cgroup (or boot with systemd.unified_cgroup_hierarchy=1)",
    )
}

/// A threaded cgroup below the root.
#[derive(Debug)]
pub(crate) struct Cgroup {
    dir: PathBuf,
}

impl Cgroup {
    /// Creates the cgroup; `None` when there is one of that name.
    pub(crate) fn create(name: &str) -> Result<Option<Self>> {
        let root = root()?;
        stand_in_root(&root)?;
        let dir = root.join(name);
        match fs::create_dir(&dir) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => return Ok(None),
            Err(error) => {
                return Err(error)
                    .with_context(|| format!("creating cgroup {}: run as root", dir.display()));
            }
        }
        let cgroup = Self { dir };
        fs::write(cgroup.dir.join("cgroup.type"), "threaded")
            .with_context(|| format!("making {} a threaded cgroup", cgroup.dir.display()))?;
        Ok(Some(cgroup))
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Moves the calling thread, and with it all it will fork, into the cgroup at `dir`.
    pub(crate) fn enter(dir: &Path) -> Result<()> {
        let file = dir.join("cgroup.threads");
        fs::write(&file, gettid().to_string())
            .with_context(|| format!("moving a thread into {}", file.display()))
    }
}

/// Ends foreign processes in a lab's cgroup and those below it, moves our own threads back to the root, and removes it.
pub(crate) fn remove(dir: &Path) -> Result<()> {
    // Its own are the test's to remove; a test that was killed did not.
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove(&entry.path())?;
        }
    }
    let started = Instant::now();
    loop {
        match fs::remove_dir(dir) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) if started.elapsed() > REMOVAL => {
                let left = fs::read_to_string(dir.join("cgroup.threads")).unwrap_or_default();
                bail!(
                    "removing cgroup {}: {error}; threads in it: {}",
                    dir.display(),
                    left.replace('\n', " ")
                );
            }
            Err(_) => evict(dir),
        }
        // A thread that has ended leaves its cgroup a moment later.
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn evict(dir: &Path) {
    let threads = fs::read_to_string(dir.join("cgroup.threads")).unwrap_or_default();
    for tid in threads.lines().filter_map(|line| line.parse::<i32>().ok()) {
        // Our own thread is visible below /proc/self/task; anything else was started by the lab.
        if Path::new(&format!("/proc/{}/task/{tid}", getpid())).exists() {
            if let Some(root) = dir.parent() {
                // It may have ended meanwhile: the next round of `remove` tells. From a nested one it goes up by steps.
                let _ended = fs::write(root.join("cgroup.threads"), tid.to_string());
            }
        } else {
            let _ended = kill(Pid::from_raw(tid), Signal::SIGKILL);
        }
    }
}

/// Threads can only be spread over cgroups of one threaded domain, and the labs' domain is the root.
fn stand_in_root(root: &Path) -> Result<()> {
    let mine = fs::read_to_string("/proc/self/cgroup").context("reading /proc/self/cgroup")?;
    let at = mine
        .lines()
        .find_map(|line| line.strip_prefix("0::"))
        .unwrap_or("/");
    // A thread of an earlier lab may be asking: what counts is the process, whose main thread never moves.
    if at == "/" || at.trim_start_matches('/').starts_with(crate::paths::PREFIX) {
        return Ok(());
    }
    eprintln!(
        "lab: moving this process from cgroup {at} to the root of cgroup v2, so that its threads can join labs"
    );
    fs::write(root.join("cgroup.procs"), getpid().to_string())
        .with_context(|| format!("moving this process to the cgroup at {}", root.display()))
}
