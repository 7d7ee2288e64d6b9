//! Cilium as a cluster's network: its objects from its own chart, its agent as a process of each node, its configuration
//! read from its ConfigMap at every start of the agent, as its DaemonSet does. There is no operator.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::api::Api;
use crate::build::copy_tree;
use crate::kubeconfig::Proof;
use crate::node::Node;
use crate::parts::Part;
use crate::plan::Plan;
use crate::tool;

const NAMESPACE: &str = "kube-system";
const CONFIG_MAP: &str = "cilium-config";
/// Where the agent finds a compiler for its programs.
const LLVM: &str = "/usr/lib/llvm-19/bin";
/// Its token outlives every cluster.
const TOKEN: Duration = Duration::from_secs(7 * 24 * 3600);

/// What of the chart is of use without the DaemonSet and the operator.
const TEMPLATES: [&str; 7] = [
    // First: roles are made in it.
    "cilium-secrets-namespace.yaml",
    "cilium-agent/clusterrole.yaml",
    "cilium-agent/clusterrolebinding.yaml",
    "cilium-agent/role.yaml",
    "cilium-agent/rolebinding.yaml",
    "cilium-agent/serviceaccount.yaml",
    "cilium-configmap.yaml",
];

/// The fast settings: no kube-proxy, routing and masquerading in BPF, and socket load balancing for the host alone,
/// without which a pod's `connect()` never sees the address of a Service.
const VALUES: [&str; 14] = [
    // Without it, Cilium puts every CNI configuration aside that is not its own, as soon as it is written.
    "cni.exclusive=false",
    "ipam.mode=kubernetes",
    "routingMode=native",
    "autoDirectNodeRoutes=true",
    "kubeProxyReplacement=true",
    "socketLB.hostNamespaceOnly=true",
    "bpf.masquerade=true",
    "ipv6.enabled=true",
    "envoy.enabled=false",
    "hubble.enabled=false",
    "l7Proxy=false",
    "healthChecking=false",
    "endpointHealthChecking.enabled=false",
    "operator.enabled=false",
];

/// What is different for a process that is not in a container.
const OVERRIDES: [(&str, &str); 6] = [
    ("procfs", "/proc"),
    (
        "write-cni-conf-when-ready",
        "/etc/cni/net.d/05-cilium.conflist",
    ),
    ("lib-dir", "/var/lib/cilium"),
    ("state-dir", "/run/cilium"),
    // The kernel module for it is not there.
    ("enable-xt-socket-fallback", "false"),
    ("cni-log-file", "/var/log/cilium-cni.log"),
];

/// Brings Cilium's objects to the API server.
pub(crate) fn install(api: &Api, plan: Plan) -> Result<()> {
    let files = files(api)?;
    // Applied, the larger ones would not fit into the annotation.
    for version in ["v2", "v2alpha1"] {
        let dir = files.join("crds").join(version);
        for entry in fs::read_dir(&dir).with_context(|| format!("reading {}", dir.display()))? {
            let path = entry.context("reading a directory")?.path();
            if path.extension().is_some_and(|kind| kind == "yaml") {
                let path = path.display().to_string();
                api.kubectl(&["create", "-f", &path])?;
            }
        }
    }
    api.apply(&manifests(api, plan, &files.join("chart"))?)
        .map(drop)
}

fn manifests(api: &Api, plan: Plan, chart: &Path) -> Result<String> {
    let version = api.kubectl(&["version", "-o", "json"])?;
    let version: serde_json::Value = serde_json::from_str(&version).context("no JSON")?;
    let version = version["serverVersion"]["gitVersion"]
        .as_str()
        .context("an API server without version")?;
    let all = plan.all_pods();
    let (v4, v6) = all.split_once(',').context("pods have two ranges")?;
    let mut helm = tool::command(api.parts().get(Part::Helm)?);
    helm.args(["template", "cilium"])
        .arg(chart)
        .args(["--namespace", NAMESPACE, "--kube-version", version])
        .args(["--set", &format!("ipv4NativeRoutingCIDR={v4}")])
        .args(["--set", &format!("ipv6NativeRoutingCIDR={v6}")]);
    for value in VALUES {
        helm.args(["--set", value]);
    }
    for template in TEMPLATES {
        helm.args(["--show-only", &format!("templates/{template}")]);
    }
    tool::run(&mut helm)
}

/// Files of a node that stay: the plugin, and the sources of the programs.
pub(crate) fn write_files(api: &Api, node: &Node) -> Result<()> {
    let bin = node.dir().join("opt/cni/bin");
    fs::create_dir_all(&bin).with_context(|| format!("making {}", bin.display()))?;
    let plugin = api.parts().get(Part::CiliumCni)?;
    fs::copy(&plugin, bin.join("cilium-cni"))
        .with_context(|| format!("copying {}", plugin.display()))?;
    copy_tree(
        &files(api)?.join("bpf"),
        &node.dir().join("var/lib/cilium/bpf"),
    )
}

/// Writes the agent's configuration anew, one file a key, and returns its command line.
pub(crate) fn command_line(api: &Api, node: &Node) -> Result<Vec<String>> {
    let agent = api.parts().get(Part::CiliumAgent)?;
    let kubeconfig = node.dir().join("cilium.kubeconfig");
    let token = kubeconfig.with_extension("token");
    fs::write(&token, api.token_for_long(NAMESPACE, "cilium", TOKEN)?)
        .with_context(|| format!("writing {}", token.display()))?;
    api.write_kubeconfig(&kubeconfig, &Proof::Token(token))?;
    let config = node.dir().join("cilium.config");
    write_config(api, &config, &kubeconfig)?;
    let path = std::env::var("PATH").unwrap_or_default();
    Ok([
        "env".to_owned(),
        format!("PATH={LLVM}:{path}"),
        format!("K8S_NODE_NAME={}", node.name()),
        format!("CILIUM_K8S_NAMESPACE={NAMESPACE}"),
        agent.display().to_string(),
        format!("--config-dir={}", config.display()),
    ]
    .into())
}

fn write_config(api: &Api, dir: &Path, kubeconfig: &Path) -> Result<()> {
    if dir.exists() {
        fs::remove_dir_all(dir).with_context(|| format!("removing {}", dir.display()))?;
    }
    fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
    let map = api
        .admin()
        .get(&["configmap", CONFIG_MAP, "-n", NAMESPACE])?;
    let data = map["data"]
        .as_object()
        .context("cilium-config without data")?;
    let own = [
        ("k8s-kubeconfig-path", kubeconfig.display().to_string()),
        (
            "cgroup-root",
            crate::apart::current()?.display().to_string(),
        ),
    ];
    let data = data
        .iter()
        .filter_map(|(key, value)| Some((key.as_str(), value.as_str()?.to_owned())))
        .chain(OVERRIDES.map(|(key, value)| (key, value.to_owned())))
        .chain(own);
    for (key, value) in data {
        let file = dir.join(key);
        fs::write(&file, value).with_context(|| format!("writing {}", file.display()))?;
    }
    Ok(())
}

/// What was copied from Cilium's module when its agent was built.
fn files(api: &Api) -> Result<PathBuf> {
    let agent = api.parts().get(Part::CiliumAgent)?;
    Ok(agent.parent().context("a path without a directory")?.into())
}
