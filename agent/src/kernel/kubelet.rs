//! Finding the kubelet and keeping the programs told of it, so that its probes, and nobody else's connections, reach
//! enrolled pods past ztunnel.
//!
//! The kubelet is a process of root, in our own network namespace, whose executable has one of a few names. Neither its
//! cgroup, which goes stale, nor the name a process gives itself, which anybody can choose, is asked. Its end is told by
//! its pidfd; only while there is none are processes looked through again and again, ever more slowly.

use std::{
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::MetadataExt,
    },
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use culvert_ebpf::abi::ProcessKey;
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::{EfdFlags, EventFd},
};

use super::{
    error::{Error, Result},
    node::Node,
    process::{self, Identity, Process},
    procfs::{self, PROC},
};

/// Names of executables that are, or contain, a kubelet: the plain one, MicroK8s' and k3s'.
pub const NAMES: [&str; 3] = ["kubelet", "kubelite", "k3s"];

/// Whose connections from the node are vouched for as the kubelet's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InForce {
    /// Those of these processes, which were found now.
    Processes {
        /// Process ids, as seen from here.
        pids: Vec<u32>,
    },
    /// Nobody's, for this reason, until a kubelet is found.
    Nobody {
        /// In words, with what can be done about it.
        why: String,
    },
}

/// First and longest pause between two looks for a kubelet that is not there.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

const OTHERWISE: &str = ", or let every process of the node vouch with --probe-source node";

/// Can a kubelet be told from other processes here at all? The error says what to do.
pub fn check() -> Result<()> {
    process::identify(std::process::id(), OTHERWISE).map(drop)
}

/// Who was found.
#[derive(Debug, Default)]
struct Found {
    pids: Vec<u32>,
    /// Of processes that could not be looked at, the last one's reason. There may always be some, and none of them the
    /// kubelet.
    denied: Option<io::Error>,
}

/// The kubelets that run in the calling thread's network namespace, by the names of their executables.
fn find(names: &[String]) -> Result<Found> {
    let here = network_of(Path::new("/proc/thread-self"))
        .map_err(|e| Error::system("examine", "our own network namespace", e))?;
    let mut found = Found::default();
    for pid in procfs::processes(Path::new(PROC))? {
        match is_kubelet(pid, names, here) {
            Ok(true) => found.pids.push(pid),
            Ok(false) => {}
            Err(error) => found.denied = Some(error),
        }
    }
    found.pids.sort_unstable();
    Ok(found)
}

/// Device and inode of a process's network namespace.
fn network_of(process: &Path) -> io::Result<(u64, u64)> {
    fs::metadata(process.join("ns/net")).map(|m| (m.dev(), m.ino()))
}

/// Is this process a kubelet of ours? One that is gone is not.
fn is_kubelet(pid: u32, names: &[String], here: (u64, u64)) -> io::Result<bool> {
    let dir = Path::new(PROC).join(pid.to_string());
    let look = || -> io::Result<bool> {
        // The name first: it settles the matter for nearly all.
        Ok(is_named(&fs::read_link(dir.join("exe"))?, names)
            && is_roots(&fs::read(dir.join("status"))?)
            && network_of(&dir)? == here)
    };
    match look() {
        Err(error) if procfs::vanished(&error) => Ok(false),
        answer => answer,
    }
}

/// Does the executable have one of these names? One that was replaced on disk while it runs still does.
fn is_named(exe: &Path, names: &[String]) -> bool {
    let file = exe.file_name().and_then(|name| name.to_str());
    file.is_some_and(|file| {
        let file = file.strip_suffix(" (deleted)").unwrap_or(file);
        names.iter().any(|name| name == file)
    })
}

/// Is the effective user root? Anybody can call a program of theirs kubelet.
fn is_roots(status: &[u8]) -> bool {
    let uids = status
        .split(|b| *b == b'\n')
        .find_map(|line| line.strip_prefix(b"Uid:"));
    uids.and_then(|line| str::from_utf8(line).ok()?.split_ascii_whitespace().nth(1))
        .is_some_and(|effective| effective == "0")
}

/// Kubelets that are held, with their ids.
type Held = Vec<(u32, Process)>;

/// Looks for kubelets now, and makes those it finds, and nobody else, the ones that may vouch. With them goes why others
/// could not be looked at.
fn name(node: &Node, names: &[String]) -> Result<(Held, Option<io::Error>)> {
    let mut held = Vec::new();
    let mut keys = Vec::new();
    let found = find(names)?;
    for pid in found.pids {
        match hold(pid, names) {
            Ok(Some((process, identity))) => {
                let _lock = node.lock()?;
                keys.push(process::name(node, &node.maps().vouchers, &identity)?);
                held.push((pid, process));
            }
            Ok(None) => {}
            Err(error) if gone(&error) => {}
            Err(error) => return Err(error),
        }
    }
    keep_only(node, &keys)?;
    Ok((held, found.denied))
}

/// Nobody else may vouch any more.
fn keep_only(node: &Node, keys: &[ProcessKey]) -> Result<()> {
    let _lock = node.lock()?;
    for key in node.maps().vouchers.keys()? {
        if !keys.contains(&key) {
            node.maps().vouchers.remove(&key)?;
        }
    }
    Ok(())
}

