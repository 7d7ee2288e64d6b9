//! What lies in the configuration directory, and which of it the container runtime uses.
//!
//! Reads, changes nothing. The rule is that of the runtimes: the first valid of `*.conf`, `*.conflist` and `*.json` by
//! name. What is wholly ours does not count: it stands for the configuration that it carries.

use std::{
    fs,
    io::Read as _,
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use serde_json::Value;

use super::{
    conflist::{self, MAX_BYTES, PLUGIN},
    error::Error,
};

/// What Cilium appends to the names of configurations that it puts aside.
const BACKUP: &str = ".cilium_bak";

/// A file of the configuration directory.
#[derive(Debug, Clone)]
pub struct File {
    /// Its name.
    pub name: String,
    /// Its path in the directory.
    pub path: PathBuf,
    /// Where it points to, if it is a symbolic link.
    pub link: Option<PathBuf>,
    /// The file itself: [`File::path`], or what the link leads to.
    pub target: PathBuf,
    /// What is in it, or why that cannot be read.
    pub content: Result<Vec<u8>, String>,
    /// Permission bits.
    pub mode: u32,
    /// User and group.
    pub owner: (u32, u32),
}

/// How much of a file is ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Share {
    /// Nothing.
    None,
    /// An entry among others.
    Entry,
    /// All of it.
    Whole,
}

impl File {
    /// The content, as far as it could be read.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.content.as_deref().unwrap_or_default()
    }

    /// Whether Cilium has put it aside.
    #[must_use]
    pub fn is_backup(&self) -> bool {
        self.name.ends_with(BACKUP)
    }

    /// How much of it is ours.
    #[must_use]
    pub fn share(&self) -> Share {
        match conflist::release(&self.name, self.bytes()) {
            Ok(conflist::Released::Nothing) => Share::Whole,
            Ok(conflist::Released::NotOurs) | Err(_) => Share::None,
            Ok(_) => Share::Entry,
        }
    }
}

/// The configurations in `dir`, by name, and those that Cilium has put aside.
pub fn scan(dir: &Path) -> Result<Vec<File>, Error> {
    let entries = fs::read_dir(dir).map_err(|e| Error::system("list", dir, e))?;
    let mut files = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|e| Error::system("list", dir, e))?;
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        let kind = entry
            .file_type()
            .map_err(|e| Error::system("look at", &entry.path(), e))?;
        if kind.is_dir() || !is_configuration(name.strip_suffix(BACKUP).unwrap_or(&name)) {
            continue;
        }
        files.push(look(name, entry.path(), kind.is_symlink()));
    }
    files.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(files)
}

/// As Go's `filepath.Ext`: a hidden file counts.
fn is_configuration(name: &str) -> bool {
    [".conf", ".conflist", ".json"]
        .iter()
        .any(|e| name.ends_with(e))
}

fn look(name: String, path: PathBuf, is_link: bool) -> File {
    let link = if is_link {
        fs::read_link(&path).ok()
    } else {
        None
    };
    let mut file = File {
        name,
        target: path.clone(),
        path,
        link,
        content: Ok(Vec::new()),
        mode: 0o600,
        owner: (0, 0),
    };
    let read = || -> std::io::Result<(PathBuf, Vec<u8>, fs::Metadata)> {
        let target = fs::canonicalize(&file.path)?;
        // A pipe of that name must not hold us up.
        let opened = fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&target)?;
        let metadata = opened.metadata()?;
        if !metadata.is_file() {
            return Err(std::io::Error::other("not a regular file"));
        }
        let mut content = Vec::new();
        opened
            .take(MAX_BYTES as u64 + 1)
            .read_to_end(&mut content)?;
        Ok((target, content, metadata))
    };
    match read() {
        Ok((target, content, metadata)) => {
            if is_link {
                file.target = target;
            }
            file.content = Ok(content);
            file.mode = metadata.mode() & 0o7777;
            file.owner = (metadata.uid(), metadata.gid());
        }
        Err(e) => {
            file.content = Err(match &file.link {
                Some(to) => format!(
                    "{e}: it is a link to {}, which may not be visible here; in a container, mount that directory as well",
                    to.display()
                ),
                None => e.to_string(),
            });
        }
    }
    file
}

