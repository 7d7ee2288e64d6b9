//! What to install and where, from the agent's settings or from a command line.
//!
//! Decides nothing about files.

use std::{collections::BTreeSet, path::PathBuf};

use culvert_cni::config::{AgentAway, Entry as Keys};
use serde_json::Value;

use super::conflist::{Entry, PLUGIN};
use crate::config::{self, Config, OwnConfig};

/// Where our entry goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Mode {
    /// [`Mode::OwnList`] beside Cilium, else [`Mode::Chained`].
    #[default]
    Auto,
    /// Into the active configuration.
    Chained,
    /// Into a list of our own that sorts before the active configuration and carries its plugins.
    OwnList,
    /// Into a configuration that nobody but, say, Multus uses.
    Standalone,
}

/// What to install, and where.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where runtimes look for plugins.
    pub bin_dir: PathBuf,
    /// Where runtimes look for configurations.
    pub conf_dir: PathBuf,
    /// The plugin to copy.
    pub plugin: PathBuf,
    /// Where our entry goes.
    pub mode: Mode,
    /// The active configuration's name, if it is not to be looked for.
    pub conf_name: Option<String>,
    /// The name of a list of our own, if it is not to be derived.
    pub own_name: Option<String>,
    /// Files of ours may be read by their group.
    pub group_read: bool,
    /// Our entry.
    pub entry: Entry,
}

impl Default for Options {
    fn default() -> Self {
        let excluded_namespaces = BTreeSet::from(["kube-system".to_owned()]);
        Self {
            bin_dir: "/opt/cni/bin".into(),
            conf_dir: "/etc/cni/net.d".into(),
            plugin: beside_us(),
            mode: Mode::Auto,
            conf_name: None,
            own_name: None,
            group_read: false,
            entry: entry(&Keys {
                excluded_namespaces,
                ..Keys::default()
            }),
        }
    }
}

impl From<&Config> for Options {
    fn from(config: &Config) -> Self {
        let keys = Keys {
            socket: config.agent_socket.clone(),
            budget_seconds: config.plugin_budget.as_secs().max(1),
            agent_away: match config.agent_away {
                config::AgentAway::Strict => AgentAway::Strict,
                config::AgentAway::Decisions => AgentAway::Decisions,
            },
            excluded_namespaces: config.excluded_namespaces.clone(),
            decision_file: config.decision_file.clone(),
            decision_max_age_seconds: config.decision_max_age.as_secs().max(1),
            log_file: config.plugin_log.clone(),
        };
        Self {
            bin_dir: config.cni_bin_dir.clone(),
            conf_dir: config.cni_conf_dir.clone(),
            plugin: config.plugin_binary.clone().unwrap_or_else(beside_us),
            mode: match config.cni_own_config {
                _ if !config.cni_chained => Mode::Standalone,
                OwnConfig::Auto => Mode::Auto,
                OwnConfig::Always => Mode::OwnList,
                OwnConfig::Never => Mode::Chained,
            },
            conf_name: config.cni_conf_name.clone(),
            own_name: config.cni_own_config_name.clone(),
            group_read: config.cni_conf_group_read,
            entry: entry(&keys),
        }
    }
}

/// The plugin of the same build: in the image it lies beside this program.
#[must_use]
pub fn beside_us() -> PathBuf {
    std::env::current_exe()
        .unwrap_or_default()
        .with_file_name(PLUGIN)
}

/// Our entry of a configuration. All keys are written out, also where they are the defaults, so that a plugin of another
/// release does the same.
#[must_use]
pub fn entry(keys: &Keys) -> Entry {
    let mut entry = Entry::new();
    entry.insert("type".to_owned(), PLUGIN.into());
    // Fails only for paths that are not UTF-8, which no command line or setting of ours takes.
    if let Ok(Value::Object(keys)) = serde_json::to_value(keys) {
        entry.extend(keys);
    }
    entry
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_the_plugins_but_for_the_namespaces() {
        let mut stdin = Options::default().entry;
        stdin.insert("cniVersion".into(), "1.0.0".into());
        let read = culvert_cni::config::parse(&serde_json::to_vec(&stdin).unwrap()).unwrap();
        let excluded_namespaces = BTreeSet::from(["kube-system".to_owned()]);
        assert_eq!(
            read.entry,
            Keys {
                excluded_namespaces,
                ..Keys::default()
            }
        );
    }

    #[test]
    fn the_plugin_reads_what_is_written() {
        let keys = Keys {
            socket: "/x/agent.sock".into(),
            budget_seconds: 31,
            agent_away: AgentAway::Strict,
            excluded_namespaces: BTreeSet::from(["a".to_owned(), "b".to_owned()]),
            decision_file: "/x/decisions.json".into(),
            decision_max_age_seconds: 77,
            log_file: "/x/log".into(),
        };
        let mut stdin = entry(&keys);
        stdin.insert("cniVersion".into(), "1.0.0".into());
        stdin.insert("name".into(), "n".into());
        // What the installer notes for itself is nothing to the plugin.
        stdin.insert(
            "origin".into(),
            serde_json::json!({"copyOf": "05-cilium.conflist"}),
        );
        let read = culvert_cni::config::parse(&serde_json::to_vec(&stdin).unwrap()).unwrap();
        assert_eq!(read.entry, keys);
    }
}