/// Takes hold of a kubelet; none if it is no longer one.
fn hold(pid: u32, names: &[String]) -> Result<Option<(Process, Identity)>> {
    let process = Process::open(pid)?;
    let identity = process::identify(pid, OTHERWISE)?;
    let examine = |e| Error::system("examine process", pid, e);
    let here = network_of(Path::new("/proc/thread-self")).map_err(examine)?;
    // Only when it is alive behind all these questions were they about one and the same process.
    let same = is_kubelet(pid, names, here).map_err(examine)? && process.alive();
    Ok(same.then_some((process, identity)))
}

fn gone(error: &Error) -> bool {
    matches!(error.errno(), Some(libc::ESRCH | libc::ENOENT))
}

/// Follows the kubelet on a thread of its own, which ends when this is dropped; who may vouch then stays as it is.
#[derive(Debug)]
pub struct Follower {
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Stop {
    wanted: AtomicBool,
    wake: EventFd,
}

impl Follower {
    /// Starts the thread, in the calling thread's network namespace: only kubelets there count. `tell` is called on it
    /// whenever who may vouch changes.
    pub fn start(
        node: Arc<Node>,
        names: Vec<String>,
        mut tell: impl FnMut(InForce) + Send + 'static,
    ) -> Result<Self> {
        let fail = |e: io::Error| Error::system("start", "the thread that follows the kubelet", e);
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let stop = Arc::new(Stop {
            wanted: AtomicBool::new(false),
            wake: EventFd::from_flags(flags).map_err(|e| fail(e.into()))?,
        });
        let until = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("kubelet".to_owned())
            .spawn(move || follow(&node, &names, &until, &mut tell))
            .map_err(fail)?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.stop.wanted.store(true, Ordering::Release);
        // Only a counter that is full can refuse, and then the thread is awake.
        let _awake = self.stop.wake.write(1);
        if let Some(thread) = self.thread.take() {
            // A panic of `tell` was printed when it happened.
            let _panicked = thread.join();
        }
    }
}

fn follow(node: &Node, names: &[String], stop: &Stop, tell: &mut dyn FnMut(InForce)) {
    let mut told = None;
    let mut pause = FIRST_PAUSE;
    while !stop.wanted.load(Ordering::Acquire) {
        let (held, force) = match name(node, names) {
            Ok((held, denied)) if held.is_empty() => (held, missing(names, denied)),
            Ok((held, _)) => {
                let pids = held.iter().map(|(pid, _)| *pid).collect();
                (held, InForce::Processes { pids })
            }
            Err(error) => {
                // Who was named before may be anybody by now.
                let cleared = keep_only(node, &[]);
                let why = cleared.err().unwrap_or(error).to_string();
                (Vec::new(), InForce::Nobody { why })
            }
        };
        let timeout = if held.is_empty() {
            let now = pause;
            pause = (pause * 2).min(LONGEST_PAUSE);
            PollTimeout::try_from(now).unwrap_or(PollTimeout::MAX)
        } else {
            pause = FIRST_PAUSE;
            PollTimeout::NONE
        };
        if told.as_ref() != Some(&force) {
            tell(force.clone());
            told = Some(force);
        }
        wait(
            held.iter().map(|(_, p)| p.as_fd()),
            stop.wake.as_fd(),
            timeout,
        );
    }
}

fn missing(names: &[String], denied: Option<io::Error>) -> InForce {
    let unseen = denied.map_or(String::new(), |error| {
        format!(", give it CAP_SYS_PTRACE (not all processes could be looked at: {error})")
    });
    InForce::Nobody {
        why: format!(
            "no process of root in this network namespace has an executable named {}: run the agent in the host's PID \
             and network namespaces (hostPID, hostNetwork){unseen}, or name the executable{OTHERWISE}",
            names.join(" or ")
        ),
    }
}

/// Waits until one of the processes ends, we are to stop, or the time is over.
fn wait<'a>(
    processes: impl Iterator<Item = BorrowedFd<'a>>,
    wake: BorrowedFd<'a>,
    timeout: PollTimeout,
) {
    let mut fds: Vec<PollFd<'_>> = processes
        .chain([wake])
        .map(|fd| PollFd::new(fd, PollFlags::POLLIN))
        .collect();
    // Interrupted or not: the caller looks again.
    let _woken = poll(&mut fds, timeout);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> Vec<String> {
        NAMES.map(str::to_owned).to_vec()
    }

    #[test]
    fn an_executable_is_known_by_its_whole_name() {
        for exe in [
            "/usr/bin/kubelet",
            "/snap/microk8s/1/kubelite",
            "/opt/kubelet (deleted)",
        ] {
            assert!(is_named(Path::new(exe), &names()), "{exe}");
        }
        for exe in [
            "/usr/bin/kubelet.sh",
            "/usr/bin/my-kubelet",
            "/kubelet/bin/sh",
            "/",
            "",
        ] {
            assert!(!is_named(Path::new(exe), &names()), "{exe}");
        }
    }

    #[test]
    fn only_effective_root_counts() {
        let status = |uids: &str| format!("Name:\tkubelet\nUid:\t{uids}\nGid:\t0\t0\t0\t0\n");
        assert!(is_roots(status("0\t0\t0\t0").as_bytes()));
        assert!(is_roots(status("1000\t0\t0\t0").as_bytes()));
        assert!(!is_roots(status("0\t65534\t0\t0").as_bytes()));
        assert!(!is_roots(b"Name:\tkubelet\n"));
    }
}
