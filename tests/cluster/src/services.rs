//! What runs on a node: containerd, kubelet, kube-proxy. Their files and command lines; when they start and stop is
//! decided in [`cluster`](crate::cluster).

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::api::Api;
use crate::cluster::Cni;
use crate::kubeconfig::Proof;
use crate::node::Node;
use crate::parts::Part;
use crate::{cilium, image};

/// Where containerd listens, on every node.
const CONTAINERD: &str = "/run/containerd/containerd.sock";
/// The name server's address, should there be one.
const DNS: &str = "10.96.0.10";
/// Starts a program again and again; killed with it, because both are one process group.
const AGAIN: &str =
    r#"while :; do "$@"; echo "ended with $?, to be started again"; sleep 0.5; done"#;
/// Plugins that the bridge network needs; every network needs `loopback`.
const PLUGINS: [&str; 5] = ["bridge", "host-local", "loopback", "portmap", "ptp"];
const PLUGINS_FROM: &str = "/usr/lib/cni";

/// A program of a node that can be stopped and started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Service {
    /// The container runtime; containers outlive it
    Containerd,
    /// Runs pods; they outlive it
    Kubelet,
    /// Carries traffic to Services; what it has set up outlives it
    KubeProxy,
    /// Cilium's agent; it reads the ConfigMap `cilium-config` anew when it starts, and what it has loaded outlives it
    Cilium,
}

impl Service {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Containerd => "containerd",
            Self::Kubelet => "kubelet",
            Self::KubeProxy => "kube-proxy",
            Self::Cilium => "cilium-agent",
        }
    }

    /// Whether it is started again when it ends by itself, as a real node's service manager does: a kubelet ends when it
    /// finds no container runtime at its start.
    pub(crate) fn restarts(self) -> bool {
        self != Self::Containerd
    }

    /// Its command line, in the node.
    pub(crate) fn command_line(self, api: &Api, node: &Node, cni: Cni) -> Result<Vec<String>> {
        let mut line = self.program_line(api, node, cni)?;
        if self.restarts() {
            let again = ["setsid", "sh", "-c", AGAIN, self.name()];
            line.splice(..0, again.map(str::to_owned));
        }
        Ok(line)
    }

    fn program_line(self, api: &Api, node: &Node, cni: Cni) -> Result<Vec<String>> {
        let file = |name: &str| node.dir().join(name).display().to_string();
        let program = |part| -> Result<String> { Ok(api.parts().get(part)?.display().to_string()) };
        Ok(match self {
            Self::Cilium => cilium::command_line(api, node)?,
            Self::Containerd => {
                let config = "--config=/etc/containerd/config.toml".to_owned();
                match cni {
                    Cni::Newest => newest_containerd(&program(Part::Containerd)?, config),
                    Cni::Bridge | Cni::Cilium | Cni::None => vec!["containerd".to_owned(), config],
                }
            }
            Self::Kubelet => {
                let (v4, v6) = node.addresses();
                vec![
                    program(Part::Kubelet)?,
                    format!("--config={}", file("kubelet.json")),
                    format!("--kubeconfig={}", file("kubelet.kubeconfig")),
                    format!("--hostname-override={}", node.name()),
                    format!("--node-ip={v4},{v6}"),
                ]
            }
            Self::KubeProxy => vec![
                program(Part::KubeProxy)?,
                format!("--config={}", file("kube-proxy.json")),
                format!("--hostname-override={}", node.name()),
            ],
        })
    }
}

/// What it starts beside each pod has to be of its version, and it looks for that on PATH first.
fn newest_containerd(program: &str, config: String) -> Vec<String> {
    let dir = Path::new(program).parent().unwrap_or(Path::new("/"));
    let path = format!("PATH={}:/usr/sbin:/usr/bin:/sbin:/bin", dir.display());
    vec!["env".to_owned(), path, program.to_owned(), config]
}

/// Writes all files that the services of a node read.
pub(crate) fn write_files(api: &Api, node: &Node) -> Result<()> {
    let dir = node.dir();
    write(
        &dir.join("etc/containerd/config.toml"),
        &containerd_config(),
    )?;
    kubelet_files(api, node)?;
    proxy_files(api, node)
}