/// The configuration that pods start with, and what was passed over on the way to it, or why there is none.
#[derive(Debug)]
pub struct Active<'a> {
    /// The file.
    pub file: Option<&'a File>,
    /// Why there is none.
    pub waiting: String,
    /// Files that come earlier but are no configuration.
    pub passed: Vec<String>,
}

/// Finds the active one of `files`; `name` is what the administrator said it is.
#[must_use]
pub fn find<'a>(files: &'a [File], name: Option<&str>) -> Active<'a> {
    let mut active = Active {
        file: None,
        waiting: String::new(),
        passed: Vec::new(),
    };
    let mut theirs = files
        .iter()
        .filter(|f| !f.is_backup() && f.share() != Share::Whole);
    if let Some(name) = name {
        // We may have made the one of the other, and so may the CNI.
        let other = match name.strip_suffix("list") {
            Some(conf) if conf.ends_with(".conf") => conf.to_owned(),
            _ => format!("{name}list"),
        };
        let theirs: Vec<&File> = theirs.collect();
        let called = |n: &str| theirs.iter().find(|f| f.name == n).copied();
        active.file = called(name).or_else(|| called(&other));
        active.waiting =
            format!("there is no {name} yet, which was named as the cluster's CNI configuration");
        return active;
    }
    active.file = theirs.find(|file| match usable(file) {
        Ok(()) => true,
        Err(why) => {
            active.passed.push(format!("{}: {why}", file.name));
            false
        }
    });
    active.waiting = match &active.passed[..] {
        [] => "there is no CNI configuration yet: the cluster's CNI has not written one, or the node's container \
               runtime reads another directory than the one given to the agent (chart: hostPaths.cniConf)"
            .to_owned(),
        passed => format!(
            "there is no valid CNI configuration yet: {}",
            passed.join("; ")
        ),
    };
    active
}

/// The types of the plugins in a file, as far as there are any, ours left out.
#[must_use]
pub(super) fn types(file: &File) -> Vec<String> {
    let Ok(value) = serde_json::from_slice::<Value>(file.bytes()) else {
        return Vec::new();
    };
    let lone = std::slice::from_ref(&value);
    let plugins = value
        .get("plugins")
        .and_then(Value::as_array)
        .map_or(lone, Vec::as_slice);
    let types = plugins
        .iter()
        .filter_map(|p| p.get("type").and_then(Value::as_str));
    types.filter(|t| *t != PLUGIN).map(str::to_owned).collect()
}

/// Whether a runtime would take it. Laxer than what we edit: a configuration that runs pods but that we cannot edit is an
/// error, not a reason to look at the next one.
fn usable(file: &File) -> Result<(), String> {
    let bytes = file.content.as_ref().map_err(Clone::clone)?;
    if bytes.len() > MAX_BYTES {
        return Ok(());
    }
    // Go replaces what is not UTF-8.
    let value: Value = serde_json::from_str(&String::from_utf8_lossy(bytes)).map_err(|e| {
        if bytes.iter().all(u8::is_ascii_whitespace) {
            "it is empty".to_owned()
        } else {
            e.to_string()
        }
    })?;
    let filled = |v: &Value, key: &str| {
        v.get(key)
            .and_then(Value::as_str)
            .is_some_and(|s| !s.is_empty())
    };
    if !conflist::is_list(&file.name) {
        return match value.get("type").and_then(Value::as_str) {
            None | Some("") => Err("it has no `type`".to_owned()),
            Some(PLUGIN) => Err("it is our plugin alone".to_owned()),
            Some(_) => Ok(()),
        };
    }
    let plugins = value.get("plugins").and_then(Value::as_array);
    match plugins {
        _ if !filled(&value, "name") => Err("it has no `name`".to_owned()),
        Some(plugins) if plugins.is_empty() => Err("it has no plugins".to_owned()),
        None => Err("it has no `plugins`".to_owned()),
        Some(plugins) if !plugins.iter().all(|p| filled(p, "type")) => {
            Err("a plugin has no `type`".to_owned())
        }
        Some(plugins)
            if plugins
                .iter()
                .all(|p| p.get("type").and_then(Value::as_str) == Some(PLUGIN)) =>
        {
            Err("it has no plugin but ours".to_owned())
        }
        Some(_) => Ok(()),
    }
}
