//! A node's two directories for one test, and an installer for them.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "test code: a step that fails is a test that fails"
)]
#![allow(
    dead_code,
    clippy::allow_attributes,
    reason = "each test file uses its own part of this"
)]

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use culvert::install::{Entry, Installer, Mode, Options, PLUGIN};

/// An entry of our plugin with these keys.
pub(crate) fn entry(keys: &[(&str, serde_json::Value)]) -> Entry {
    let mut entry = Entry::new();
    entry.insert("type".to_owned(), PLUGIN.into());
    entry.extend(keys.iter().map(|(k, v)| ((*k).to_owned(), v.clone())));
    entry
}

pub(crate) struct Scratch {
    pub(crate) root: PathBuf,
}

impl Scratch {
    pub(crate) fn new(name: &str) -> Self {
        let root =
            std::env::temp_dir().join(format!("culvert-install-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&root);
        for dir in ["bin", "net.d", "image"] {
            fs::create_dir_all(root.join(dir)).unwrap();
        }
        let scratch = Self { root };
        scratch.plugin("#!/bin/sh\necho one\n");
        scratch
    }

    /// The program that the image brings.
    pub(crate) fn plugin(&self, content: &str) {
        let path = self.root.join("image").join(PLUGIN);
        fs::write(&path, content).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    pub(crate) fn conf(&self, name: &str) -> PathBuf {
        self.root.join("net.d").join(name)
    }

    pub(crate) fn put(&self, name: &str, content: impl AsRef<[u8]>) {
        fs::write(self.conf(name), content).unwrap();
    }

    /// One of the real configurations beside this file.
    pub(crate) fn put_real(&self, fixture: &str) -> String {
        let from = only_file(&fixtures().join(fixture));
        let name = from.file_name().unwrap().to_str().unwrap().to_owned();
        self.put(&name, fs::read(from).unwrap());
        name
    }

    pub(crate) fn read(&self, name: &str) -> String {
        fs::read_to_string(self.conf(name)).unwrap()
    }

    pub(crate) fn mode(&self, name: &str) -> u32 {
        fs::metadata(self.conf(name)).unwrap().mode() & 0o7777
    }

    pub(crate) fn options(&self, mode: Mode) -> Options {
        Options {
            bin_dir: self.root.join("bin"),
            conf_dir: self.root.join("net.d"),
            plugin: self.root.join("image").join(PLUGIN),
            mode,
            conf_name: None,
            own_name: None,
            group_read: false,
            entry: entry(&[
                ("socket", "/run/culvert/agent.sock".into()),
                ("excludedNamespaces", serde_json::json!(["kube-system"])),
            ]),
        }
    }

    pub(crate) fn installer(&self, mode: Mode) -> Installer {
        Installer::new(self.options(mode))
    }

    /// Every file in the two directories: content and mode.
    pub(crate) fn picture(&self) -> BTreeMap<String, (Vec<u8>, u32)> {
        let mut all = BTreeMap::new();
        for dir in ["bin", "net.d"] {
            for e in fs::read_dir(self.root.join(dir)).unwrap() {
                let e = e.unwrap();
                let name = format!("{dir}/{}", e.file_name().to_str().unwrap());
                let mode = e.metadata().unwrap().mode() & 0o7777;
                all.insert(name, (fs::read(e.path()).unwrap_or_default(), mode));
            }
        }
        all
    }

    /// Plans and applies until nothing is left to do; how often something was.
    pub(crate) fn settle(&self, installer: &Installer) -> usize {
        for round in 0..5 {
            let plan = installer.plan().unwrap();
            assert_eq!(plan.waiting, None);
            if plan.is_done() {
                return round;
            }
            installer.apply(&plan).unwrap();
        }
        panic!("never done: {:#?}", installer.plan().unwrap());
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.root);
    }
}

pub(crate) fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/conflists")
}

pub(crate) fn only_file(dir: &Path) -> PathBuf {
    let files = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    let mut files: Vec<PathBuf> = files
        .filter(|p| p.extension().is_none_or(|e| e != "golden"))
        .collect();
    assert_eq!(files.len(), 1, "{}", dir.display());
    files.remove(0)
}
