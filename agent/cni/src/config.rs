//! What comes by stdin: the network configuration with our entry's keys, and the result of the plugins before us.
//!
//! Parses, checks, bounds. Results are kept as the bytes they came as: a plugin in a chain must not lose what it does not
//! understand.

use std::{
    collections::BTreeSet,
    io::Read,
    net::IpAddr,
    path::PathBuf,
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;

use crate::{
    api::{self, Attachment, Refusal, code},
    decisions::{self, Rules},
};

/// Longest configuration taken, in bytes.
pub const MAX_STDIN: u64 = 1 << 20;

/// Versions of the specification that we speak. Nodes of Azure still say 0.3.0, which has the results of 0.3.1.
pub const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// The newest of [`VERSIONS`]: for answers when nobody asked for one.
pub const NEWEST: &str = "1.1.0";

/// A parsed configuration.
#[derive(Debug)]
pub struct Config {
    /// One of [`VERSIONS`].
    pub version: &'static str,
    /// `name` of the network.
    pub network: String,
    /// The earlier plugins' result, byte for byte.
    pub previous: Option<Box<RawValue>>,
    /// `cni.dev/valid-attachments`, of a GC; none is not the same as an empty list.
    pub valid: Option<Vec<Attachment>>,
    /// Our own keys.
    pub entry: Entry,
}

/// Our keys in the plugin's entry of the network configuration; all may be left out.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize, Serialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Entry {
    /// The agent's socket.
    pub socket: PathBuf,
    /// How long an ADD may take in all, in seconds.
    pub budget_seconds: u64,
    /// What starts without the agent.
    pub agent_away: AgentAway,
    /// Namespaces that are excluded.
    pub excluded_namespaces: BTreeSet<String>,
    /// The agent's decision file.
    pub decision_file: PathBuf,
    /// How long its decisions count, in seconds.
    pub decision_max_age_seconds: u64,
    /// The plugin's log; empty for none.
    pub log_file: PathBuf,
}

/// What starts without the agent.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum AgentAway {
    /// What the decision file says is not of the mesh, and excluded namespaces.
    #[default]
    Decisions,
    /// Excluded namespaces alone.
    Strict,
}

impl Default for Entry {
    fn default() -> Self {
        Self {
            socket: api::SOCKET.into(),
            // ztunnel's own reconnect can take 15 s.
            budget_seconds: 25,
            agent_away: AgentAway::Decisions,
            excluded_namespaces: BTreeSet::new(),
            decision_file: decisions::FILE.into(),
            decision_max_age_seconds: 24 * 60 * 60,
            log_file: "/var/log/culvert-cni.log".into(),
        }
    }
}

impl Entry {
    /// Longest budget taken: the kubelet gives a whole sandbox two minutes.
    const MAX_BUDGET: u64 = 100;

    /// The time an ADD has.
    #[must_use]
    pub fn budget(&self) -> Duration {
        Duration::from_secs(self.budget_seconds)
    }

    /// What it says about deciding alone.
    #[must_use]
    pub fn rules(&self) -> Rules {
        Rules {
            excluded: self.excluded_namespaces.clone(),
            strict: self.agent_away == AgentAway::Strict,
            max_age: Duration::from_secs(self.decision_max_age_seconds),
        }
    }

    /// Decides about a pod without the agent; reads the decision file if that can matter.
    pub fn decide_alone(&self, namespace: &str, now: SystemTime) -> decisions::Alone {
        let read = decisions::Decisions::read(&self.decision_file);
        decisions::decide_alone(read.as_ref(), &self.rules(), namespace, now)
    }
}

/// Reads all of stdin, up to [`MAX_STDIN`].
///
/// # Errors
///
/// When it cannot be read, or does not end.
pub fn read(stdin: impl Read) -> Result<Vec<u8>, Refusal> {
    let mut content = Vec::new();
    let read = stdin
        .take(MAX_STDIN + 1)
        .read_to_end(&mut content)
        .map_err(|error| {
            Refusal::for_good(
                code::IO,
                format!("cannot read the network configuration from stdin: {error}"),
                "the container runtime hands it over",
            )
        })?;
    if read as u64 > MAX_STDIN {
        return Err(Refusal::for_good(
            code::DECODING,
            format!("the network configuration on stdin is larger than {MAX_STDIN} bytes"),
            "no real one is: look at the files below /etc/cni/net.d",
        ));
    }
    Ok(content)
}

/// The version an answer has to have, whatever else is wrong with the configuration.
#[must_use]
pub fn version(content: &[u8]) -> Option<&'static str> {
    #[derive(Deserialize)]
    struct Head {
        #[serde(rename = "cniVersion")]
        version: String,
    }
    let head: Head = serde_json::from_slice(content).ok()?;
    VERSIONS.into_iter().find(|known| *known == head.version)
}

