//! A container runtime on a governed node: sandboxes get their network from Debian's `bridge`, and then the real plugin
//! asks the real agent about them.
//!
//! Asserts nothing; what a pod does in its sandbox is up to the test.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;

use anyhow::{Context as _, Result};
use culvert_lab::{Lab, Ns, plugin_binary};
use serde_json::{Value, json};

use crate::{
    LONG,
    cni::{Attachment, DEBIAN_PLUGINS, Network},
    governed::{Governed, NAMESPACE},
};

/// The interface that sandboxes get.
const IFNAME: &str = "eth0";
/// The bridge they are joined to on the node, which routes between it and the lab's own.
pub const BRIDGE: &str = "cni0";
/// What a pod says first of all, and what must not be seen on the wire.
pub const FIRST_WORDS: &[u8] = b"the first words of a pod";

/// The network that pods are added to.
#[derive(Debug)]
pub struct Runtime {
    network: Network,
}

/// A pod's sandbox, before, while and after it has a network.
#[derive(Debug)]
pub struct Sandbox {
    /// Its network namespace.
    pub ns: Ns,
    container: String,
    args: String,
}

impl Runtime {
    /// Sandboxes get an interface and addresses first; the plugin may take this long.
    pub fn chained(node: &Governed, budget_seconds: u64) -> Result<Self> {
        let bridge = json!({
            "type": "bridge",
            "bridge": BRIDGE,
            "isGateway": true,
            "ipam": {
                "type": "host-local",
                "dataDir": node.lab.scratch().join("ipam"),
                "ranges": [[{"subnet": "10.66.0.0/24"}], [{"subnet": "fd66::/64"}]],
                "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
            },
        });
        Self::of("1.0.0", &[bridge, plugin(node, budget_seconds)])
    }

    /// The plugin is alone, for what Debian's other plugins are too old for.
    pub fn alone(node: &Governed, budget_seconds: u64) -> Result<Self> {
        Self::of("1.1.0", &[plugin(node, budget_seconds)])
    }

    fn of(version: &str, plugins: &[Value]) -> Result<Self> {
        let list = json!({"cniVersion": version, "name": "podnet", "plugins": plugins});
        let ours = plugin_binary()?;
        let ours = ours.parent().context("a binary is in a directory")?;
        let network = Network::new(&list, &[Path::new(DEBIAN_PLUGINS), ours])?;
        Ok(Self { network })
    }

    /// The network itself.
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// ADD: the pod may start once this has worked.
    pub fn add(&self, node: &Governed, sandbox: &Sandbox) -> Result<Value> {
        self.network.add(node.lab.node(), &sandbox.attachment())
    }

    /// CHECK with the result of the ADD.
    pub fn check(&self, node: &Governed, sandbox: &Sandbox, result: &Value) -> Result<()> {
        let attachment = sandbox.attachment();
        self.network.check(node.lab.node(), &attachment, result)
    }

    /// DEL.
    pub fn del(&self, node: &Governed, sandbox: &Sandbox) -> Result<()> {
        self.network
            .del(node.lab.node(), &sandbox.attachment(), None)
    }

    /// DEL, and the namespace goes.
    pub fn remove(&self, node: &Governed, sandbox: Sandbox) -> Result<()> {
        self.del(node, &sandbox)?;
        node.lab.delete(sandbox.ns)
    }
}

impl Sandbox {
    /// A sandbox without a network, for a pod of [`NAMESPACE`] whose UID is its name.
    pub fn new(lab: &Lab, container: &str, pod: &str) -> Result<Self> {
        let ns = lab.pod_builder(container).no_interface().build()?;
        Ok(Self::around(ns, container, NAMESPACE, pod))
    }

    /// For a namespace that is there already.
    pub fn around(ns: Ns, container: &str, namespace: &str, pod: &str) -> Self {
        let args = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={pod};K8S_POD_UID={pod};\
             K8S_POD_INFRA_CONTAINER_ID={container}"
        );
        Self {
            ns,
            container: container.to_owned(),
            args,
        }
    }

    /// The runtime's name for it, and its interface's.
    pub fn name(&self) -> (&str, &'static str) {
        (&self.container, IFNAME)
    }

    /// As the runtime hands it to plugins.
    pub fn attachment(&self) -> Attachment<'_> {
        Attachment {
            container: &self.container,
            netns: Some(self.ns.path()),
            ifname: IFNAME,
            args: &self.args,
        }
    }
}

/// The first thing a pod does: connect, and say [`FIRST_WORDS`].
pub fn first_act(pod: &Ns, to: SocketAddr) -> Result<()> {
    pod.run(|| {
        let mut stream = TcpStream::connect_timeout(&to, LONG)?;
        stream.set_read_timeout(Some(LONG))?;
        stream.write_all(FIRST_WORDS)?;
        let mut answer = vec![0; FIRST_WORDS.len()];
        stream.read_exact(&mut answer)
    })
    .with_context(|| format!("{} to {to}", pod.name()))
}

fn plugin(node: &Governed, budget_seconds: u64) -> Value {
    json!({
        "type": "culvert-cni",
        "socket": node.options.socket(),
        "logFile": node.lab.scratch().join("cni.log"),
        "decisionFile": node.options.decisions(),
        "excludedNamespaces": ["kube-system"],
        "budgetSeconds": budget_seconds,
    })
}
