//! The flags of `culvert agent`, made from the table of keys.
//!
//! Takes every value as text: a wrong one is reported together with all other problems, not by itself.

use std::{collections::BTreeMap, path::PathBuf};

use clap::{Arg, ArgAction, ArgMatches, Command, FromArgMatches, parser::ValueSource};

use super::KEYS;

/// Keys that are options of every `culvert` command and so are added by it.
const GLOBAL: [&str; 3] = ["bpffs", "cgroup-root", "dns-cgroup"];

/// What the command line said.
#[derive(Clone, Debug, Default)]
pub struct AgentArgs {
    /// `--config`.
    pub config: Option<PathBuf>,
    /// `--print-config`.
    pub print_config: bool,
    pub(super) flags: BTreeMap<&'static str, String>,
}

impl AgentArgs {
    /// Sets a key as its flag does. For tests and programs that start an agent.
    #[must_use]
    pub fn with(mut self, key: &'static str, value: impl Into<String>) -> Self {
        self.flags.insert(key, value.into());
        self
    }
}

impl clap::Args for AgentArgs {
    fn augment_args(command: Command) -> Command {
        let config = Arg::new("config")
            .long("config")
            .value_name("FILE")
            .env("CULVERT_CONFIG")
            .value_parser(clap::value_parser!(PathBuf))
            .help("YAML file of settings: `KEY: VALUE`, with the names of the flags below");
        let print = Arg::new("print-config")
            .long("print-config")
            .action(ArgAction::SetTrue)
            .help("Print every setting in force and where it comes from, and end");
        let flags = KEYS
            .iter()
            .filter(|k| !GLOBAL.contains(&k.name))
            .map(|key| {
                let arg = Arg::new(key.name)
                    .long(key.name)
                    .value_name(key.shape)
                    .help(format!("{} [env: {}]", key.help.trim(), key.env()));
                if key.switch {
                    arg.num_args(0..=1)
                        .require_equals(true)
                        .default_missing_value("true")
                } else {
                    arg.allow_hyphen_values(true)
                }
            });
        command.arg(config).arg(print).args(flags)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for AgentArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut args = Self::default();
        args.update_from_arg_matches(matches)?;
        Ok(args)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        self.config = matches.get_one::<PathBuf>("config").cloned();
        self.print_config = matches.get_flag("print-config");
        for key in KEYS {
            // The global ones have other ids (clap derives them from field names) and may be absent altogether.
            let id = if GLOBAL.contains(&key.name) {
                key.name.replace('-', "_")
            } else {
                key.name.to_owned()
            };
            let Ok(Some(mut values)) = matches.try_get_raw(&id) else {
                continue;
            };
            if matches.value_source(&id) != Some(ValueSource::CommandLine) {
                continue;
            }
            if let Some(value) = values.next_back() {
                let value = value.to_str().ok_or_else(|| {
                    clap::Error::raw(
                        clap::error::ErrorKind::InvalidUtf8,
                        format!("--{}: the value is no UTF-8\n", key.name),
                    )
                })?;
                self.flags.insert(key.name, value.to_owned());
            }
        }
        Ok(())
    }
}
