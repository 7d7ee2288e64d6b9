//! What one process occupies and uses, as the kernel counts it.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};

/// Memory in KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Memory {
    pub(crate) rss: u64,
    pub(crate) anonymous: u64,
    pub(crate) file: u64,
    /// The most there ever was.
    pub(crate) peak: u64,
}

impl Memory {
    pub(crate) fn of(pid: u32) -> Result<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/status"))
            .context("reading the status of a process: has it ended?")?;
        let field = |name: &str| -> Result<u64> {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            let number =
                line.and_then(|line| line.trim_start_matches(':').split_whitespace().next());
            number
                .and_then(|n| n.parse().ok())
                .with_context(|| format!("no {name} in /proc/{pid}/status"))
        };
        Ok(Self {
            rss: field("VmRSS")?,
            anonymous: field("RssAnon")?,
            file: field("RssFile")?,
            peak: field("VmHWM")?,
        })
    }

    pub(crate) fn json(&self) -> Value {
        json!({"rss_kib": self.rss, "anonymous_kib": self.anonymous, "file_kib": self.file, "peak_kib": self.peak})
    }
}

/// Processor time a process has used, all threads that ever were.
pub(crate) fn cpu(pid: u32) -> Result<Duration> {
    // The kernel's number for the clock of a process: its id's complement, "scheduler's".
    let clock = ClockId::from_raw((!pid.cast_signed() << 3) | 2);
    clock_gettime(clock)
        .map(Duration::from)
        .context("reading the clock of a process: has it ended?")
}
