//! docs/commands.md says what the command line takes: it is made from its definition.
//!
//! `CULVERT_BLESS=1 cargo test -p culvert --bin culvert` writes it anew; read the diff.

use std::fmt::Write as _;

use clap::{Arg, ArgAction, Command, CommandFactory as _};
use culvert::config::KEYS;

use super::Args;

#[path = "../../tests/pages/mod.rs"]
mod pages;

#[test]
fn the_page_of_commands() {
    let root = Args::command();
    let mut page = String::from(
        "# Commands of `culvert`\n\n\
         `status`, `preflight`, `netns list` and `netns show` change nothing. Errors go to standard error and name the cure. The \
         exit code is 0 when\nall went well, 2 for a command line that is wrong, else 1: also that of `status` when the agent is \
         away or not ready, and of `preflight` when\nsomething is missing.\n\n\
         Every command takes:\n",
    );
    options(root.get_arguments(), &mut page);
    for command in root.get_subcommands() {
        describe(command, "culvert", &mut page);
    }
    pages::same("--bin culvert", "commands.md", &page);
}

/// A command and those below it.
fn describe(command: &Command, above: &str, page: &mut String) {
    let name = format!("{above} {}", command.get_name());
    let about = command.get_long_about().or(command.get_about()).unwrap();
    write!(page, "\n## `{name}`\n\n{}\n", sentence(&about.to_string())).unwrap();
    let agent = name == "culvert agent";
    let elsewhere = |arg: &&Arg| agent && KEYS.iter().any(|key| key.name == arg.get_id().as_str());
    options(command.get_arguments().filter(|arg| !elsewhere(arg)), page);
    if let Some(more) = command.get_after_help() {
        write!(page, "\n```text\n{more}\n```\n").unwrap();
    }
    if agent {
        *page += "\nAnd each [setting](settings.md), as `--KEY VALUE`.\n";
    }
    for below in command.get_subcommands() {
        describe(below, &name, page);
    }
}

/// A table of options, if there are any.
fn options<'a>(all: impl Iterator<Item = &'a Arg>, page: &mut String) {
    let mut all = all.peekable();
    if all.peek().is_none() {
        return;
    }
    *page += "\n| option | default | environment | meaning |\n|---|---|---|---|\n";
    for arg in all {
        let code = |text: &str| match text {
            "" => String::new(),
            text => format!("`{}`", text.replace('|', "\\|")),
        };
        let defaults: Vec<_> = arg
            .get_default_values()
            .iter()
            .map(|value| value.to_string_lossy())
            .collect();
        let default = match arg.get_action().takes_values() {
            true => defaults.join(","),
            false => String::new(),
        };
        let environment = arg.get_env().map(|name| name.to_string_lossy());
        let help = arg.get_long_help().or(arg.get_help()).unwrap().to_string();
        let required = if arg.is_required_set() {
            ", required"
        } else {
            ""
        };
        writeln!(
            page,
            "| {}{required} | {} | {} | {} |",
            code(&spelling(arg)),
            code(&default),
            code(&environment.unwrap_or_default()),
            sentence(&help).replace('|', "\\|")
        )
        .unwrap();
    }
}

/// As it is typed.
fn spelling(arg: &Arg) -> String {
    let mut text = arg
        .get_short()
        .map_or_else(String::new, |short| format!("-{short}, "));
    write!(text, "--{}", arg.get_long().unwrap()).unwrap();
    if arg.get_action().takes_values() {
        let choices = arg.get_possible_values();
        let value = match choices.is_empty() {
            true => arg.get_value_names().unwrap().join(" "),
            false => choices
                .iter()
                .map(|one| one.get_name())
                .collect::<Vec<_>>()
                .join("|"),
        };
        write!(text, " {value}").unwrap();
    }
    if arg.get_value_delimiter().is_some() {
        text += ",...";
    } else if matches!(arg.get_action(), ArgAction::Append | ArgAction::Count) {
        text += " ...";
    }
    text
}

/// As Markdown, with a full stop at its end.
fn sentence(text: &str) -> String {
    let text = text.trim().trim_end_matches('.');
    format!("{}.", text.replace('*', "\\*"))
}