/// Parses a configuration.
///
/// # Errors
///
/// When it is not JSON, of a version we do not speak, or has keys of ours with values that cannot be meant.
pub fn parse(content: &[u8]) -> Result<Config, Refusal> {
    #[derive(Deserialize)]
    struct Raw {
        #[serde(rename = "cniVersion")]
        version: Option<String>,
        name: Option<String>,
        #[serde(rename = "prevResult")]
        previous: Option<Box<RawValue>>,
        #[serde(
            rename = "cni.dev/valid-attachments",
            default,
            deserialize_with = "present"
        )]
        valid: Option<Vec<Attachment>>,
    }
    // Serde would take a list for an object whose keys have been left out.
    if !content.trim_ascii_start().starts_with(b"{") {
        return Err(Refusal::for_good(
            code::DECODING,
            "the network configuration on stdin is not a JSON object",
            "the container runtime hands it over; look at the files below /etc/cni/net.d",
        ));
    }
    let not_json = |error: serde_json::Error| {
        Refusal::for_good(
            if error.is_data() {
                code::INVALID_CONFIG
            } else {
                code::DECODING
            },
            format!(
                "the network configuration on stdin cannot be read: {}",
                short(&error)
            ),
            "it must be a JSON object as the CNI specification describes it; look at the files below /etc/cni/net.d",
        )
    };
    let raw: Raw = serde_json::from_slice(content).map_err(not_json)?;
    // The specification: a configuration without a version is of 0.1.0.
    let asked = raw.version.as_deref().unwrap_or("0.1.0");
    let Some(version) = VERSIONS.into_iter().find(|known| *known == asked) else {
        let asked: String = asked.chars().take(40).collect();
        return Err(Refusal::for_good(
            code::INCOMPATIBLE_VERSION,
            format!("the network configuration is of CNI version {asked:?}"),
            format!("culvert-cni speaks {}", VERSIONS.join(", ")),
        ));
    };
    let entry: Entry = serde_json::from_slice(content).map_err(|error| {
        invalid(&format!(
            "a key of culvert-cni's entry cannot be meant: {}",
            short(&error)
        ))
    })?;
    if entry.budget_seconds == 0 || entry.budget_seconds > Entry::MAX_BUDGET {
        return Err(invalid(&format!(
            "budgetSeconds is {}, and must be 1 to {}",
            entry.budget_seconds,
            Entry::MAX_BUDGET
        )));
    }
    if raw
        .previous
        .as_ref()
        .is_some_and(|previous| !previous.get().starts_with('{'))
    {
        return Err(invalid("prevResult is not an object"));
    }
    Ok(Config {
        version,
        network: raw.name.unwrap_or_default(),
        previous: raw.previous,
        valid: raw.valid,
        entry,
    })
}

impl Config {
    /// The answer to an ADD: the earlier result as it came, or an empty one when we are alone.
    #[must_use]
    pub fn result(&self) -> String {
        match &self.previous {
            Some(previous) => previous.get().to_owned(),
            None => format!(r#"{{"cniVersion":"{}"}}"#, self.version),
        }
    }

    /// The container's own addresses in the earlier result: not those of interfaces on the node.
    ///
    /// # Errors
    ///
    /// When there is a result but its addresses are none.
    pub fn addresses(&self) -> Result<Vec<IpAddr>, Refusal> {
        #[derive(Deserialize)]
        struct Previous {
            #[serde(default)]
            interfaces: Option<Vec<Interface>>,
            #[serde(default)]
            ips: Option<Vec<Ip>>,
        }
        #[derive(Deserialize)]
        struct Interface {
            #[serde(default)]
            sandbox: Option<String>,
        }
        #[derive(Deserialize)]
        struct Ip {
            address: String,
            #[serde(default)]
            interface: Option<i64>,
        }
        let Some(previous) = &self.previous else {
            return Ok(Vec::new());
        };
        let previous: Previous = serde_json::from_str(previous.get()).map_err(|error| {
            invalid(&format!(
                "prevResult is not a result as the specification describes it: {}",
                short(&error)
            ))
        })?;
        let interfaces = previous.interfaces.unwrap_or_default();
        let mut addresses = Vec::new();
        for ip in previous.ips.unwrap_or_default() {
            let place = ip
                .interface
                .and_then(|index| usize::try_from(index).ok())
                .and_then(|index| interfaces.get(index));
            if place.is_some_and(|it| it.sandbox.as_deref().unwrap_or_default().is_empty()) {
                continue;
            }
            let bare = ip
                .address
                .split_once('/')
                .map_or(ip.address.as_str(), |(bare, _)| bare);
            let address: IpAddr = bare.parse().map_err(|_| {
                let shown: String = ip.address.chars().take(80).collect();
                invalid(&format!("prevResult has an address {shown:?}"))
            })?;
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        Ok(addresses)
    }
}

/// Tells a list that is `null`, which is how Go writes an empty one, from no list.
fn present<'de, D: Deserializer<'de>>(value: D) -> Result<Option<Vec<Attachment>>, D::Error> {
    Option::<Vec<Attachment>>::deserialize(value).map(|list| Some(list.unwrap_or_default()))
}

/// Serde repeats what it did not expect, however long that is.
fn short(error: &serde_json::Error) -> String {
    let whole = error.to_string();
    match whole.char_indices().nth(300) {
        Some((end, _)) => format!("{}...", whole.get(..end).unwrap_or_default()),
        None => whole,
    }
}

fn invalid(message: &str) -> Refusal {
    Refusal::for_good(
        code::INVALID_CONFIG,
        message,
        "look at the files below /etc/cni/net.d; culvert writes its entry anew when its agent starts",
    )
}
