//! Our entry of a CNI configuration: the keys that the plugin reads, written out even where they are its defaults, so that
//! a plugin of another release does the same.

use std::{collections::BTreeSet, path::PathBuf};

use serde::Serialize;
use serde_json::Value;

use super::conflist::{Entry, PLUGIN};

/// What the plugin is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct EntryOptions {
    /// The agent's socket.
    pub socket: PathBuf,
    /// How long an ADD may take in all, in seconds.
    pub budget_seconds: u64,
    /// What starts while the agent is away.
    pub agent_away: AgentAway,
    /// Namespaces whose pods always start.
    pub excluded_namespaces: BTreeSet<String>,
    /// The agent's decision file.
    pub decision_file: PathBuf,
    /// How long its decisions count, in seconds.
    pub decision_max_age_seconds: u64,
    /// The plugin's log.
    pub log_file: PathBuf,
}

/// What starts while the agent is away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum AgentAway {
    /// What the decision file says is not of the mesh, and excluded namespaces.
    #[default]
    Decisions,
    /// Excluded namespaces alone.
    Strict,
}

impl Default for EntryOptions {
    fn default() -> Self {
        Self {
            socket: "/run/culvert/agent.sock".into(),
            // ztunnel's own reconnect can take 15 s.
            budget_seconds: 25,
            agent_away: AgentAway::Decisions,
            excluded_namespaces: BTreeSet::from(["kube-system".to_owned()]),
            decision_file: "/var/lib/culvert/decisions.json".into(),
            decision_max_age_seconds: 24 * 60 * 60,
            log_file: "/var/log/culvert-cni.log".into(),
        }
    }
}

impl EntryOptions {
    /// As it stands in a configuration.
    #[must_use]
    pub fn entry(&self) -> Entry {
        let mut entry = Entry::new();
        entry.insert("type".to_owned(), PLUGIN.into());
        // Fails only for paths that are not UTF-8, which no command line or setting of ours takes.
        if let Ok(Value::Object(keys)) = serde_json::to_value(self) {
            entry.extend(keys);
        }
        entry
    }
}
