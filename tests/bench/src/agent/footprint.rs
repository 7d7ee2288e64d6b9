//! What the agent occupies at one moment, as the kernel counts it: memory, descriptors, threads, pins, map entries.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context as _, Result};
use culvert_e2e::bpf;
use serde_json::{Value, json};

use super::site::Site;
use crate::process::Memory;

/// Maps that are as large as they are: their entries are not made and unmade.
const FIXED: [&str; 7] = [
    "CONFIG",
    "ENTERING",
    "EVENTS",
    "PID_NAMESPACES",
    "PROBE_COUNTS",
    "STEER",
    // Forget by themselves what is old, and hold connections, not pods.
    "VOUCHED",
];

/// Everything a pod that is gone must not leave behind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Footprint {
    pub(super) memory: Memory,
    pub(super) descriptors: usize,
    pub(super) threads: usize,
    pub(super) pins: usize,
    pub(super) entries: BTreeMap<String, usize>,
}

impl Footprint {
    pub(super) fn of(site: &Site) -> Result<Self> {
        let pid = site.agent.pid();
        let count = |what: &str| -> Result<usize> {
            let dir = format!("/proc/{pid}/{what}");
            Ok(fs::read_dir(&dir)
                .with_context(|| format!("reading {dir}: has the agent ended?"))?
                .count())
        };
        let mut entries = BTreeMap::new();
        for (name, map) in bpf::maps_of(&site.lab)? {
            if map.has_keys() && !FIXED.contains(&name.as_str()) {
                entries.insert(name, map.keys()?.len());
            }
        }
        Ok(Self {
            memory: Memory::of(pid)?,
            descriptors: count("fd")?,
            threads: count("task")?,
            pins: site.lab.pins()?.len(),
            entries,
        })
    }

    /// What can be counted, under its name; memory is judged apart.
    pub(super) fn counts(&self) -> Vec<(String, usize)> {
        let mut counts = vec![
            ("file descriptors".to_owned(), self.descriptors),
            ("threads".to_owned(), self.threads),
            ("pins in bpffs".to_owned(), self.pins),
        ];
        let maps = self.entries.iter();
        counts.extend(maps.map(|(name, n)| (format!("entries of {name}"), *n)));
        counts
    }

    pub(super) fn json(&self) -> Value {
        json!({
            "memory": self.memory.json(), "descriptors": self.descriptors, "threads": self.threads,
            "pins": self.pins, "map_entries": self.entries,
        })
    }
}
