//! Runs the real `culvert` binary against this lab. It asserts nothing about what the binary prints.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

use anyhow::{Context, Result, ensure};

use crate::ns::Place;
use crate::{Child, Creds, Lab, Ns, paths};

/// How long a run may take that is to end by itself.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(60);

/// What a run of the binary came to.
#[derive(Debug, Clone)]
pub struct CulvertOutput {
    /// How it ended.
    pub status: ExitStatus,
    /// What it printed.
    pub stdout: String,
    /// What it complained about.
    pub stderr: String,
    args: String,
}

impl CulvertOutput {
    /// Its output as JSON; ask for it with `-o json`.
    pub fn json(&self) -> Result<serde_json::Value> {
        serde_json::from_str(&self.stdout)
            .with_context(|| format!("culvert {} printed no JSON: {self:?}", self.args))
    }

    /// Fails, with all it printed, unless it succeeded.
    pub fn ok(self) -> Result<Self> {
        ensure!(
            self.status.success(),
            "culvert {} failed ({}):\n{}{}",
            self.args,
            self.status,
            self.stdout,
            self.stderr
        );
        Ok(self)
    }
}

impl Lab {
    /// The command line of a `culvert` run for this lab, without namespace: see `culvert`.
    pub fn culvert_command(&self, args: &[&str]) -> Result<Command> {
        Ok(self.command_of(&culvert_binary()?, args))
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "the lab runs the binary that is tested"
    )]
    pub(crate) fn command_of(&self, binary: &Path, args: &[&str]) -> Command {
        let mut command = Command::new(binary);
        command
            .arg("--bpffs")
            .arg(self.bpffs())
            .arg("--cgroup-root")
            .arg(self.cgroup())
            .args(args);
        command
    }

    /// Runs `culvert` in the node's namespace, outside the lab's cgroup, with the lab's bpffs and cgroup.
    pub fn culvert(&self, args: &[&str]) -> Result<CulvertOutput> {
        let mut command = self.culvert_command(args)?;
        let output = self
            .node()
            .inside(|| command.output())?
            .with_context(|| format!("running {command:?}"))?;
        Ok(CulvertOutput {
            status: output.status,
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
            args: args.join(" "),
        })
    }

    /// Runs it like that as somebody.
    pub fn culvert_as(&self, creds: Creds, args: &[&str]) -> Result<CulvertOutput> {
        let child = self.culvert_spawn_as(creds, args)?;
        let status = child.wait(PATIENCE)?;
        Ok(CulvertOutput {
            status,
            stdout: child.stdout(),
            stderr: child.stderr(),
            args: args.join(" "),
        })
    }

    /// Starts `culvert` like that and lets it run, for `events`.
    pub fn culvert_spawn(&self, args: &[&str]) -> Result<Child> {
        self.culvert_spawn_as(Creds::Root, args)
    }

    /// Starts it as somebody and lets it run.
    pub fn culvert_spawn_as(&self, creds: Creds, args: &[&str]) -> Result<Child> {
        let command = self.culvert_command(args)?;
        Child::start(self.node(), Place::Machine, None, creds, command)
    }

    /// Attaches a namespace with further arguments, and fails unless that worked.
    pub fn attach(&self, ns: &Ns, args: &[&str]) -> Result<CulvertOutput> {
        self.netns_verb("attach", ns, args)
    }

    /// Detaches a namespace, and fails unless that worked.
    pub fn detach(&self, ns: &Ns) -> Result<CulvertOutput> {
        self.netns_verb("detach", ns, &[])
    }

    fn netns_verb(&self, verb: &str, ns: &Ns, args: &[&str]) -> Result<CulvertOutput> {
        let path = ns
            .path()
            .to_str()
            .context("a namespace's path is no UTF-8")?;
        let all: Vec<&str> = ["netns", verb, "--netns", path]
            .into_iter()
            .chain(args.iter().copied())
            .collect();
        self.culvert(&all)?.ok()
    }
}

/// The agent's binary.
pub fn culvert_binary() -> Result<PathBuf> {
    paths::binary("CULVERT_BIN", "culvert", "cargo xtask build")
}

/// The CNI plugin's binary.
pub fn plugin_binary() -> Result<PathBuf> {
    paths::binary("CULVERT_CNI_BIN", "culvert-cni", "cargo xtask build")
}
