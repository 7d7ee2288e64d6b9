//! Running other programs: announced before they run, with an environment free of what `cargo run` left in it, and with
//! an error that shows the command line. It decides nothing about what to run.

use std::{
    env,
    ffi::{OsStr, OsString},
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

use crate::project::Project;

/// A command with a clean environment: what `cargo run` set for *this* program is not the child's business.
pub(crate) fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(is_set_by_cargo_run) {
            command.env_remove(name);
        }
    }
    if let Some(path) = env::var_os("LD_LIBRARY_PATH") {
        match library_path_of_user(&path) {
            Some(path) => command.env("LD_LIBRARY_PATH", path),
            None => command.env_remove("LD_LIBRARY_PATH"),
        };
    }
    command
}

/// The cargo that runs us, for the workspace. A relative `CARGO_TARGET_DIR` is made absolute: children start elsewhere.
pub(crate) fn cargo(project: &Project) -> Command {
    let mut command = command(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(&project.root);
    if env::var_os("CARGO_TARGET_DIR").is_some() {
        command.env("CARGO_TARGET_DIR", &project.target);
    }
    command
}

/// A cargo of another toolchain: nothing that selects compilers, flags or targets for the workspace may reach it.
/// What says how to reach registries stays.
pub(crate) fn foreign_cargo(program: &Path) -> Command {
    let mut command = command(program);
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(selects_toolchain) {
            command.env_remove(name);
        }
    }
    command
}

fn is_set_by_cargo_run(name: &str) -> bool {
    name.starts_with("CARGO_PKG_")
        || name.starts_with("CARGO_BIN_")
        || matches!(
            name,
            "CARGO_MANIFEST_DIR"
                | "CARGO_MANIFEST_PATH"
                | "CARGO_CRATE_NAME"
                | "CARGO_PRIMARY_PACKAGE"
        )
}

fn selects_toolchain(name: &str) -> bool {
    let kept = name == "CARGO_HOME"
        || [
            "CARGO_NET_",
            "CARGO_HTTP_",
            "CARGO_REGISTRIES_",
            "CARGO_REGISTRY_",
            "CARGO_SOURCE_",
        ]
        .iter()
        .any(|prefix| name.starts_with(prefix));
    let selects = name == "CARGO"
        || name.starts_with("CARGO_")
        || matches!(
            name,
            "RUSTC"
                | "RUSTDOC"
                | "RUSTFLAGS"
                | "RUSTDOCFLAGS"
                | "RUSTC_WRAPPER"
                | "RUSTC_WORKSPACE_WRAPPER"
                | "RUSTC_BOOTSTRAP"
                | "RUSTUP_TOOLCHAIN"
                | "__CARGO_DEFAULT_LIB_METADATA"
        );
    selects && !kept
}

/// `cargo run` puts its own directories into `LD_LIBRARY_PATH`; a compiler of another toolchain would load them.
fn library_path_of_user(path: &OsStr) -> Option<OsString> {
    let kept: Vec<_> = env::split_paths(path)
        .filter(|dir| {
            let dir = dir.to_string_lossy();
            !dir.is_empty()
                && !["/toolchains/", "/rustlib/", "/debug", "/release"]
                    .iter()
                    .any(|mark| dir.contains(mark))
        })
        .collect();
    if kept.is_empty() {
        None
    } else {
        env::join_paths(kept).ok()
    }
}

/// Says what is about to change on this machine, then does it.
pub(crate) fn announced(command: &mut Command) -> Result<()> {
    announce(&show(command));
    run(command)
}

/// Prints one line for a change of the system, in the style of `set -x`.
pub(crate) fn announce(what: &str) {
    eprintln!("+ {what}");
}

/// Runs a command to its end; failing is an error that names it.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("cannot run `{}`", show(command)))?;
    if !status.success() {
        bail!("`{}` failed: {status}", show(command));
    }
    Ok(())
}

/// Runs a command and returns what it wrote to standard output; its standard error stays visible.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot run `{}`", show(command)))?;
    if !output.status.success() {
        bail!("`{}` failed: {}", show(command), output.status);
    }
    String::from_utf8(output.stdout)
        .with_context(|| format!("`{}` printed something that is not UTF-8", show(command)))
}

/// The command line as one would type it, with the variables set for it (not those removed).
pub(crate) fn show(command: &Command) -> String {
    let variables = command.get_envs().filter_map(|(name, value)| {
        let value = value?.to_string_lossy();
        // PATH is as long as it is dull.
        (name != "PATH" && name != "LD_LIBRARY_PATH")
            .then(|| format!("{}={}", name.to_string_lossy(), quote(&value)))
    });
    let program = std::iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<_> = variables
        .chain(program.map(|word| quote(&word.to_string_lossy())))
        .collect();
    words.join(" ")
}

fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\u{1f}', " ").replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_toolchain_sees_no_choice_of_ours() {
        for name in [
            "CARGO_ENCODED_RUSTFLAGS",
            "CARGO_BUILD_TARGET",
            "RUSTUP_TOOLCHAIN",
            "RUSTFLAGS",
            "RUSTC",
            "CARGO",
        ] {
            assert!(selects_toolchain(name), "{name}");
        }
        for name in [
            "CARGO_HOME",
            "CARGO_HTTP_PROXY",
            "CARGO_NET_OFFLINE",
            "RUSTUP_HOME",
            "PATH",
            "RUST_BACKTRACE",
        ] {
            assert!(!selects_toolchain(name), "{name}");
        }
    }

    #[test]
    fn what_cargo_run_set_stays_here() {
        for name in ["CARGO_MANIFEST_DIR", "CARGO_PKG_NAME", "CARGO_BIN_NAME"] {
            assert!(is_set_by_cargo_run(name), "{name}");
        }
        for name in ["CARGO_HOME", "CARGO_TARGET_DIR", "CARGO"] {
            assert!(!is_set_by_cargo_run(name), "{name}");
        }
    }

    #[test]
    fn library_path_keeps_what_the_user_set() {
        let path = "/w/target/debug/deps:/opt/lib:/r/toolchains/stable/lib:/r/lib/rustlib/x/lib";
        assert_eq!(
            library_path_of_user(OsStr::new(path)),
            Some("/opt/lib".into())
        );
        assert_eq!(library_path_of_user(OsStr::new("/w/target/debug")), None);
    }

    #[test]
    fn a_command_is_shown_as_one_would_type_it() {
        let mut command = Command::new("apt-get");
        command
            .args(["install", "a b", "it's"])
            .env("DEBIAN_FRONTEND", "noninteractive")
            .env_remove("RUSTC");
        assert_eq!(
            show(&command),
            r"DEBIAN_FRONTEND=noninteractive apt-get install 'a b' 'it'\''s'"
        );
    }

    #[test]
    fn a_failing_command_is_an_error_that_names_it() {
        let error = run(&mut Command::new("false")).unwrap_err();
        assert!(error.to_string().contains("`false` failed"), "{error}");
        let error = output(&mut Command::new("/nonexistent/program")).unwrap_err();
        assert!(
            error.to_string().contains("/nonexistent/program"),
            "{error}"
        );
    }
}
