//! The node agent's side of ZDS: tells every ztunnel that connects which pods there are. It enrols nothing; that is
//! `culvert`'s part.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept4, bind, listen, socket,
};

use crate::zds_messages::{AddWorkload, DelWorkload, Request, SnapshotSent, WorkloadInfo};
use crate::zds_socket::ZdsSocket;
use crate::{Lab, Ns};

/// How often the listener looks whether it is to stop.
const TICK: u16 = 20;

/// A ZDS server with the pods it speaks of. Dropping it hangs up on all ztunnels.
#[derive(Debug)]
pub struct Zds {
    path: PathBuf,
    state: Arc<Mutex<State>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct State {
    pods: BTreeMap<String, Pod>,
    /// Oldest first; each has had its snapshot.
    ztunnels: Vec<Conversation>,
    /// What went wrong with conversations that are over.
    troubles: Vec<String>,
    connected: usize,
}

#[derive(Debug)]
struct Pod {
    ns: Ns,
    info: WorkloadInfo,
}

#[derive(Debug)]
struct Conversation {
    pid: u32,
    socket: ZdsSocket,
}

impl Zds {
    /// Listens in the lab's scratch directory.
    pub fn start(lab: &Lab) -> Result<Self> {
        Self::listen_at(&lab.scratch().join("zds.sock"))
    }

