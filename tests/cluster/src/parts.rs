//! The programs a cluster is made of: which there are, where they lie, how they are built. Versions are pinned by the
//! Go modules beside this crate and nowhere else.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::fcntl::{Flock, FlockArg};

use crate::place;

/// How often a build that takes minutes says that it goes on.
const PROGRESS: Duration = Duration::from_secs(10);

/// A program built from a Go module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The API server's database
    Etcd,
    /// The API server
    KubeApiserver,
    /// Deployments, DaemonSets, service accounts, ...
    KubeControllerManager,
    /// Gives pods a node
    KubeScheduler,
    /// Runs a node's pods
    Kubelet,
    /// Carries traffic to Services
    KubeProxy,
    /// Installs charts
    Helm,
    /// Runs CNI plugins by hand
    Cnitool,
    /// The cluster's name server
    Coredns,
}

impl Part {
    /// All parts, in the order in which they are of use.
    pub const ALL: [Self; 9] = [
        Self::Etcd,
        Self::KubeApiserver,
        Self::KubeControllerManager,
        Self::KubeScheduler,
        Self::Kubelet,
        Self::KubeProxy,
        Self::Helm,
        Self::Cnitool,
        Self::Coredns,
    ];

    /// What a [`ControlPlane`](crate::ControlPlane) consists of.
    pub const CONTROL_PLANE: [Self; 2] = [Self::Etcd, Self::KubeApiserver];

    /// What the program is called.
    pub fn name(self) -> &'static str {
        match self {
            Self::Etcd => "etcd",
            Self::KubeApiserver => "kube-apiserver",
            Self::KubeControllerManager => "kube-controller-manager",
            Self::KubeScheduler => "kube-scheduler",
            Self::Kubelet => "kubelet",
            Self::KubeProxy => "kube-proxy",
            Self::Helm => "helm",
            Self::Cnitool => "cnitool",
            Self::Coredns => "coredns",
        }
    }

    /// The folder of the Go module that pins it, the module whose version it has, and its package there.
    fn pin(self) -> (&'static str, &'static str, String) {
        match self {
            Self::Etcd => ("etcd", "go.etcd.io/etcd/server/v3", String::new()),
            Self::Helm => ("tools", "helm.sh/helm/v3", "/cmd/helm".to_owned()),
            Self::Cnitool => (
                "tools",
                "github.com/containernetworking/cni",
                "/cnitool".to_owned(),
            ),
            Self::Coredns => ("tools", "github.com/coredns/coredns", String::new()),
            _ => (
                "kubernetes",
                "k8s.io/kubernetes",
                format!("/cmd/{}", self.name()),
            ),
        }
    }

    /// Programs of one module lie together; all others alone.
    fn folder(self) -> &'static str {
        let (folder, ..) = self.pin();
        if folder == "tools" {
            self.name()
        } else {
            folder
        }
    }
}

/// The programs of the pinned versions.
#[derive(Debug)]
pub struct Parts {
    bin: PathBuf,
}

impl Parts {
    /// Looks for them below the cluster directory.
    ///
    /// # Errors
    /// When that directory cannot be made.
    pub fn find() -> Result<Self> {
        Ok(Self {
            bin: place::cluster_dir()?.join("bin"),
        })
    }

    /// A program that is there.
    ///
    /// # Errors
    /// When it has not been built; the error says how to.
    pub fn get(&self, part: Part) -> Result<PathBuf> {
        let path = self.path(part)?;
        if !path.is_file() {
            bail!(
                "{} is not there: build it with `cargo xtask cluster build` (minutes, once), or point \
                 CULVERT_CLUSTER_DIR at a directory that has it",
                path.display()
            );
        }
        Ok(path)
    }

