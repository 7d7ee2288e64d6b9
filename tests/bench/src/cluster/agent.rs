//! A node's agent as the machine sees it: its process, when it started, whether it says that it is ready, what it holds in
//! memory.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use culvert_cluster::Node;
use nix::time::{ClockId, clock_gettime};

use super::pods::PATIENCE;
use crate::interrupt;

/// Where the agent answers whether it is ready.
const PORT: u16 = 8000;
/// What `starttime` in a process' `stat` counts in.
const TICKS_A_SECOND: u64 = 100;
const ANSWER: Duration = Duration::from_secs(2);

/// One agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Agent {
    pub(super) pid: u32,
    /// In ticks since the machine's start.
    started: u64,
    address: Ipv4Addr,
}

impl Agent {
    /// The one of a node, if it runs.
    pub(super) fn find(node: &Node) -> Result<Option<Self>> {
        let path = Path::new("/run/netns").join(node.netns());
        let netns = fs::metadata(&path)
            .with_context(|| format!("looking at {}", path.display()))?
            .ino();
        for entry in fs::read_dir("/proc").context("reading /proc")?.flatten() {
            let name = entry.file_name();
            let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
                continue;
            };
            let dir = entry.path();
            // Any process may end while it is looked at.
            let line = fs::read(dir.join("cmdline")).unwrap_or_default();
            let is_agent = line.starts_with(b"/bin/culvert\0agent\0");
            if !is_agent || fs::metadata(dir.join("ns/net")).is_ok_and(|meta| meta.ino() != netns) {
                continue;
            }
            if let Some(started) = started(pid) {
                let address = node.addresses().0;
                return Ok(Some(Self {
                    pid,
                    started,
                    address,
                }));
            }
        }
        Ok(None)
    }

    /// The one that runs.
    pub(super) fn of(node: &Node) -> Result<Self> {
        Self::find(node)?.with_context(|| format!("no agent runs on {}", node.name()))
    }

    /// Waits for the one that comes after this, and returns it.
    pub(super) fn successor(&self, node: &Node) -> Result<Self> {
        let began = Instant::now();
        loop {
            interrupt::check()?;
            if let Some(next) = Self::find(node)?.filter(|next| next != self) {
                return Ok(next);
            }
            ensure!(
                began.elapsed() < PATIENCE,
                "no new agent on {} within {PATIENCE:?}",
                node.name()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until it says that it is ready. Seconds since its process was made.
    pub(super) fn ready(&self) -> Result<f64> {
        let began = Instant::now();
        while !self.is_ready() {
            interrupt::check()?;
            ensure!(
                began.elapsed() < PATIENCE,
                "the agent is not ready within {PATIENCE:?}: see its log by `culvert-cluster`, CULVERT_KEEP=1"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        let now = Duration::from(clock_gettime(ClockId::CLOCK_BOOTTIME)?);
        let started = Duration::from_millis(self.started * 1000 / TICKS_A_SECOND);
        Ok(now.saturating_sub(started).as_secs_f64())
    }

    fn is_ready(&self) -> bool {
        let ask = || -> std::io::Result<bool> {
            let at = SocketAddr::from((self.address, PORT));
            let mut stream = TcpStream::connect_timeout(&at, ANSWER)?;
            stream.set_read_timeout(Some(ANSWER))?;
            stream
                .write_all(b"GET /readyz HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer.starts_with("HTTP/1.1 200 "))
        };
        // Nobody listens at first.
        ask().unwrap_or(false)
    }

    /// How often a word is in the memory that it writes to.
    pub(super) fn holds(&self, word: &str) -> Result<usize> {
        let maps = fs::read_to_string(format!("/proc/{}/maps", self.pid))
            .context("reading the agent's maps: has it ended?")?;
        let memory = File::open(format!("/proc/{}/mem", self.pid))?;
        let mut found = 0;
        for line in maps.lines() {
            let mut fields = line.split_whitespace();
            let (Some(range), Some(rights)) = (fields.next(), fields.next()) else {
                continue;
            };
            let Some((from, to)) = range.split_once('-').filter(|_| rights.starts_with("rw"))
            else {
                continue;
            };
            let (from, to) = (u64::from_str_radix(from, 16)?, u64::from_str_radix(to, 16)?);
            let mut bytes = vec![0; usize::try_from(to - from)?];
            // Some ranges cannot be read, and some go meanwhile.
            let read = memory.read_at(&mut bytes, from).unwrap_or(0);
            found += count(&bytes[..read], word.as_bytes());
        }
        Ok(found)
    }
}

fn count(bytes: &[u8], word: &[u8]) -> usize {
    let first = word.first();
    let starts = bytes
        .iter()
        .enumerate()
        .filter(|(_, byte)| Some(*byte) == first);
    starts
        .filter(|(at, _)| bytes[*at..].starts_with(word))
        .count()
}

fn started(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The program's name may hold blanks; the start is the 22nd field, the 20th behind the name.
    stat.rsplit_once(") ")?.1.split(' ').nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_counted() {
        assert_eq!(count(b"ab abab b", b"ab"), 3);
        assert_eq!(count(b"", b"ab"), 0);
        assert_eq!(count(b"a", b"ab"), 0);
    }

    #[test]
    fn memory_is_searched_and_a_start_is_found() {
        let word = format!("a word of {}", std::process::id());
        let me = Agent {
            pid: std::process::id(),
            started: started(std::process::id()).unwrap(),
            address: Ipv4Addr::LOCALHOST,
        };
        assert!(me.holds(&word).unwrap() >= 1);
        let now = Duration::from(clock_gettime(ClockId::CLOCK_BOOTTIME).unwrap());
        assert!(Duration::from_secs(me.started / TICKS_A_SECOND) <= now);
    }
}