/// Debian's plugins, or the newest, where the node's container runtime looks for them.
pub(crate) fn copy_plugins(api: &Api, node: &Node, cni: Cni) -> Result<()> {
    let bin = node.dir().join("opt/cni/bin");
    fs::create_dir_all(&bin).with_context(|| format!("making {}", bin.display()))?;
    let newest = Part::NEWEST.iter().filter(|_| cni == Cni::Newest);
    for plugin in PLUGINS {
        let from = match newest.clone().find(|part| part.name() == plugin) {
            Some(part) => api.parts().get(*part)?,
            None => Path::new(PLUGINS_FROM).join(plugin),
        };
        // Copies: whoever installs plugins on the node must not change the machine's.
        fs::copy(&from, bin.join(plugin)).with_context(|| {
            format!(
                "copying {}: install the package containernetworking-plugins",
                from.display()
            )
        })?;
    }
    Ok(())
}

/// The network of the bridge plugin.
pub(crate) fn write_bridge_network(node: &Node) -> Result<()> {
    let [v4, v6] = node.pod_ranges();
    let list = json!({
        "cniVersion": "1.0.0",
        "name": "bridge",
        "plugins": [
            {
                "type": "bridge",
                "bridge": "cni0",
                "isGateway": true,
                "hairpinMode": true,
                "ipam": {
                    "type": "host-local",
                    "ranges": [[{"subnet": v4}], [{"subnet": v6}]],
                    "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    });
    write(
        &node.dir().join("etc/cni/net.d/10-bridge.conflist"),
        &format!("{list:#}\n"),
    )
}

fn containerd_config() -> String {
    format!(
        r#"version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs", "io.containerd.internal.v1.opt", "io.containerd.internal.v1.tracing", "io.containerd.tracing.processor.v1.otlp"]

[grpc]
address = "{CONTAINERD}"

[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{}"
# Without CAP_SYS_RESOURCE a lower oom_score_adj is refused, and every sandbox would die.
restrict_oom_score_adj = true

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/opt/cni/bin"
conf_dir = "/etc/cni/net.d"
"#,
        image::PAUSE
    )
}

fn kubelet_files(api: &Api, node: &Node) -> Result<()> {
    let dir = node.dir();
    let (v4, v6) = node.addresses();
    let sans = [node.name(), v4.to_string(), v6.to_string()];
    let name = format!("system:node:{}", node.name());
    let pair = api
        .pki()
        .issue(&node.name(), &name, "system:nodes", &sans)?;
    let config = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": api.ca()},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": pair.certificate,
        "tlsPrivateKeyFile": pair.key,
        "containerRuntimeEndpoint": format!("unix://{CONTAINERD}"),
        "clusterDomain": "cluster.local",
        "clusterDNS": [DNS],
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": format!("/{}", node.cgroup()),
        "failCgroupV1": false,
        "failSwapOn": false,
        "enforceNodeAllocatable": [],
        // The machine's disk is not the node's to judge.
        "evictionHard": {"memory.available": "50Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "maxPods": 250,
        "nodeStatusUpdateFrequency": "5s",
        "serializeImagePulls": false,
    });
    write(&dir.join("kubelet.json"), &format!("{config:#}\n"))?;
    api.write_kubeconfig(&dir.join("kubelet.kubeconfig"), &Proof::Certificate(pair))
}

fn proxy_files(api: &Api, node: &Node) -> Result<()> {
    let dir = node.dir();
    let file = format!("{}-proxy", node.name());
    let pair = api.pki().issue(&file, "system:kube-proxy", "", &[])?;
    let kubeconfig = dir.join("kube-proxy.kubeconfig");
    api.write_kubeconfig(&kubeconfig, &Proof::Certificate(pair))?;
    let config = json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "clientConnection": {"kubeconfig": kubeconfig},
        "clusterCIDR": node.plan.all_pods(),
        // These belong to the machine, not to a network namespace.
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpCloseWaitTimeout": "0s", "tcpEstablishedTimeout": "0s"},
    });
    write(&dir.join("kube-proxy.json"), &format!("{config:#}\n"))
}

fn write(path: &PathBuf, text: &str) -> Result<()> {
    let dir = path.parent().unwrap_or(path);
    fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
    fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}