    /// Builds what is not there. Says on stderr what it does and that it goes on.
    ///
    /// # Errors
    /// When Go is missing or a build fails.
    pub fn build(&self, parts: &[Part]) -> Result<()> {
        fs::create_dir_all(&self.bin).with_context(|| format!("making {}", self.bin.display()))?;
        let mut missing = Vec::new();
        for part in parts {
            if !self.path(*part)?.is_file() {
                missing.push(*part);
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
        let names: Vec<_> = missing.iter().map(|part| part.name()).collect();
        eprintln!(
            "building {} from Go modules, once; a clean build of all of Kubernetes takes a quarter of an hour on two \
             processors",
            names.join(", ")
        );
        // Two builds side by side would do all the work twice.
        let lock = File::create(self.bin.join("lock")).context("making a lock")?;
        let _lock = Flock::lock(lock, FlockArg::LockExclusive)
            .map_err(|(_, error)| error)
            .context("waiting for another build")?;
        for part in missing {
            // Another build may have made it meanwhile.
            if !self.path(part)?.is_file() {
                self.build_one(part)
                    .with_context(|| format!("building {}", part.name()))?;
            }
        }
        Ok(())
    }

    fn path(&self, part: Part) -> Result<PathBuf> {
        let (_, module, _) = part.pin();
        let pins = fs::read_to_string(go_mod(part)).context("reading a pin")?;
        let version = version_in(&pins, module)
            .with_context(|| format!("{} requires no {module}", go_mod(part).display()))?;
        Ok(self
            .bin
            .join(format!("{}-{version}", part.folder()))
            .join(part.name()))
    }

    #[expect(clippy::disallowed_methods, reason = "the programs are Go's to build")]
    fn build_one(&self, part: Part) -> Result<()> {
        let path = self.path(part)?;
        let dir = path.parent().context("a path without a directory")?;
        fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
        let temporary = path.with_extension("new");
        let (_, module, package) = part.pin();
        let version = dir
            .file_name()
            .and_then(|name| name.to_str()?.split_once("-v"))
            .map_or("", |(_, version)| version);
        let go = go_mod(part);
        let mut child = Command::new("go")
            .current_dir(go.parent().unwrap_or(Path::new(".")))
            .args(["build", "-v", "-trimpath", "-buildvcs=false", "-ldflags"])
            .arg(linker_flags(part, version))
            .arg("-o")
            .arg(&temporary)
            .arg(format!("{module}{package}"))
            .env("CGO_ENABLED", "0")
            .env_remove("GOFLAGS")
            .stderr(Stdio::piped())
            .spawn()
            .context("starting `go`: install Go 1.26 or newer and put it on PATH")?;
        let (started, mut said, mut count) = (Instant::now(), Instant::now(), 0_u32);
        let mut tail = Vec::new();
        for line in BufReader::new(child.stderr.take().context("no stderr")?).lines() {
            let line = line.context("reading what go says")?;
            count += 1;
            if said.elapsed() >= PROGRESS {
                said = Instant::now();
                let seconds = started.elapsed().as_secs();
                eprintln!("  {}: {seconds} s, {count} packages, {line}", part.name());
            }
            tail.push(line);
            if tail.len() > 20 {
                tail.remove(0);
            }
        }
        let status = child.wait().context("waiting for go")?;
        if !status.success() {
            bail!("go build: {status}\n{}", tail.join("\n"));
        }
        // Whoever sees the file sees all of it.
        fs::rename(&temporary, &path).with_context(|| format!("making {}", path.display()))?;
        eprintln!(
            "  {}: built in {} s",
            part.name(),
            started.elapsed().as_secs()
        );
        Ok(())
    }
}

fn go_mod(part: Part) -> PathBuf {
    let (folder, ..) = part.pin();
    place::root()
        .join("tests/cluster/go")
        .join(folder)
        .join("go.mod")
}

/// Kubernetes' programs do not know their version unless they are told when they are linked; clients ask for it.
fn linker_flags(part: Part, version: &str) -> String {
    let mut flags = "-s -w".to_owned();
    if part.folder() == "kubernetes" {
        let mut numbers = version.split('.');
        for (key, value) in [
            ("gitVersion", format!("v{version}")),
            ("gitMajor", numbers.next().unwrap_or_default().to_owned()),
            ("gitMinor", numbers.next().unwrap_or_default().to_owned()),
            ("gitTreeState", "clean".to_owned()),
        ] {
            flags += &format!(" -X k8s.io/component-base/version.{key}={value}");
        }
    }
    flags
}

/// The version that a go.mod requires of a module.
fn version_in<'a>(go_mod: &'a str, module: &str) -> Option<&'a str> {
    go_mod.lines().find_map(|line| {
        let line = line.trim().strip_prefix("require ").unwrap_or(line.trim());
        let version = line.strip_prefix(module)?.strip_prefix(' ')?;
        version
            .split(' ')
            .next()
            .filter(|version| version.starts_with('v'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_has_a_pin() {
        let parts = Parts { bin: "/b".into() };
        for part in Part::ALL {
            let path = parts.path(part).unwrap();
            assert!(path.ends_with(part.name()), "{}", path.display());
            assert!(path.to_string_lossy().contains("-v"), "{}", path.display());
        }
    }

    #[test]
    fn a_version_is_that_of_the_very_module() {
        let text = "require k8s.io/kubernetes v1.36.3\nreplace (\n\tk8s.io/api => k8s.io/api v0.36.3\n)\n\
                    require (\n\thelm.sh/helm/v3 v3.22.0 // indirect\n\tk8s.io/api v0.0.0\n)\n";
        assert_eq!(version_in(text, "k8s.io/kubernetes"), Some("v1.36.3"));
        assert_eq!(version_in(text, "helm.sh/helm/v3"), Some("v3.22.0"));
        assert_eq!(version_in(text, "k8s.io/api"), Some("v0.0.0"));
        assert_eq!(version_in(text, "k8s.io"), None);
    }

    #[test]
    fn kubernetes_is_told_its_version() {
        let flags = linker_flags(Part::Kubelet, "1.36.3");
        assert!(
            flags.contains("gitVersion=v1.36.3 ") && flags.contains("gitMinor=36 "),
            "{flags}"
        );
        assert_eq!(linker_flags(Part::Etcd, "3.7.3"), "-s -w");
    }
}
