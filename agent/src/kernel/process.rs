//! Telling the programs which processes are ztunnel and which the kubelet.
//!
//! The programs know a process by its id in the initial PID namespace. In a nested one, which is all that an agent in
//! a test cluster's node or without the host's PID namespace sees, they need a kernel that can tell ids of any
//! namespace (Linux 6.10). Ids are reused: with each goes what shows whether it still is the same process.
#![expect(
    unsafe_code,
    reason = "pidfd_open(2) and pidfd_getfd(2), which nix does not wrap"
)]

use std::{
    fs, io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::Path,
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use culvert_ebpf::abi::{MAX_PID_NAMESPACES, Named, PidNamespace, ProcessKey};

use super::{
    error::{Error, Result},
    maps::Map,
    node::Node,
    preflight,
    procfs::PROC,
};

const OPERATION: &str = "identify";

/// A process that can be named to the programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    /// The PID namespace it is in; none = the initial one.
    namespace: Option<PidNamespace>,
    /// Its id there.
    tgid: u32,
    named: Named,
}

/// Looks at process `pid` of our own PID namespace. `otherwise` says what to do instead where that namespace cannot be
/// used.
pub(super) fn identify(pid: u32, otherwise: &str) -> Result<Identity> {
    let object = format!("process {pid}");
    let own = own_namespace()?;
    let nested = own != INITIAL;
    if nested && !preflight::tells_any_pid_namespace() {
        // A kernel that takes no program at all would be blamed for its age.
        preflight::require_features()?;
        return Err(Error::wrong(
            OPERATION,
            object,
            "this culvert runs in a PID namespace of its own, where process ids mean something else, and only Linux \
             6.10 and later can tell those",
            format!("run it in the host's PID namespace (hostPID){otherwise}"),
        ));
    }
    // A /proc of another namespace would give somebody else's numbers.
    let shown = fs::read_link("/proc/self").map_err(|e| Error::system("read", "/proc/self", e))?;
    if shown.to_str() != Some(std::process::id().to_string().as_str()) {
        return Err(Error::wrong(
            OPERATION,
            object,
            "the /proc mounted here is another PID namespace's",
            format!(
                "mount the one of culvert's own PID namespace, or run culvert in the host's (hostPID){otherwise}"
            ),
        ));
    }
    let dir = Path::new(PROC).join(pid.to_string());
    let gone = |e| {
        Error::system(OPERATION, &object, e)
            .cured_by("give the process id of a running process, as seen from here")
    };
    let status = fs::read_to_string(dir.join("status")).map_err(gone)?;
    let ids = |name: &str| -> Option<Vec<u32>> {
        let line = status.lines().find_map(|l| l.strip_prefix(name))?;
        line.split_ascii_whitespace()
            .map(|n| n.parse().ok())
            .collect()
    };
    if ids("Tgid:").as_deref() != Some(&[pid]) {
        return Err(Error::wrong(
            OPERATION,
            object,
            "this is a thread",
            "give the process id of its leader",
        ));
    }
    let named = Named {
        started: started(pid).map_err(gone)?,
        pid,
        named_in: u32::try_from(own).unwrap_or(0),
    };
    if !nested {
        return Ok(Identity {
            namespace: None,
            tgid: pid,
            named,
        });
    }
    let place = fs::metadata(dir.join("ns/pid")).map_err(|e| {
        gone(e).cured_by("give the agent CAP_SYS_PTRACE, and a process that is running")
    })?;
    // The last of its ids is the one in its own namespace.
    let tgid = ids("NStgid:").and_then(|all| all.last().copied());
    Ok(Identity {
        namespace: Some(PidNamespace {
            dev: kernel_device(place.dev()),
            inode: place.ino(),
        }),
        tgid: tgid.unwrap_or(pid),
        named,
    })
}

/// Inode of the initial PID namespace (PROC_PID_INIT_INO).
const INITIAL: u64 = 0xEFFF_FFFC;

fn own_namespace() -> Result<u64> {
    const OWN: &str = "/proc/self/ns/pid";
    fs::metadata(OWN)
        .map(|m| m.ino())
        .map_err(|e| Error::system("examine", OWN, e))
}

