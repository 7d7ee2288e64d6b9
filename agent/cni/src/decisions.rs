//! What the plugin may decide while the agent is away: the file the agent leaves behind, and the rule.
//!
//! The rule only ever lets a pod start of which it is known that it is not of the mesh. A file that is missing, old,
//! broken or of another version, and a namespace that is not in it, mean that nothing is known.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{self, Read as _},
    os::unix::fs::MetadataExt as _,
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

use crate::atomic;

/// Where the file is unless the configuration says otherwise: below `/var/lib`, to survive a reboot.
pub const FILE: &str = "/var/lib/culvert/decisions.json";

/// The version written, and the only one read.
pub const VERSION: u32 = 1;

/// A cluster of ten thousand namespaces needs half a megabyte.
const MAX_FILE: u64 = 8 << 20;

/// How far in the future a file may have been written: clocks are set back now and then, by little.
const MAX_SKEW: Duration = Duration::from_secs(300);

/// How a namespace stood when the agent last looked.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Standing {
    /// Of the mesh: its pods are, unless they say otherwise.
    Mesh,
    /// Not of the mesh, but a pod in it asks for it by its own label.
    OptedIn,
    /// Not of the mesh, and no pod in it asks.
    Outside,
}

/// The agent's decisions.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Decisions {
    /// [`VERSION`].
    pub version: u32,
    /// Seconds since 1970 by the wall clock, which alone goes on across a reboot.
    pub written_at: u64,
    /// Selectors other than the default are in force: the standings below decide nothing.
    pub custom_selectors: bool,
    /// Namespaces whose pods are never enrolled; they need not exist.
    pub excluded: BTreeSet<String>,
    /// All namespaces of the cluster. One that is not here may have been made since.
    pub namespaces: BTreeMap<String, Standing>,
}

/// Why a decision file is of no use.
#[derive(Debug, thiserror::Error)]
pub enum Unreadable {
    /// It could not be opened or read.
    #[error("it cannot be read: {0}")]
    Io(#[from] io::Error),
    /// Somebody other than root could have written it.
    #[error("it belongs to or can be written by somebody other than root")]
    NotOurs,
    /// Larger than the agent writes.
    #[error("it is larger than {MAX_FILE} bytes")]
    TooLarge,
    /// It is not what the agent writes.
    #[error("it is broken: {0}")]
    Broken(serde_json::Error),
    /// Of another version.
    #[error("it is of version {0}, and this plugin reads version {VERSION}")]
    OtherVersion(u32),
}

impl Decisions {
    /// Decisions of now.
    #[must_use]
    pub fn new(
        custom_selectors: bool,
        excluded: BTreeSet<String>,
        namespaces: BTreeMap<String, Standing>,
    ) -> Self {
        Self {
            version: VERSION,
            written_at: seconds(SystemTime::now()),
            custom_selectors,
            excluded,
            namespaces,
        }
    }

    /// Puts them where the plugin looks, at once or not at all. The directory must exist.
    ///
    /// # Errors
    ///
    /// See [`atomic::write`].
    pub fn publish(&self, path: &Path) -> io::Result<()> {
        atomic::write(path, &serde_json::to_vec(self)?, 0o600)
    }

    /// Reads what was published.
    ///
    /// # Errors
    ///
    /// When it says nothing that may be relied upon.
    pub fn read(path: &Path) -> Result<Self, Unreadable> {
        let file = File::open(path)?;
        let data = file.metadata()?;
        let us = fs::metadata("/proc/self")?.uid();
        if !(data.uid() == 0 || data.uid() == us) || data.mode() & 0o022 != 0 {
            return Err(Unreadable::NotOurs);
        }
        let mut content = Vec::new();
        if file.take(MAX_FILE + 1).read_to_end(&mut content)? as u64 > MAX_FILE {
            return Err(Unreadable::TooLarge);
        }
        Self::parse(&content)
    }

    /// Reads the content of the file.
    ///
    /// # Errors
    ///
    /// When it is broken or of another version.
    pub fn parse(content: &[u8]) -> Result<Self, Unreadable> {
        /// Read first: another version may look different altogether.
        #[derive(Deserialize)]
        struct Head {
            version: u32,
        }
        let head: Head = serde_json::from_slice(content).map_err(Unreadable::Broken)?;
        if head.version != VERSION {
            return Err(Unreadable::OtherVersion(head.version));
        }
        serde_json::from_slice(content).map_err(Unreadable::Broken)
    }

    /// How long ago they were written; none if that lies in the future by more than clocks go wrong.
    #[must_use]
    pub fn age(&self, now: SystemTime) -> Option<Duration> {
        let written = Duration::from_secs(self.written_at);
        let now = Duration::from_secs(seconds(now));
        match now.checked_sub(written) {
            Some(age) => Some(age),
            None if written.saturating_sub(now) <= MAX_SKEW => Some(Duration::ZERO),
            None => None,
        }
    }
}

/// What the plugin's own entry in the network configuration says about deciding alone.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rules {
    /// Namespaces that the agent excluded when it wrote the entry.
    pub excluded: BTreeSet<String>,
    /// Only those start: the decision file is not used.
    pub strict: bool,
    /// Decisions older than this count for nothing.
    pub max_age: Duration,
}

/// What becomes of a pod while the agent is away, and why.
#[derive(Clone, PartialEq, Eq, Debug)]
#[must_use]
pub enum Alone {
    /// It is not of the mesh: it starts.
    Start(String),
    /// It is of the mesh, or may be: it does not start without the agent.
    Wait(String),
}

/// Decides about a pod of a namespace without the agent.
pub fn decide_alone(
    decisions: Result<&Decisions, &Unreadable>,
    rules: &Rules,
    namespace: &str,
    now: SystemTime,
) -> Alone {
    if rules.excluded.contains(namespace) {
        return Alone::Start(format!("namespace {namespace} is excluded"));
    }
    if rules.strict {
        return Alone::Wait(
            "agentAway is \"strict\": only pods of excluded namespaces start without the agent"
                .into(),
        );
    }
    let decisions = match decisions {
        Ok(decisions) => decisions,
        Err(error) => {
            return Alone::Wait(format!("the agent's decision file is of no use: {error}"));
        }
    };
    match decisions.age(now) {
        None => return Alone::Wait("the agent's decision file is from the future".into()),
        Some(age) if age > rules.max_age => {
            return Alone::Wait(format!(
                "the agent's decision file is {} s old, and counts for {} s",
                age.as_secs(),
                rules.max_age.as_secs()
            ));
        }
        Some(_) => {}
    }
    if decisions.excluded.contains(namespace) {
        return Alone::Start(format!("namespace {namespace} is excluded"));
    }
    if decisions.custom_selectors {
        return Alone::Wait(
            "enablement selectors are in force, which only the agent can judge".into(),
        );
    }
    match decisions.namespaces.get(namespace) {
        Some(Standing::Outside) => Alone::Start(format!(
            "namespace {namespace} is not of the mesh and no pod in it asks to be"
        )),
        Some(Standing::Mesh) => Alone::Wait(format!("namespace {namespace} is of the mesh")),
        Some(Standing::OptedIn) => Alone::Wait(format!(
            "pods of namespace {namespace} ask for the mesh by their own label, and only the agent knows which"
        )),
        None => Alone::Wait(format!(
            "namespace {namespace} is newer than the agent's decision file"
        )),
    }
}

fn seconds(time: SystemTime) -> u64 {
    // A clock before 1970 makes every file one from the future: nothing is known then.
    time.duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}
