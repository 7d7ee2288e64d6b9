//! One network namespace: how it is made, named, entered and asked. What stands in it is set up elsewhere.

use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};

use crate::Family;
use crate::cgroup::Cgroup;
use crate::creds::Creds;
use crate::netlink::Netlink;
use crate::paths::NETNS_DIR;

/// A network namespace of a lab. Clones are handles to the same one; its path lives as long as the lab.
#[derive(Debug, Clone)]
pub struct Ns(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: String,
    path: PathBuf,
    file: File,
    netlink: Netlink,
    cookie: u64,
    cgroup: PathBuf,
    scratch: PathBuf,
    face: OnceLock<Face>,
}

/// Which cgroup a thread is to be in.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Place {
    /// The lab's.
    Lab,
    /// Whichever it is in.
    Machine,
}

/// How a namespace is joined to the rest of the lab.
#[derive(Debug, Default)]
pub(crate) struct Face {
    pub(crate) addr4: Option<Ipv4Addr>,
    pub(crate) addr6: Option<Ipv6Addr>,
    pub(crate) ifname: String,
    pub(crate) host_ifname: String,
}

/// Makes the directory a shared mount, as iproute2 does with its first namespace, and under the same lock. Whoever did not
/// would have his namespaces hidden by the first `ip netns add` on the machine, which mounts the directory over itself.
fn share_netns_dir() -> Result<()> {
    fs::create_dir_all(NETNS_DIR)?;
    let dir = File::open(NETNS_DIR)?;
    let _lock = Flock::lock(dir, FlockArg::LockExclusive).map_err(|(_, error)| error)?;
    let change = |from, flags| mount(from, NETNS_DIR, None::<&str>, flags, None::<&str>);
    let share = || change(None, MsFlags::MS_SHARED | MsFlags::MS_REC);
    match share() {
        // It is no mount yet.
        Err(Errno::EINVAL) => {
            change(Some(NETNS_DIR), MsFlags::MS_BIND | MsFlags::MS_REC)?;
            share()?;
        }
        done => done?,
    }
    Ok(())
}

impl Ns {
    /// Makes a namespace with `lo` up, and a path for it below `/run/netns`.
    pub(crate) fn create(lab_id: &str, name: &str, cgroup: &Path, scratch: &Path) -> Result<Self> {
        share_netns_dir().with_context(|| format!("preparing {NETNS_DIR}"))?;
        let path = Path::new(NETNS_DIR).join(format!("{lab_id}@{name}"));
        let make = || -> Result<(File, Netlink, u64)> {
            unshare(CloneFlags::CLONE_NEWNET)
                .context("making a network namespace: run as root (CAP_SYS_ADMIN)")?;
            let own = "/proc/thread-self/ns/net";
            File::create_new(&path).with_context(|| format!("making {}", path.display()))?;
            mount(
                Some(own),
                &path,
                None::<&str>,
                MsFlags::MS_BIND,
                None::<&str>,
            )
            .with_context(|| format!("mounting a network namespace at {}", path.display()))?;
            let file = File::open(own).with_context(|| format!("opening {own}"))?;
            Ok((file, Netlink::open()?, own_cookie()?))
        };
        // A thread of its own: it is in the new namespace for good, and ends with it.
        let (file, netlink, cookie) =
            on_thread(name, make).with_context(|| format!("making namespace {name}"))?;
        let name = name.to_owned();
        let (cgroup, scratch) = (cgroup.to_path_buf(), scratch.to_path_buf());
        let ns = Self(Arc::new(Inner {
            name,
            path,
            file,
            netlink,
            cookie,
            cgroup,
            scratch,
            face: OnceLock::new(),
        }));
        ns.set_up("lo")?;
        // IPv6 addresses, the kernel's own link-local ones too, are to work at once.
        for scope in ["all", "default"] {
            let key = format!("net/ipv6/conf/{scope}/accept_dad");
            if ns.has_sysctl(&key) {
                ns.set_sysctl(&key, "0")?;
            }
        }
        Ok(ns)
    }

    pub(crate) fn set_face(&self, face: Face) {
        // Only the builder that made the namespace calls this, and only once.
        let _already = self.0.face.set(face);
    }

