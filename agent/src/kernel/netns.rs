//! Network namespaces: opening one by path, knowing it by its cookie, entering and leaving it.
//!
//! Nothing else in the agent calls setns(2). A [`Guard`] enters the calling thread only and puts it back
//! when dropped; if that fails the thread is of no more use and the process ends rather than work on in a
//! pod's namespace.
#![expect(
    unsafe_code,
    reason = "getsockopt(SO_NETNS_COOKIE), which nix has no option for"
)]

use std::{
    fmt, fs,
    fs::File,
    io,
    marker::PhantomData,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use nix::{sched::CloneFlags, sys::statfs};
use serde::Serialize;

use super::error::{Error, Result};

/// The kernel's own number for a network namespace: unique until reboot, never reused.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize)]
#[serde(transparent)]
pub struct NetnsCookie(pub u64);

impl fmt::Display for NetnsCookie {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// An open network namespace.
#[derive(Debug)]
pub struct Netns {
    file: File,
    path: PathBuf,
    cookie: NetnsCookie,
    dev: u64,
    inode: u64,
}

/// nsfs, from linux/magic.h.
const NSFS_MAGIC: i64 = 0x6e73_6673;

impl Netns {
    /// Opens a namespace file: `/run/netns/x`, `/proc/PID/ns/net`.
    pub fn open(path: &Path) -> Result<Self> {
        const OPERATION: &str = "open network namespace";
        let object = path.display();
        let file = opened(path).map_err(|e| {
            let missing = e.kind() == io::ErrorKind::NotFound;
            let error = Error::system(OPERATION, object.to_string(), e);
            if missing {
                error.cured_by(
                    "give the file of a living namespace: /run/netns/NAME or /proc/PID/ns/net (`ip netns list`, \
                     `lsns -t net`); `culvert netns list` shows what is enrolled",
                )
            } else {
                error
            }
        })?;
        let kind = statfs::fstatfs(&file)
            .map_err(|e| Error::system(OPERATION, object.to_string(), e.into()))?;
        let not_netns = || {
            Error::wrong(
                OPERATION,
                path.display(),
                "this is not a network namespace",
                "give a namespace file such as /run/netns/NAME or /proc/PID/ns/net",
            )
        };
        if kind.filesystem_type().0 != NSFS_MAGIC {
            return Err(not_netns());
        }
        let meta = file
            .metadata()
            .map_err(|e| Error::system(OPERATION, object.to_string(), e))?;
        let mut netns = Self {
            file,
            path: path.to_owned(),
            cookie: NetnsCookie(0),
            dev: meta.dev(),
            inode: meta.ino(),
        };
        netns.cookie = {
            let _inside = netns.enter().map_err(|e| match e.errno() {
                Some(libc::EINVAL) => not_netns(),
                _ => e,
            })?;
            here()?
        };
        Ok(netns)
    }

    /// The namespace the calling thread is in.
    pub fn current() -> Result<Self> {
        Self::open(Path::new("/proc/thread-self/ns/net"))
    }

    /// Its cookie.
    #[must_use]
    pub fn cookie(&self) -> NetnsCookie {
        self.cookie
    }

    /// Device of its nsfs.
    #[must_use]
    pub fn dev(&self) -> u64 {
        self.dev
    }

    /// Its inode on nsfs, as `lsns` shows it. Reused after it dies: never an identity.
    #[must_use]
    pub fn inode(&self) -> u64 {
        self.inode
    }

    /// The path it was opened by.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its descriptor.
    #[must_use]
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Moves the calling thread in, until the guard drops.
    pub fn enter(&self) -> Result<Guard<'_>> {
        const HOME: &str = "/proc/thread-self/ns/net";
        let home =
            File::open(HOME).map_err(|e| Error::system("open own network namespace", HOME, e))?;
        set(self.file.as_fd())
            .map_err(|e| Error::system("enter network namespace", self.path.display(), e))?;
        Ok(Guard {
            home,
            inside: self,
            not_send: PhantomData,
        })
    }
}

#[expect(clippy::disallowed_methods, reason = "the one door into namespaces")]
fn set(fd: BorrowedFd<'_>) -> io::Result<()> {
    nix::sched::setns(fd, CloneFlags::CLONE_NEWNET).map_err(io::Error::from)
}

/// The calling thread is in another namespace as long as this lives.
#[derive(Debug)]
pub struct Guard<'a> {
    home: File,
    inside: &'a Netns,
    /// A guard is its thread's: sending it away would restore the wrong one.
    not_send: PhantomData<*const ()>,
}

impl Guard<'_> {
    /// Where the thread is.
    #[must_use]
    pub fn netns(&self) -> &Netns {
        self.inside
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if let Err(error) = set(self.home.as_fd()) {
            tracing::error!(%error, "cannot leave a pod's network namespace: ending, so that nothing runs in it by mistake");
            std::process::abort();
        }
    }
}

/// Cookie of the calling thread's namespace.
pub(super) fn here() -> Result<NetnsCookie> {
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let fail = |e| {
        Error::system("read the cookie of", "a network namespace", e)
            .cured_by("SO_NETNS_COOKIE needs Linux 5.14 or later")
    };
    let socket = {
        use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
        socket(
            AddressFamily::Inet,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC,
            None,
        )
        .map_err(|e| fail(e.into()))?
    };
    let mut cookie = 0_u64;
    let mut len: libc::socklen_t = 8;
    // SAFETY: both pointers are to our own variables, and `len` is the size of the first.
    let ret = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    };
    if ret < 0 {
        Err(fail(io::Error::last_os_error()))
    } else {
        Ok(NetnsCookie(cookie))
    }
}

/// Whether a process lives in it.
pub fn inhabited(netns: &Netns) -> bool {
    let wanted = (netns.dev(), netns.inode());
    processes().any(|(id, _)| id == wanted)
}

/// Paths of living namespaces by (device, inode), found where people and runtimes keep them.
pub fn paths() -> Vec<((u64, u64), PathBuf)> {
    let mut found = Vec::new();
    for dir in ["/run/netns", "/run/docker/netns"] {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            if let Ok(meta) = fs::metadata(entry.path()) {
                found.push(((meta.dev(), meta.ino()), entry.path()));
            }
        }
    }
    found.extend(processes());
    found
}

/// The namespace of each process, and its path.
fn processes() -> impl Iterator<Item = ((u64, u64), PathBuf)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| {
        let name = entry.file_name();
        let path = entry.path().join("ns/net");
        let process = name.to_string_lossy().bytes().all(|b| b.is_ascii_digit());
        // One that has ended, a zombie among them, is in none.
        let meta = process.then(|| fs::metadata(&path).ok()).flatten()?;
        Some(((meta.dev(), meta.ino()), path))
    })
}

/// Without waiting: whoever names a namespace may name a pipe that nobody writes to.
fn opened(path: &Path) -> io::Result<File> {
    File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
}
