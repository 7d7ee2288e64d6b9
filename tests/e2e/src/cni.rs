//! A container runtime's way with CNI, as libcni has it: runs a network's plugins one after the other on the lab's node,
//! hands each the result of the one before, and keeps the last for later calls.
//!
//! It knows the specification and nothing of Culvert.

use std::{
    ffi::OsStr,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};
use culvert_lab::Ns;
use serde_json::{Map, Value, json};

/// Where Debian puts the plugins of the CNI project.
pub const DEBIAN_PLUGINS: &str = "/usr/lib/cni";

/// A network configuration list, and the directories its plugins are in.
#[derive(Debug)]
pub struct Network {
    version: String,
    name: String,
    plugins: Vec<Map<String, Value>>,
    path: Vec<PathBuf>,
}

/// One interface of one container.
#[derive(Debug, Clone)]
pub struct Attachment<'a> {
    /// The sandbox's id.
    pub container: &'a str,
    /// Its network namespace; DEL does without.
    pub netns: Option<&'a Path>,
    /// The interface's name in it.
    pub ifname: &'a str,
    /// `CNI_ARGS`.
    pub args: &'a str,
}

/// For commands that are about no container.
const NOBODY: Attachment<'static> = Attachment {
    container: "",
    netns: None,
    ifname: "",
    args: "",
};

/// A plugin said no: its error object.
#[derive(Debug, thiserror::Error)]
#[error("{plugin} {command}: {error}")]
pub struct PluginError {
    /// Which plugin.
    pub plugin: String,
    /// Which command.
    pub command: &'static str,
    /// What it printed.
    pub error: Value,
}

impl Network {
    /// Reads a list.
    pub fn new(list: &Value, path: &[&Path]) -> Result<Self> {
        let text = |key: &str| {
            let value = list[key].as_str();
            Ok::<_, anyhow::Error>(value.with_context(|| format!("no {key}"))?.to_owned())
        };
        let plugins = list["plugins"].as_array().context("no plugins")?;
        Ok(Self {
            version: text("cniVersion")?,
            name: text("name")?,
            plugins: plugins
                .iter()
                .map(|plugin| plugin.as_object().cloned().context("a plugin is an object"))
                .collect::<Result<_>>()?,
            path: path.iter().map(|dir| (*dir).to_owned()).collect(),
        })
    }

    /// Runs all plugins' ADD; what the last one printed.
    pub fn add(&self, node: &Ns, attachment: &Attachment<'_>) -> Result<Value> {
        let mut previous = None;
        for plugin in &self.plugins {
            let printed = self.run(node, "ADD", plugin, attachment, previous.as_ref())?;
            let result = serde_json::from_str(&printed)
                .with_context(|| format!("ADD printed {printed:?}"))?;
            previous = Some(result);
        }
        previous.context("a network without plugins")
    }

    /// Runs all plugins' CHECK with the result of the ADD.
    pub fn check(&self, node: &Ns, attachment: &Attachment<'_>, result: &Value) -> Result<()> {
        for plugin in &self.plugins {
            let printed = self.run(node, "CHECK", plugin, attachment, Some(result))?;
            ensure!(printed.is_empty(), "CHECK printed {printed:?}");
        }
        Ok(())
    }

    /// Runs all plugins' DEL, the last first.
    pub fn del(
        &self,
        node: &Ns,
        attachment: &Attachment<'_>,
        result: Option<&Value>,
    ) -> Result<()> {
        // Earlier versions do not hand the result back.
        let result = result.filter(|_| self.version != "0.3.1");
        for plugin in self.plugins.iter().rev() {
            let printed = self.run(node, "DEL", plugin, attachment, result)?;
            ensure!(printed.is_empty(), "DEL printed {printed:?}");
        }
        Ok(())
    }