    /// The name it was made with.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// A path that can be opened to get it: what `--netns` takes.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// The namespace file.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.file.as_fd()
    }

    /// The kernel's cookie for it (`SO_NETNS_COOKIE`).
    pub fn cookie(&self) -> u64 {
        self.0.cookie
    }

    /// The inode of the namespace file.
    pub fn inode(&self) -> Result<u64> {
        Ok(self
            .0
            .file
            .metadata()
            .context("looking at a namespace file")?
            .ino())
    }

    /// Its IPv4 address in the lab. Fails for one without.
    pub fn v4(&self) -> Result<Ipv4Addr> {
        self.0
            .face
            .get()
            .and_then(|face| face.addr4)
            .with_context(|| format!("{} has no IPv4 address", self.name()))
    }

    /// Its IPv6 address in the lab. Fails for one without.
    pub fn v6(&self) -> Result<Ipv6Addr> {
        self.0
            .face
            .get()
            .and_then(|face| face.addr6)
            .with_context(|| format!("{} has no IPv6 address", self.name()))
    }

    /// Its address of a family. Fails for one without.
    pub fn ip(&self, family: Family) -> Result<IpAddr> {
        Ok(match family {
            Family::V4 => self.v4()?.into(),
            Family::V6 => self.v6()?.into(),
        })
    }

    /// Its address of a family with a port. Fails for one without.
    pub fn at(&self, family: Family, port: u16) -> Result<SocketAddr> {
        Ok(SocketAddr::new(self.ip(family)?, port))
    }

    /// The interface it is joined to the lab by (`eth0` in a pod), empty if by none.
    pub fn ifname(&self) -> &str {
        self.0.face.get().map_or("", |face| &face.ifname)
    }

    /// The node's end of that interface, empty if there is none.
    pub fn host_ifname(&self) -> &str {
        self.0.face.get().map_or("", |face| &face.host_ifname)
    }

    pub(crate) fn netlink(&self) -> &Netlink {
        &self.0.netlink
    }

    /// Where files of the lab go.
    pub(crate) fn scratch(&self) -> &Path {
        &self.0.scratch
    }

    /// How many handles to this namespace there are.
    pub(crate) fn handles(&self) -> usize {
        Arc::strong_count(&self.0)
    }

    /// Runs a closure on a thread of its own that is in this namespace and in the lab's cgroup. Threads and processes
    /// started by the closure are there as well. A panic goes on in the caller.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.run_as(Creds::Root, work)
    }

    /// Like `run`, as somebody. What the closure does through threads it finds running is done as whoever they are.
    #[expect(
        clippy::panic,
        reason = "what a closure finds out in the wrong place would mean nothing"
    )]
    pub fn run_as<T: Send>(&self, creds: Creds, work: impl FnOnce() -> T + Send) -> T {
        on_thread(self.name(), || {
            let become_them = || creds.apply().with_context(|| format!("becoming {creds}"));
            if let Err(error) = self.enter(Place::Lab).and_then(|()| become_them()) {
                panic!("{error:?}");
            }
            work()
        })
    }

    /// Puts the calling thread into this namespace. Only for threads that end here.
    #[expect(
        clippy::disallowed_methods,
        reason = "the lab's own door to namespaces"
    )]
    pub(crate) fn enter(&self, place: Place) -> Result<()> {
        setns(self.fd(), CloneFlags::CLONE_NEWNET).with_context(|| {
            format!(
                "entering namespace {}: run as root (CAP_SYS_ADMIN)",
                self.name()
            )
        })?;
        match place {
            Place::Lab => Cgroup::enter(&self.0.cgroup),
            Place::Machine => Ok(()),
        }
    }

    /// Reads a sysctl, named as below `/proc/sys`: `net/ipv4/ip_forward`.
    pub fn sysctl(&self, key: &str) -> Result<String> {
        let path = Path::new("/proc/sys").join(key);
        let read =
            || fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()));
        Ok(self.inside(read)??.trim().to_owned())
    }

    /// Sets a sysctl.
    pub fn set_sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = Path::new("/proc/sys").join(key);
        self.inside(|| {
            fs::write(&path, value)
                .with_context(|| format!("writing {value} to {}", path.display()))
        })?
    }

    /// Whether this kernel has a sysctl.
    pub fn has_sysctl(&self, key: &str) -> bool {
        self.inside(|| Path::new("/proc/sys").join(key).exists())
            .unwrap_or(false)
    }

    /// Like `run`, but outside the lab's cgroup: for the lab's own doings.
    pub(crate) fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        on_thread(self.name(), || {
            self.enter(Place::Machine)?;
            Ok(work())
        })
    }
}

/// Runs a closure on a fresh thread and hands on its panic.
fn on_thread<T: Send>(name: &str, work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn_scoped(scope, work);
        match thread.map(std::thread::ScopedJoinHandle::join) {
            Ok(Ok(value)) => value,
            Ok(Err(panic)) => std::panic::resume_unwind(panic),
            Err(error) => {
                std::panic::resume_unwind(Box::new(format!("starting a thread: {error}")))
            }
        }
    })
}

/// The cookie of the calling thread's network namespace.
fn own_cookie() -> Result<u64> {
    let socket = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::DGRAM, None)
        .context("opening a socket to ask for the namespace's cookie")?;
    crate::sockopt::get_u64(socket.as_fd(), libc::SOL_SOCKET, libc::SO_NETNS_COOKIE)
        .context("asking for the namespace's cookie: SO_NETNS_COOKIE needs Linux 5.14")
}
