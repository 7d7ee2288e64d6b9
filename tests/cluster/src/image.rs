//! Images made of files of this machine, without a registry, as `ctr images import` takes them. The caller says which files;
//! it builds and runs nothing.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use culvert_oci::Layer;

use crate::tool;

/// The image of every pod's sandbox.
pub(crate) const PAUSE: &str = "culvert.test/pause:1";
/// The image that tests use: a shell and the usual tools in one static binary.
pub const BUSYBOX: &str = "culvert.test/busybox:1";

/// What goes into an image.
#[derive(Debug, Clone, Default)]
pub struct Image {
    name: String,
    files: Vec<(String, PathBuf)>,
    links: Vec<(String, String)>,
    entrypoint: Vec<String>,
}

impl Image {
    /// An empty image called `name`, with a tag.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            ..Self::default()
        }
    }

    /// Adds a program with the libraries that it is linked to.
    ///
    /// # Errors
    /// When it is not there, or one of its libraries is not.
    pub fn program(mut self, path: &str, from: impl Into<PathBuf>) -> Result<Self> {
        let from = from.into();
        for library in libraries(&from)? {
            let path = relative(&library);
            if self.files.iter().all(|(there, _)| *there != path) {
                self.files.push((path, library.into()));
            }
        }
        self.files.push((relative(path), from));
        Ok(self)
    }

    /// Adds a symbolic link.
    #[must_use]
    pub fn link(mut self, path: &str, target: &str) -> Self {
        self.links.push((relative(path), target.to_owned()));
        self
    }

    /// What a container runs unless its pod says otherwise.
    #[must_use]
    pub fn entrypoint(mut self, words: &[&str]) -> Self {
        self.entrypoint = words.iter().map(|word| (*word).to_owned()).collect();
        self
    }

    /// Writes it as a tar.
    ///
    /// # Errors
    /// When a file cannot be read or written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let mut layer = Layer::default();
        for (path, from) in &self.files {
            let content = fs::read(from).with_context(|| format!("reading {}", from.display()))?;
            layer.file(path, 0o755, content);
        }
        for (path, target) in &self.links {
            layer.link(path, target);
        }
        layer.directory("tmp", 0o1777);
        for dir in ["proc", "sys", "dev", "etc"] {
            layer.directory(dir, 0o755);
        }
        let image = culvert_oci::Image {
            name: self.name.clone(),
            entrypoint: self.entrypoint.clone(),
            environment: vec!["PATH=/bin:/sbin:/usr/bin:/usr/sbin".to_owned()],
            layer,
            ..culvert_oci::Image::default()
        };
        image.write(path).map(drop)
    }
}

/// The images that every cluster has.
pub(crate) fn basic(dir: &Path) -> Result<Vec<PathBuf>> {
    let busybox = installed("busybox", "busybox-static")?;
    // busybox does all but look names up: linked statically, it crashes when it tries, and with addresses too.
    let mut tools = Image::new(BUSYBOX)
        .program("bin/busybox", &busybox)?
        .program("bin/curl", installed("curl", "curl")?)?
        .entrypoint(&["/bin/sh"]);
    for applet in APPLETS {
        tools = tools.link(&format!("bin/{applet}"), "busybox");
    }
    let pause = Image::new(PAUSE)
        .program("bin/busybox", &busybox)?
        .entrypoint(&["/bin/busybox", "sleep", "2147483647"]);
    fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
    [("busybox.tar", tools), ("pause.tar", pause)]
        .into_iter()
        .map(|(file, image)| {
            let path = dir.join(file);
            image.write(&path)?;
            Ok(path)
        })
        .collect()
}

fn installed(program: &str, package: &str) -> Result<PathBuf> {
    ["/bin", "/usr/bin"]
        .into_iter()
        .map(|dir| Path::new(dir).join(program))
        .find(|path| path.is_file())
        .with_context(|| format!("no {program}: install the package {package}"))
}

/// What a program is linked to; nothing for a static one.
fn libraries(program: &Path) -> Result<Vec<String>> {
    ensure!(
        program.is_file(),
        "{} is no file: build or install it",
        program.display()
    );
    let output = tool::command("ldd")
        .arg(program)
        .output()
        .context("starting ldd")?;
    libraries_in(&String::from_utf8_lossy(&output.stdout))
        .with_context(|| format!("the libraries of {}", program.display()))
}

fn libraries_in(text: &str) -> Result<Vec<String>> {
    text.lines()
        .filter(|line| line.contains(" (0x") || line.contains("not found"))
        .filter(|line| !line.contains("linux-vdso"))
        .map(|line| {
            let path = line.split(" => ").last().unwrap_or(line);
            let path = path.split_whitespace().next().unwrap_or_default();
            ensure!(path.starts_with('/'), "{}: install it", line.trim());
            Ok(path.to_owned())
        })
        .collect()
}

fn relative(path: &str) -> String {
    path.trim_start_matches('/').to_owned()
}

/// The names under which busybox is what tests use.
const APPLETS: [&str; 47] = [
    "awk", "basename", "cat", "chmod", "cp", "cut", "date", "dd", "dirname", "echo", "env", "expr",
    "false", "find", "grep", "head", "hostname", "httpd", "id", "ifconfig", "ip", "kill", "ln",
    "ls", "mkdir", "mv", "nc", "netstat", "nslookup", "ping", "printf", "ps", "pwd", "rm", "sed",
    "seq", "sh", "sleep", "sort", "tail", "tee", "test", "touch", "tr", "true", "wc", "wget",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_read_as_ldd_prints_them() {
        let text = "\tlinux-vdso.so.1 (0x00007ffc)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        assert_eq!(
            libraries_in(text).unwrap(),
            [
                "/lib/x86_64-linux-gnu/libc.so.6",
                "/lib64/ld-linux-x86-64.so.2"
            ]
        );
        assert!(
            libraries_in("\tnot a dynamic executable\n")
                .unwrap()
                .is_empty()
        );
        assert!(libraries_in("\tlibx.so => not found\n").is_err());
    }
}
