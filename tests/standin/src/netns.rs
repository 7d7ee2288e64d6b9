//! Network namespaces: a handle on a pod's, and the way in and out of it.
//!
//! The only place that calls `setns`. A closure runs inside and the thread is home again before anything else can run on it;
//! a thread that cannot return ends the process, because every later socket of it would be born in the wrong namespace.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, OnceLock};

use nix::sched::{CloneFlags, setns};
use nix::sys::stat::fstat;

/// A network namespace, kept alive by this handle.
#[derive(Clone, Debug)]
pub struct Netns {
    fd: Arc<OwnedFd>,
    inode: u64,
}

impl Netns {
    /// Takes the descriptor that came with a pod.
    ///
    /// # Errors
    /// When the descriptor cannot be examined.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let inode = fstat(&fd)?.st_ino;
        Ok(Self {
            fd: Arc::new(fd),
            inode,
        })
    }

    /// The namespace of the calling thread.
    ///
    /// # Errors
    /// When /proc is not mounted.
    pub fn current() -> io::Result<Self> {
        Self::new(File::open("/proc/thread-self/ns/net")?.into())
    }

    /// What tells two namespaces apart, as `ls -i` and `lsns` show it.
    #[must_use]
    pub fn inode(&self) -> u64 {
        self.inode
    }

    /// Runs `inside` with the thread moved into the namespace; what sockets it makes belong there for good.
    ///
    /// # Errors
    /// When the namespace cannot be entered: CAP_SYS_ADMIN is missing, or the descriptor is not one of a network namespace.
    pub fn run<T>(&self, inside: impl FnOnce() -> T) -> io::Result<T> {
        let home = home()?;
        enter(&self.fd)?;
        let _return = Return { home };
        Ok(inside())
    }
}

/// Brings the thread home, on panic as well.
struct Return {
    home: &'static Netns,
}

impl Drop for Return {
    fn drop(&mut self) {
        if let Err(error) = enter(&self.home.fd) {
            tracing::error!(%error, "cannot return to the proxy's own network namespace, giving up");
            std::process::abort();
        }
    }
}

/// The namespace the process was started in, opened once.
fn home() -> io::Result<&'static Netns> {
    static HOME: OnceLock<Netns> = OnceLock::new();
    if let Some(home) = HOME.get() {
        return Ok(home);
    }
    // A second opener in a race gets the same namespace: nobody is away before there is a way back.
    let opened = Netns::current()?;
    Ok(HOME.get_or_init(|| opened))
}

#[expect(
    clippy::disallowed_methods,
    reason = "the stand-in's own door to setns; the agent's is not for other programs"
)]
fn enter(fd: &impl AsFd) -> io::Result<()> {
    Ok(setns(fd, CloneFlags::CLONE_NEWNET)?)
}
