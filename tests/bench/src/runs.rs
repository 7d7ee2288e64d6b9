//! How often the kernel ran our programs and for how long, from its own statistics, which are on for this part only.

#![expect(
    unsafe_code,
    reason = "bpf(2) has no safe wrapper here, and the agent keeps its own to itself"
)]

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use culvert::kernel::NetnsCookie;
use culvert::kernel::pins::Pins;
use culvert_lab::Family;

use crate::client::{self, Measure};
use crate::datapath::Field;
use crate::ways::Way;

const BPF_PROG_GET_FD_BY_ID: i32 = 13;
const BPF_OBJ_GET: i32 = 7;
const BPF_PROG_QUERY: i32 = 16;
const BPF_CGROUP_SOCK_OPS: u32 = 3;
const SWITCH: &str = "/proc/sys/kernel/bpf_stats_enabled";
/// The per-byte run: 1 GB on one connection.
const MEGABYTES: u64 = 1024;
const CONNECTIONS: u64 = 800;

/// One program's work.
#[derive(Debug, Clone)]
pub(crate) struct Program {
    pub(crate) name: &'static str,
    /// Runs for one connection through the pod, client's and listener's side together.
    pub(crate) per_connection: f64,
    /// Nanoseconds a run, the clock's own cost included.
    pub(crate) nanoseconds: f64,
    /// Runs before and after 1 GB on one connection.
    pub(crate) before: u64,
    pub(crate) after: u64,
}

#[derive(Debug, Clone, Copy)]
struct Count {
    runs: u64,
    nanoseconds: u64,
}

/// Switches the statistics on and back to what they were.
struct Statistics(String);

impl Statistics {
    fn on() -> Result<Self> {
        let before = fs::read_to_string(SWITCH).with_context(|| format!("reading {SWITCH}"))?;
        fs::write(SWITCH, "1").with_context(|| format!("switching on {SWITCH}"))?;
        Ok(Self(before))
    }
}

impl Drop for Statistics {
    fn drop(&mut self) {
        if let Err(error) = fs::write(SWITCH, self.0.trim()) {
            eprintln!(
                "{SWITCH} could not be set back to {}: {error}",
                self.0.trim()
            );
        }
    }
}

/// Counts runs for connections and for 1 GB.
pub(crate) fn measure(field: &Field) -> Result<Vec<Program>> {
    let path = field.path(Way::Culvert)?;
    let pins = Pins::at(field.lab.bpffs());
    let links = [
        ("culvert_connect", pins.link("culvert_connect")),
        ("culvert_sockopt", pins.link("culvert_sockopt")),
        ("culvert_steer", pins.pod(NetnsCookie(path.pod.cookie()))),
    ];
    let programs = links
        .iter()
        .map(|(_, link)| program(link))
        .collect::<Result<Vec<_>>>()?;
    let counts = || programs.iter().map(count).collect::<Result<Vec<_>>>();
    let to = path.target(Family::V4);
    let _statistics = Statistics::on()?;

    let idle = counts()?;
    // Its warm-up is counted as well, so the share of it is worked out from what the listener saw.
    let seen = path.proxy.settled()?.accepted;
    client::slice(&path.client, &path.proxy, to, Measure::Connect, CONNECTIONS)?;
    let connections = path.proxy.settled()?.accepted - seen;
    let busy = counts()?;

    let seen = path.proxy.settled()?;
    let (before, after) = path
        .client
        .call({
            let programs: Vec<OwnedFd> = programs
                .iter()
                .map(OwnedFd::try_clone)
                .collect::<io::Result<_>>()?;
            move || -> Result<_> {
                let counts = || programs.iter().map(count).collect::<Result<Vec<_>>>();
                let mut stream = client::sink(to)?;
                let before = counts()?;
                client::send(&mut stream, MEGABYTES)?;
                Ok((before, counts()?))
            }
        })?
        .context("sending 1 GB")?;
    let sunk = path.proxy.settled()?.sunk - seen.sunk;
    ensure!(
        sunk == MEGABYTES << 20,
        "the listener took {sunk} bytes of {MEGABYTES} MB: the proxy was not in the path"
    );

    let float = |number: u64| number as f64;
    Ok(links
        .iter()
        .zip(idle.iter().zip(&busy))
        .zip(before.iter().zip(&after))
        .map(|(((name, _), (idle, busy)), (before, after))| {
            let runs = busy.runs - idle.runs;
            Program {
                name,
                per_connection: float(runs) / float(connections),
                nanoseconds: float(busy.nanoseconds - idle.nanoseconds) / float(runs.max(1)),
                before: before.runs,
                after: after.runs,
            }
        })
        .collect())
}

/// The program behind a pinned link.
fn program(link: &Path) -> Result<OwnedFd> {
    let text = std::ffi::CString::new(link.to_string_lossy().as_bytes()).context("a path")?;
    let mut attr = [0_u64; 16];
    attr[0] = text.as_ptr().addr() as u64;
    let link_fd = bpf_fd(BPF_OBJ_GET, &mut attr)
        .with_context(|| format!("opening the link pinned at {}", link.display()))?;
    let id = fdinfo(&link_fd, "prog_id")?;
    let mut attr = [0_u64; 16];
    attr[0] = id;
    bpf_fd(BPF_PROG_GET_FD_BY_ID, &mut attr).with_context(|| format!("opening program {id}"))
}

fn count(program: &OwnedFd) -> Result<Count> {
    Ok(Count {
        runs: fdinfo(program, "run_cnt")?,
        nanoseconds: fdinfo(program, "run_time_ns")?,
    })
}

fn fdinfo(fd: &OwnedFd, field: &str) -> Result<u64> {
    let path = format!("/proc/self/fdinfo/{}", fd.as_raw_fd());
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    text.lines()
        .find_map(|line| line.split_once(':').filter(|(key, _)| *key == field))
        .and_then(|(_, value)| value.trim().parse().ok())
        .with_context(|| format!("no number {field} in {path}:\n{text}"))
}

/// How many sock_ops programs are attached to a cgroup.
pub(crate) fn attached(cgroup: &Path) -> Result<u32> {
    let dir = File::open(cgroup).with_context(|| format!("opening {}", cgroup.display()))?;
    let mut attr = [0_u64; 16];
    let fd = u32::try_from(dir.as_raw_fd()).context("a descriptor")?;
    attr[0] = u64::from(fd) | u64::from(BPF_CGROUP_SOCK_OPS) << 32;
    bpf(BPF_PROG_QUERY, &mut attr)
        .with_context(|| format!("asking what is attached to {}", cgroup.display()))?;
    // target_fd, attach_type; query_flags, attach_flags; prog_ids; count.
    u32::try_from(attr[3] & u64::from(u32::MAX)).context("a count")
}

fn bpf_fd(command: i32, attr: &mut [u64; 16]) -> io::Result<OwnedFd> {
    let fd = bpf(command, attr)?;
    // SAFETY: these commands return a descriptor that is ours and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn bpf(command: i32, attr: &mut [u64; 16]) -> io::Result<i32> {
    // SAFETY: the attribute block is valid for its size, zero where a command has nothing, and what it points to outlives
    // the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            attr.as_mut_ptr(),
            size_of::<[u64; 16]>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    i32::try_from(result).map_err(io::Error::other)
}