    /// Listens somewhere else. A stale socket is taken away.
    pub fn listen_at(path: &Path) -> Result<Self> {
        let path = path.to_path_buf();
        // Stale or not there: either way the name is free afterwards, or bind says why not.
        let _not_there = std::fs::remove_file(&path);
        let listening = || -> nix::Result<OwnedFd> {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let listener = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
            bind(listener.as_raw_fd(), &UnixAddr::new(&path)?)?;
            listen(&listener, Backlog::new(16)?)?;
            Ok(listener)
        };
        let listener =
            listening().with_context(|| format!("listening for ztunnels at {}", path.display()))?;
        let state = Arc::new(Mutex::new(State::default()));
        let stop = Arc::new(AtomicBool::new(false));
        let (to_state, to_stop) = (Arc::clone(&state), Arc::clone(&stop));
        let serve = move || {
            while !to_stop.load(Ordering::SeqCst) {
                let _ready = poll(
                    &mut [PollFd::new(listener.as_fd(), PollFlags::POLLIN)],
                    PollTimeout::from(TICK),
                );
                while let Ok(raw) = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
                    lock(&to_state).welcome(adopt(raw));
                }
                lock(&to_state).forget_gone();
            }
        };
        let thread = std::thread::Builder::new()
            .name("zds".into())
            .spawn(serve)
            .context("starting a thread")?;
        Ok(Self {
            path,
            state,
            stop,
            thread: Some(thread),
        })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds a pod: part of every snapshot from now on, and told at once to the newest ztunnel (falling back to older ones
    /// if that goes). Fails if that ztunnel refuses, and the pod stays part of snapshots. With no ztunnel connected it is
    /// only remembered.
    pub fn add(
        &self,
        uid: &str,
        ns: &Ns,
        name: &str,
        namespace: &str,
        service_account: &str,
    ) -> Result<()> {
        let (name, namespace) = (name.to_owned(), namespace.to_owned());
        let info = WorkloadInfo {
            name,
            namespace,
            service_account: service_account.to_owned(),
        };
        let mut state = lock(&self.state);
        state.pods.insert(
            uid.to_owned(),
            Pod {
                ns: ns.clone(),
                info,
            },
        );
        state.tell_newest(uid)
    }

    /// Adds a pod under its own name as uid and service account, in namespace `default`.
    pub fn add_pod(&self, ns: &Ns) -> Result<()> {
        self.add(ns.name(), ns, ns.name(), "default", ns.name())
    }

    /// The identity that `add_pod` gives a pod.
    pub fn identity(ns: &Ns) -> String {
        format!("spiffe://cluster.local/ns/default/sa/{}", ns.name())
    }

    /// Takes a pod away and tells all ztunnels. Fails if one refuses.
    pub fn del(&self, uid: &str) -> Result<()> {
        let mut state = lock(&self.state);
        state
            .pods
            .remove(uid)
            .with_context(|| format!("no pod {uid}"))?;
        state.tell_all_gone(uid)
    }

    /// The process numbers of the ztunnels that have had their snapshot and are still there, oldest first.
    pub fn ztunnels(&self) -> Vec<u32> {
        let mut state = lock(&self.state);
        state.forget_gone();
        state.ztunnels.iter().map(|ztunnel| ztunnel.pid).collect()
    }

    /// How many ztunnels have connected until now.
    pub fn connected(&self) -> usize {
        lock(&self.state).connected
    }

    /// What ztunnels refused or broke, in snapshots as well.
    pub fn troubles(&self) -> Vec<String> {
        lock(&self.state).troubles.clone()
    }

    /// Waits until a ztunnel, given by its process number, has had its snapshot.
    pub fn wait_for(&self, pid: u32, timeout: Duration) -> Result<()> {
        let started = Instant::now();
        while !self.ztunnels().contains(&pid) {
            if started.elapsed() > timeout {
                bail!(
                    "ztunnel {pid} has not taken a snapshot within {timeout:?}; troubles: {:?}",
                    self.troubles()
                );
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// Hangs up on all ztunnels, as when the agent restarts; they connect again by themselves.
    pub fn hang_up(&self) {
        lock(&self.state).ztunnels.clear();
    }
}

impl Drop for Zds {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            // It holds nothing that could fail.
            let _ended = thread.join();
        }
        let _not_there = std::fs::remove_file(&self.path);
    }
}

impl State {
    /// Hello and snapshot. Pods that are added meanwhile wait for the lock and come after it.
    fn welcome(&mut self, fd: OwnedFd) {
        self.connected += 1;
        let greeted = ZdsSocket::greet(fd).and_then(|socket| {
            Ok(Conversation {
                pid: socket.peer_pid()?,
                socket,
            })
        });
        let spoken = greeted.and_then(|ztunnel| {
            for (uid, pod) in &self.pods {
                if let Err(refused) = ztunnel.add(uid, pod)? {
                    // ztunnel goes on trying by itself.
                    self.troubles.push(format!(
                        "ztunnel {} refused {uid} in its snapshot: {refused}",
                        ztunnel.pid
                    ));
                }
            }
            ztunnel
                .socket
                .ask(Request::SnapshotSent(SnapshotSent {}), None)?
                .map_err(anyhow::Error::msg)?;
            Ok(ztunnel)
        });
        match spoken {
            Ok(ztunnel) => self.ztunnels.push(ztunnel),
            Err(error) => self.troubles.push(format!("{error:#}")),
        }
    }

    fn tell_newest(&mut self, uid: &str) -> Result<()> {
        self.forget_gone();
        let pod = self
            .pods
            .get(uid)
            .with_context(|| format!("no pod {uid}"))?;
        while let Some(newest) = self.ztunnels.last() {
            match newest.add(uid, pod) {
                Ok(answer) => {
                    return answer
                        .map_err(|refused| anyhow::anyhow!("ztunnel refused {uid}: {refused}"));
                }
                Err(error) => self
                    .troubles
                    .push(format!("ztunnel {}: {error:#}", newest.pid)),
            }
            self.ztunnels.pop();
        }
        Ok(())
    }

    fn tell_all_gone(&mut self, uid: &str) -> Result<()> {
        self.forget_gone();
        let mut refusals = Vec::new();
        let troubles = &mut self.troubles;
        self.ztunnels.retain(|ztunnel| {
            match ztunnel.socket.ask(
                Request::Del(DelWorkload {
                    uid: uid.to_owned(),
                }),
                None,
            ) {
                Ok(answer) => refusals.extend(answer.err()),
                Err(error) => {
                    troubles.push(format!("ztunnel {}: {error:#}", ztunnel.pid));
                    return false;
                }
            }
            true
        });
        if refusals.is_empty() {
            Ok(())
        } else {
            bail!("ztunnel refused to let {uid} go: {refusals:?}")
        }
    }

    fn forget_gone(&mut self) {
        self.ztunnels.retain(|ztunnel| !ztunnel.socket.hung_up());
    }
}

impl Conversation {
    fn add(&self, uid: &str, pod: &Pod) -> Result<Result<(), String>> {
        let add = AddWorkload {
            uid: uid.to_owned(),
            workload_info: Some(pod.info.clone()),
        };
        self.socket.ask(Request::Add(add), Some(pod.ns.fd()))
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

#[expect(unsafe_code, reason = "accept hands a descriptor over as a number")]
fn adopt(raw: i32) -> OwnedFd {
    // SAFETY: accept has just made this descriptor, and nothing else knows its number.
    unsafe { OwnedFd::from_raw_fd(raw) }
}
