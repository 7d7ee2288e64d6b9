//! PID namespaces to start programs in: what a test cluster's node is, and each container on it.
#![expect(
    clippy::disallowed_methods,
    reason = "a PID namespace lives as long as its first process, which the lab starts"
)]

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};

use crate::ns::Place;
use crate::{Child, Creds, Lab, Ns};

/// A PID namespace. Dropping it ends everything in it.
#[derive(Debug)]
pub struct PidNs {
    /// What the namespace lives by, and its parent lived to make.
    _first: Child,
    file: Arc<File>,
}

/// Where a program is to be started, for the thread that does it.
#[derive(Debug, Clone)]
pub(crate) struct Inside(Arc<File>);

impl Inside {
    /// What the calling thread starts from now on is in there.
    pub(crate) fn enter(&self) -> Result<()> {
        setns(&*self.0, CloneFlags::CLONE_NEWPID).context("entering a PID namespace: run as root")
    }
}

impl PidNs {
    /// A fresh one, inside another or the test's own.
    pub fn new(lab: &Lab, parent: Option<&Self>) -> Result<Self> {
        let mut command = Command::new("unshare");
        // It ends by itself, should nobody be left to end it.
        command.args(["--pid", "--fork", "--kill-child", "sleep", "600"]);
        let first = lab.node().spawn_inside(parent, command)?;
        let child = Path::new("/proc").join(format!("{0}/task/{0}/children", first.pid()));
        let started = std::time::Instant::now();
        let pid = loop {
            let children = fs::read_to_string(&child)
                .with_context(|| format!("reading {}", child.display()))?;
            if let Some(pid) = children.split_ascii_whitespace().next() {
                break pid.to_owned();
            }
            if started.elapsed() > std::time::Duration::from_secs(10) {
                bail!("no PID namespace was made: {}", first.stderr());
            }
            std::thread::sleep(std::time::Duration::from_millis(2));
        };
        let path = format!("/proc/{pid}/ns/pid");
        let file = File::open(&path).with_context(|| format!("opening {path}"))?;
        Ok(Self {
            _first: first,
            file: Arc::new(file),
        })
    }

    pub(crate) fn inside(&self) -> Inside {
        Inside(Arc::clone(&self.file))
    }

    /// The process's id in the namespace `depth` levels below the test's own.
    pub fn pid_of(child: &Child, depth: usize) -> Result<u32> {
        let path = format!("/proc/{}/status", child.pid());
        let status = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        let ids = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
        let ids: Vec<&str> = ids.unwrap_or_default().split_ascii_whitespace().collect();
        // The first is the one in the test's own namespace.
        ids.get(depth)
            .and_then(|id| id.parse().ok())
            .with_context(|| format!("{path} knows the ids {ids:?}, no {depth}th below ours"))
    }
}

impl Ns {
    /// Starts a program here, in the lab's cgroup and in a PID namespace.
    pub fn spawn_inside(&self, pids: Option<&PidNs>, command: Command) -> Result<Child> {
        let pids = pids.map(PidNs::inside);
        Child::start(self, Place::Lab, pids, Creds::Root, command)
    }
}

impl Lab {
    /// Starts `culvert` as `culvert_spawn` does, in a PID namespace and with that one's `/proc`.
    pub fn culvert_inside(&self, pids: &PidNs, args: &[&str]) -> Result<Child> {
        let culvert = self.culvert_command(args)?;
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "sh", "-c"])
            .arg("mount -t proc proc /proc && exec \"$@\"")
            .arg("sh")
            .arg(culvert.get_program())
            .args(culvert.get_args());
        Child::start(
            self.node(),
            Place::Machine,
            Some(pids.inside()),
            Creds::Root,
            command,
        )
    }
}
