//! Where things are in the tree. It reads the environment and nothing else.

use std::{
    env,
    path::{Path, PathBuf},
};

use crate::inputs;

/// The directories every verb works with.
pub(crate) struct Project {
    /// Top of the tree.
    pub(crate) root: PathBuf,
    /// Cargo's output directory.
    pub(crate) target: PathBuf,
}

/// How the user-space binaries are compiled.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Profile {
    Dev,
    Release,
    /// Release, without any shared library: for images, the plugin and virtual machines.
    Static,
}

impl Project {
    pub(crate) fn find() -> Self {
        let mut root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
        root.pop();
        let target = inputs::target_dir(&root);
        Self { root, target }
    }

    /// The eBPF object that `culvert` embeds.
    pub(crate) fn object(&self) -> PathBuf {
        self.target.join(inputs::OBJECT)
    }

    /// Tools that only this project needs, kept out of the user's home.
    pub(crate) fn tools(&self) -> PathBuf {
        self.target.join("tools")
    }

    /// The eBPF package, which is not part of the workspace.
    pub(crate) fn ebpf(&self) -> PathBuf {
        self.root.join("ebpf")
    }

    /// Compiler flags that keep the places of the tree and of the crates out of what is built.
    pub(crate) fn remap_flags(&self) -> Vec<String> {
        let cargo_home = env::var_os("CARGO_HOME")
            .map(PathBuf::from)
            .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cargo")));
        let crates = cargo_home.map(|home| (home, "/cargo"));
        // The last that fits wins, and either may lie in the other.
        crates
            .into_iter()
            .chain([(self.root.clone(), "/culvert")])
            .map(|(from, to)| format!("--remap-path-prefix={}={to}", from.display()))
            .collect()
    }

    /// Where the binaries of a profile end up.
    pub(crate) fn binaries(&self, profile: Profile) -> PathBuf {
        match profile {
            Profile::Dev => self.target.join("debug"),
            Profile::Release => self.target.join("release"),
            Profile::Static => self.target.join(static_triple()).join("release"),
        }
    }
}

/// The triple for static binaries. It is named even on a host of the same triple: without `--target` the flags would
/// reach build scripts and proc macros too, and those cannot be linked statically.
pub(crate) fn static_triple() -> String {
    format!("{}-unknown-linux-gnu", std::env::consts::ARCH)
}