/// A device number as the kernel has it inside.
fn kernel_device(dev: u64) -> u64 {
    u64::from(libc::major(dev)) << 20 | u64::from(libc::minor(dev))
}

/// When a process started, in clock ticks since boot.
fn started(pid: u32) -> io::Result<u64> {
    let stat = fs::read_to_string(Path::new(PROC).join(pid.to_string()).join("stat"))?;
    parse_started(&stat)
        .ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat is not understood")))
}

/// Field 22. The second one, the name, may hold anything, also spaces and brackets.
fn parse_started(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// Puts a process into one of the maps of named processes, and takes those out that are gone. The caller holds the lock.
pub(super) fn name(node: &Node, map: &NamedMap, identity: &Identity) -> Result<ProcessKey> {
    sweep(node)?;
    let key = ProcessKey {
        pid_namespace: match &identity.namespace {
            None => 0,
            Some(namespace) => slot_of(node, namespace)? + 1,
        },
        tgid: identity.tgid,
    };
    if map.get(&key)? != Some(identity.named) {
        map.set(&key, &identity.named)?;
    }
    Ok(key)
}

/// Where the programs find this namespace; enters it where it is new.
fn slot_of(node: &Node, wanted: &PidNamespace) -> Result<u32> {
    let maps = node.maps();
    let mut used: Vec<u32> = maps
        .ztunnels
        .keys()?
        .iter()
        .map(|k| k.pid_namespace)
        .collect();
    used.extend(maps.vouchers.keys()?.iter().map(|k| k.pid_namespace));
    let mut free = None;
    for slot in 0..MAX_PID_NAMESPACES {
        let there = maps.pid_namespaces.get(&slot)?;
        if there == Some(*wanted) {
            return Ok(slot);
        }
        // One that nobody is named by any more may be taken.
        if free.is_none() && !used.contains(&(slot + 1)) {
            free = Some(slot);
        }
    }
    let Some(slot) = free else {
        return Err(Error::wrong(
            "name a process of",
            "one more PID namespace",
            format!("processes of {MAX_PID_NAMESPACES} are named already"),
            "run the agent in the host's PID namespace (hostPID), where all of them count as one",
        )
        .for_now());
    };
    maps.pid_namespaces.set(&slot, wanted)?;
    Ok(slot)
}

/// Processes that are named as ztunnel, run, and were named where we are: only then their ids mean anything to us.
pub(super) fn ztunnels(node: &Node) -> Result<Vec<u32>> {
    let own = u32::try_from(own_namespace()?).unwrap_or(0);
    let mut found = Vec::new();
    for key in node.maps().ztunnels.keys()? {
        if let Some(named) = node.maps().ztunnels.get(&key)?
            && named.named_in == own
            && started(named.pid).is_ok_and(|at| at == named.started)
        {
            found.push(named.pid);
        }
    }
    Ok(found)
}

/// Takes out the processes that are gone: their ids will be others'. Those that were named in another PID namespace than
/// ours are left, because from here nobody can tell.
pub(super) fn forget_gone(node: &Node) -> Result<()> {
    if !gone(node)?.is_empty() {
        let _lock = node.lock()?;
        sweep(node)?;
    }
    Ok(())
}

/// As [`forget_gone`], for who holds the lock.
fn sweep(node: &Node) -> Result<()> {
    for (map, key) in gone(node)? {
        map.remove(&key)?;
    }
    Ok(())
}

type NamedMap = Map<ProcessKey, Named>;

fn gone(node: &Node) -> Result<Vec<(&NamedMap, ProcessKey)>> {
    let own = u32::try_from(own_namespace()?).unwrap_or(0);
    let mut found = Vec::new();
    for map in [&node.maps().ztunnels, &node.maps().vouchers] {
        for key in map.keys()? {
            let same = |named: Named| started(named.pid).is_ok_and(|at| at == named.started);
            if map
                .get(&key)?
                .is_some_and(|named| named.named_in == own && !same(named))
            {
                found.push((map, key));
            }
        }
    }
    Ok(found)
}

/// A process held by its pidfd: whatever happens to its id, this is the one.
#[derive(Debug)]
pub(super) struct Process {
    pid: u32,
    pidfd: OwnedFd,
}

impl Process {
    /// Takes hold of a running process.
    pub(super) fn open(pid: u32) -> Result<Self> {
        // SAFETY: plain numbers in, a new descriptor or an error out.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        let fd = i32::try_from(fd).unwrap_or(-1);
        if fd < 0 {
            return Err(Error::system(
                "open process",
                pid,
                io::Error::last_os_error(),
            ));
        }
        // SAFETY: pidfd_open returned a descriptor that nobody else owns.
        let pidfd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { pid, pidfd })
    }

    /// Can be read once the process has ended.
    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// It has not ended yet.
    pub(super) fn alive(&self) -> bool {
        let mut fds = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
        matches!(poll(&mut fds, PollTimeout::ZERO), Ok(0))
    }

    /// A copy of the descriptor behind a socket's inode.
    pub(super) fn socket(&self, inode: u32) -> Result<Option<OwnedFd>> {
        let dir = format!("/proc/{}/fd", self.pid);
        let entries = match fs::read_dir(&dir) {
            // Another user's, and listing it takes CAP_DAC_READ_SEARCH. Copying takes none but CAP_SYS_PTRACE.
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => return self.search(inode),
            entries => entries.map_err(|e| Error::system("read", &dir, e))?,
        };
        let wanted = format!("socket:[{inode}]");
        for entry in entries.flatten() {
            if !fs::read_link(entry.path()).is_ok_and(|to| to.as_os_str() == wanted.as_str()) {
                continue;
            }
            let Some(number) = entry
                .file_name()
                .to_str()
                .and_then(|n| n.parse::<i32>().ok())
            else {
                continue;
            };
            // Closed since it was listed: then it is not there.
            return self.copy(number);
        }
        Ok(None)
    }

    /// The same by trying every number.
    fn search(&self, inode: u32) -> Result<Option<OwnedFd>> {
        /// More descriptors than that no process has that we look into.
        const MOST: i32 = 1 << 16;
        let path = format!("/proc/{}/status", self.pid);
        let status = fs::read_to_string(&path).map_err(|e| Error::system("read", &path, e))?;
        let slots = status
            .lines()
            .find_map(|l| l.strip_prefix("FDSize:"))
            .and_then(|v| v.trim().parse::<i32>().ok());
        for number in 0..slots.unwrap_or(MOST).min(MOST) {
            let Some(fd) = self.copy(number)? else {
                continue;
            };
            let is_it = nix::sys::stat::fstat(&fd).is_ok_and(|stat| {
                stat.st_ino == u64::from(inode) && stat.st_mode & libc::S_IFMT == libc::S_IFSOCK
            });
            if is_it {
                return Ok(Some(fd));
            }
        }
        Ok(None)
    }

    /// A copy of one descriptor; none if there is none of that number.
    fn copy(&self, number: i32) -> Result<Option<OwnedFd>> {
        // SAFETY: our own pidfd, plain numbers, a new descriptor or an error out.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, self.pidfd.as_raw_fd(), number, 0) };
        let fd = i32::try_from(fd).unwrap_or(-1);
        if fd < 0 {
            let error = io::Error::last_os_error();
            if error.raw_os_error() == Some(libc::EBADF) {
                return Ok(None);
            }
            return Err(Error::system("copy a socket of process", self.pid, error));
        }
        // SAFETY: pidfd_getfd returned a descriptor that nobody else owns.
        Ok(Some(unsafe { OwnedFd::from_raw_fd(fd) }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_is_found_behind_any_name() {
        let tail = "S 1 42 42 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 98765 1 2 3";
        assert_eq!(parse_started(&format!("42 (kubelet) {tail}")), Some(98765));
        assert_eq!(parse_started(&format!("42 (a) b (c) {tail}")), Some(98765));
        assert_eq!(parse_started("42 (a"), None);
        assert_eq!(parse_started(""), None);
        assert_eq!(parse_started("42 (a) S 1"), None);
    }
}
