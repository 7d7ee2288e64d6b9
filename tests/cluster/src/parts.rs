//! The programs a cluster is made of, and charts that are tested with it: which there are, where they lie, how they are built. Versions are pinned by the
//! Go modules beside this crate and nowhere else.

use std::fs::{self, File};
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use nix::fcntl::{Flock, FlockArg};

use crate::{build, place};

/// The Go module of Cilium.
pub(crate) const CILIUM: &str = "github.com/cilium/cilium";
/// The Go module of Istio.
pub(crate) const ISTIO: &str = "istio.io/istio";

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
    /// Cilium's agent, with its chart, its custom resources and the sources of its programs beside it
    CiliumAgent,
    /// Cilium's CNI plugin
    CiliumCni,
    /// Asks Cilium's agent
    CiliumDbg,
    /// Installs charts
    Helm,
    /// Runs CNI plugins by hand
    Cnitool,
    /// The cluster's name server
    Coredns,
    /// Istio's charts: a directory, of which nothing is compiled
    IstioCharts,
    /// A container runtime newer than the machine's
    Containerd,
    /// What it starts beside each pod
    ContainerdShim,
    /// A CNI plugin newer than the machine's, and so are the others
    Bridge,
    /// Gives pods addresses
    HostLocal,
    /// Brings the device `lo` up
    Loopback,
    /// Carries ports of the node to pods
    Portmap,
}

impl Part {
    /// What a cluster with Cilium needs besides.
    pub const CILIUM: [Self; 3] = [Self::CiliumAgent, Self::CiliumCni, Self::CiliumDbg];

    /// What a cluster with the newest container runtime and plugins needs besides.
    pub const NEWEST: [Self; 6] = [
        Self::Containerd,
        Self::ContainerdShim,
        Self::Bridge,
        Self::HostLocal,
        Self::Loopback,
        Self::Portmap,
    ];

    /// All parts but Cilium's and the newest runtime's, in the order in which they are of use.
    pub const ALL: [Self; 10] = [
        Self::Etcd,
        Self::KubeApiserver,
        Self::KubeControllerManager,
        Self::KubeScheduler,
        Self::Kubelet,
        Self::KubeProxy,
        Self::Helm,
        Self::Cnitool,
        Self::Coredns,
        Self::IstioCharts,
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
            Self::CiliumAgent => "cilium-agent",
            Self::CiliumCni => "cilium-cni",
            Self::CiliumDbg => "cilium-dbg",
            Self::Helm => "helm",
            Self::Cnitool => "cnitool",
            Self::Coredns => "coredns",
            Self::IstioCharts => "charts",
            Self::Containerd => "containerd",
            Self::ContainerdShim => "containerd-shim-runc-v2",
            Self::Bridge => "bridge",
            Self::HostLocal => "host-local",
            Self::Loopback => "loopback",
            Self::Portmap => "portmap",
        }
    }

    /// The folder of the Go module that pins it, the module whose version it has, and its package there.
    pub(crate) fn pin(self) -> (&'static str, &'static str, String) {
        let cilium = |package: &str| ("cilium", CILIUM, package.to_owned());
        let plugin = |kind: &str| {
            let package = format!("/plugins/{kind}/{}", self.name());
            ("plugins", "github.com/containernetworking/plugins", package)
        };
        match self {
            Self::CiliumAgent => cilium("/daemon"),
            Self::CiliumCni => cilium("/plugins/cilium-cni"),
            Self::CiliumDbg => cilium("/cilium-dbg"),
            Self::IstioCharts => ("istio", ISTIO, String::new()),
            Self::Etcd => ("etcd", "go.etcd.io/etcd/server/v3", String::new()),
            Self::Helm => ("tools", "helm.sh/helm/v3", "/cmd/helm".to_owned()),
            Self::Cnitool => (
                "tools",
                "github.com/containernetworking/cni",
                "/cnitool".to_owned(),
            ),
            Self::Coredns => ("tools", "github.com/coredns/coredns", String::new()),
            Self::Containerd | Self::ContainerdShim => (
                "containerd",
                "github.com/containerd/containerd/v2",
                format!("/cmd/{}", self.name()),
            ),
            Self::Bridge | Self::Loopback => plugin("main"),
            Self::HostLocal => plugin("ipam"),
            Self::Portmap => plugin("meta"),
            _ => (
                "kubernetes",
                "k8s.io/kubernetes",
                format!("/cmd/{}", self.name()),
            ),
        }
    }

    /// Programs of one module lie together; all others alone.
    pub(crate) fn folder(self) -> &'static str {
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
        if !path.exists() {
            bail!(
                "{} is not there: build it with `cargo xtask cluster build{}` (minutes, once), or point \
                 CULVERT_CLUSTER_DIR at a directory that has it",
                path.display(),
                if Part::CILIUM.contains(&part) {
                    " --cilium"
                } else if Part::NEWEST.contains(&part) {
                    " --newest"
                } else {
                    ""
                }
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
            if !self.path(*part)?.exists() {
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
            if !self.path(part)?.exists() {
                build::one(part, &self.path(part)?)
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
}

pub(crate) fn go_mod(part: Part) -> PathBuf {
    let (folder, ..) = part.pin();
    place::root()
        .join("tests/cluster/go")
        .join(folder)
        .join("go.mod")
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
        let others = Part::CILIUM.into_iter().chain(Part::NEWEST);
        for part in Part::ALL.into_iter().chain(others) {
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
}