    /// Runs all plugins' GC: of this network, these `(container, interface)` alone are still alive.
    pub fn gc(&self, node: &Ns, alive: &[(&str, &str)]) -> Result<()> {
        let alive: Vec<Value> = alive
            .iter()
            .map(|(container, ifname)| json!({"containerID": container, "ifname": ifname}))
            .collect();
        for plugin in &self.plugins {
            let mut plugin = plugin.clone();
            plugin.insert("cni.dev/valid-attachments".into(), json!(alive));
            let printed = self.run(node, "GC", &plugin, &NOBODY, None)?;
            ensure!(printed.is_empty(), "GC printed {printed:?}");
        }
        Ok(())
    }

    /// Runs all plugins' STATUS.
    pub fn status(&self, node: &Ns) -> Result<()> {
        for plugin in &self.plugins {
            let printed = self.run(node, "STATUS", plugin, &NOBODY, None)?;
            ensure!(printed.is_empty(), "STATUS printed {printed:?}");
        }
        Ok(())
    }

    /// What each plugin answers to VERSION.
    pub fn versions(&self, node: &Ns) -> Result<Vec<Value>> {
        let answers = self.plugins.iter().map(|plugin| {
            let printed = self.run(node, "VERSION", plugin, &NOBODY, None)?;
            serde_json::from_str(&printed).with_context(|| format!("VERSION printed {printed:?}"))
        });
        answers.collect()
    }

    fn run(
        &self,
        node: &Ns,
        command: &'static str,
        plugin: &Map<String, Value>,
        attachment: &Attachment<'_>,
        previous: Option<&Value>,
    ) -> Result<String> {
        let mut config = plugin.clone();
        config.insert("cniVersion".into(), json!(self.version));
        config.insert("name".into(), json!(self.name));
        if let Some(previous) = previous {
            config.insert("prevResult".into(), previous.clone());
        }
        let kind = plugin.get("type").and_then(Value::as_str);
        let kind = kind.context("a plugin has a type")?;
        let path = std::env::join_paths(&self.path)?;
        let binary = self.find(kind)?;
        let stdin = Value::Object(config).to_string();
        let output = node.run(|| run_plugin(&binary, command, attachment, &path, &stdin))?;
        let stdout = String::from_utf8(output.stdout)?;
        if output.status.success() {
            return Ok(stdout);
        }
        let Ok(error) = serde_json::from_str(&stdout) else {
            let stderr = String::from_utf8_lossy(&output.stderr);
            bail!("{kind} {command} printed no error object but {stdout:?} {stderr:?}");
        };
        Err(PluginError {
            plugin: kind.to_owned(),
            command,
            error,
        }
        .into())
    }

    fn find(&self, kind: &str) -> Result<PathBuf> {
        let mut places = self.path.iter().map(|dir| dir.join(kind));
        places.find(|file| file.is_file()).with_context(|| {
            format!("no plugin {kind}: apt-get install containernetworking-plugins, and cargo xtask build")
        })
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "a runtime runs plugins; the agent starts no processes"
)]
fn run_plugin(
    binary: &Path,
    command: &str,
    attachment: &Attachment<'_>,
    path: &OsStr,
    stdin: &str,
) -> Result<std::process::Output> {
    let mut process = Command::new(binary);
    process
        .env_clear()
        // `bridge` looks for programs of its own.
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("CNI_COMMAND", command)
        .env("CNI_PATH", path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let about = [
        ("CNI_CONTAINERID", attachment.container),
        ("CNI_IFNAME", attachment.ifname),
        ("CNI_ARGS", attachment.args),
    ];
    process.envs(about.into_iter().filter(|(_, value)| !value.is_empty()));
    if let Some(netns) = attachment.netns {
        process.env("CNI_NETNS", netns);
    }
    let mut child = process
        .spawn()
        .with_context(|| format!("starting {}", binary.display()))?;
    let mut pipe = child.stdin.take().context("stdin is a pipe")?;
    pipe.write_all(stdin.as_bytes())?;
    drop(pipe);
    Ok(child.wait_with_output()?)
}
