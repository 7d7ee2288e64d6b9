//! Culvert and a stand-in ztunnel on a cluster, for tests of what both do to pods: Culvert as `cargo xtask image` and
//! `deploy/base` have it, the stand-in from this build, peers that reach each other by HBONE, and what each ztunnel has
//! counted. It judges nothing.

use std::fs;
use std::io::Read as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::{Map, Value, json};

use crate::build::copy_tree;
use crate::built::{binary, culvert_image};
use crate::cluster::{Cluster, Cni};
use crate::image::Image;
use crate::node::Node;
use crate::{evidence, place, tool};

const ZTUNNEL: &str = include_str!("ztunnel.yaml");
/// Where a node's ztunnel has its files, on that node.
const FILES: &str = "var/lib/ztunnel";
/// On which clusters this process has installed both, and what Culvert's DaemonSet is to be like there.
static INSTALLED: Mutex<Vec<(PathBuf, Value)>> = Mutex::new(Vec::new());
const ANSWER: Duration = Duration::from_secs(30);
/// Generous: the machine may be busy with other things.
const ROLLOUT: Duration = Duration::from_secs(180);

/// One at a time tells ztunnels of peers.
static TELLING: Mutex<()> = Mutex::new(());

/// The label of pods that are spoken to in the mesh alone, when its value is `yes`: ztunnel refuses plaintext for them.
pub const STRICT: &str = "culvert.test/strict";
/// Culvert's DaemonSet and its namespace.
pub const AGENT: (&str, &str) = ("culvert", "culvert-system");
/// The stand-in's DaemonSet and its namespace.
pub const PROXY: (&str, &str) = ("ztunnel", "istio-system");

/// A cluster with Culvert and a ztunnel on every node.
#[derive(Debug, Clone, Copy)]
pub struct Mesh<'a> {
    cluster: &'a Cluster,
}

impl<'a> Mesh<'a> {
    /// Installs both and waits until they are rolled out. A cluster that has them already keeps them as they are.
    ///
    /// # Errors
    /// When a binary has not been built (the error says how to), or something does not become ready; then nodes, pods and
    /// logs are kept.
    pub fn install(cluster: &'a Cluster) -> Result<Self> {
        let mesh = Self { cluster };
        // Tests ask for it side by side; the others wait for the first.
        let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
        let id = cluster.scratch().to_path_buf();
        if installed.iter().any(|(one, _)| *one == id) {
            return Ok(mesh);
        }
        mesh.load_images()?;
        mesh.prepare_nodes()?;
        cluster.apply(ZTUNNEL)?;
        Self::install_again(cluster)?;
        mesh.wait_for_rollout(PROXY.0, PROXY.1)?;
        installed.push((id, mesh.daemonset()?["spec"].clone()));
        Ok(mesh)
    }

    /// Installs Culvert where it has been taken away or changed, and waits until it is rolled out.
    ///
    /// # Errors
    /// When something does not become ready; then nodes, pods and logs are kept.
    pub fn install_again(cluster: &'a Cluster) -> Result<()> {
        let mesh = Self { cluster };
        mesh.apply()
            .inspect_err(|_| mesh.keep("apply"))
            .context("installing Culvert")?;
        mesh.wait_for_rollout(AGENT.0, AGENT.1)
    }

    /// Puts Culvert back where its DaemonSet is not what has been installed, or not on all nodes: one test's failure is not
    /// to be the next one's.
    ///
    /// # Errors
    /// When something does not become ready.
    pub fn put_right(&self) -> Result<()> {
        let installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
        let here = |(id, _): &&(PathBuf, Value)| *id == self.cluster.scratch();
        let (_, spec) = installed
            .iter()
            .find(here)
            .context("Culvert has not been installed here")?;
        let nodes = self.cluster.nodes().len();
        let right = self.daemonset().is_ok_and(|now| {
            now["spec"] == *spec && now["status"]["numberAvailable"].as_u64() == Some(nodes as u64)
        });
        if right {
            return Ok(());
        }
        eprintln!("Culvert is not as it was installed: it is put back");
        Self::install_again(self.cluster)
    }

    fn daemonset(&self) -> Result<Value> {
        let args = ["daemonset", AGENT.0, "-n", AGENT.1];
        self.cluster.admin().get(&args)
    }

    fn apply(&self) -> Result<()> {
        let dir = self.manifests().display().to_string();
        let admin = self.cluster.admin();
        // Nothing can be made in a namespace that is on its way out.
        let apply = ["apply", "--kustomize", &dir];
        admin.wait_until("Culvert is applied", ROLLOUT, &apply, |_| true)?;
        // What somebody else has added stays when the same is applied again.
        let replace = ["replace", "--kustomize", &dir, "--dry-run=server"];
        let wanted = admin.run(&[&replace[..], &["-o", "json"]].concat())?;
        // One document an object.
        let wanted = serde_json::Deserializer::from_str(&wanted)
            .into_iter::<Value>()
            .map_while(Result::ok)
            .find(|one| one["kind"] == "DaemonSet")
            .context("no DaemonSet among the manifests")?;
        if wanted["spec"] != self.daemonset()?["spec"] {
            admin.run_with(&["replace", "-f", "-"], &wanted.to_string())?;
        }
        Ok(())
    }

    /// What users apply on a cluster with such a network.
    fn manifests(&self) -> PathBuf {
        let dir = match self.cluster.cni() {
            Cni::Cilium => "deploy/overlays/cilium",
            Cni::Bridge | Cni::Newest | Cni::None => "deploy/base",
        };
        place::root().join(dir)
    }

    /// Keeps what is to be known after an error, under the cluster's name and what went wrong.
    fn keep(&self, what: &str) {
        evidence::keep_after(self.cluster, &format!("{}-{what}", self.cluster.name()));
    }

    /// The command line tool, of this build.
    ///
    /// # Errors
    /// When it has not been built.
    pub fn culvert() -> Result<PathBuf> {
        binary("CULVERT_BIN", "culvert")
    }

    /// The plugin, of this build.
    ///
    /// # Errors
    /// When it has not been built.
    pub fn plugin() -> Result<PathBuf> {
        binary("CULVERT_CNI_BIN", "culvert-cni")
    }

    /// Waits until a DaemonSet is rolled out.
    ///
    /// # Errors
    /// When it is not in time; then nodes, pods and logs are kept.
    pub fn wait_for_rollout(&self, name: &str, namespace: &str) -> Result<()> {
        let object = format!("daemonset/{name}");
        // A watch that breaks off is no verdict: it is asked again.
        let args = [
            "rollout",
            "status",
            "-n",
            namespace,
            &object,
            "--timeout=20s",
        ];
        let what = format!("{object} in {namespace} is rolled out");
        let admin = self.cluster.admin();
        admin
            .wait_until(&what, ROLLOUT, &args, |_| true)
            .inspect_err(|_| self.keep(name))
            .map(drop)
    }

    fn load_images(&self) -> Result<()> {
        let ztunnel = Image::new("culvert.test/ztunnel:1")
            .program("bin/ztunnel-standin", standin()?)?
            .entrypoint(&["/bin/ztunnel-standin"]);
        self.cluster.import(&culvert_image()?)?;
        self.cluster.add_image(&ztunnel)
    }

    /// One authority for all nodes, and no peers yet.
    fn prepare_nodes(&self) -> Result<()> {
        let nodes = self.cluster.nodes();
        let first = nodes.first().context("a cluster without nodes")?;
        let authority = first.dir().join(FILES).join("ca");
        if !authority.exists() {
            let mut make = tool::command(standin()?);
            tool::run(make.args(["gen-ca", "--dir"]).arg(&authority))?;
        }
        for node in &nodes {
            let to = node.dir().join(FILES).join("ca");
            if !to.exists() {
                copy_tree(&authority, &to)?;
            }
        }
        self.set_peers(&Map::new())
    }

    /// Tells every ztunnel of all pods that are in the mesh by now, as istiod would: who they are, and that they speak
    /// HBONE. Pods that come later are reached in plaintext until the next call, pods that leave not at all.
    ///
    /// # Errors
    /// When the API server does not answer or a node's files cannot be written.
    pub fn tell_peers(&self) -> Result<()> {
        // An older look must not replace a newer one's.
        let _one = TELLING.lock().unwrap_or_else(PoisonError::into_inner);
        let pods = self.cluster.admin().get(&["pods", "-A"])?;
        let mut peers = Map::new();
        for pod in pods["items"].as_array().into_iter().flatten() {
            // Addresses of pods that have ended are others' by now.
            let over = matches!(
                pod["status"]["phase"].as_str(),
                Some("Succeeded" | "Failed")
            );
            if over || redirection(pod) != Some("enabled") {
                continue;
            }
            let identity = format!(
                "spiffe://cluster.local/ns/{}/sa/{}",
                pod["metadata"]["namespace"].as_str().unwrap_or_default(),
                pod["spec"]["serviceAccountName"]
                    .as_str()
                    .unwrap_or("default"),
            );
            let strict = pod["metadata"]["labels"][STRICT] == "yes";
            for address in pod["status"]["podIPs"].as_array().into_iter().flatten() {
                if let Some(address) = address["ip"].as_str() {
                    let peer = json!({"identity": identity, "hbone": true, "strict": strict});
                    peers.insert(address.to_owned(), peer);
                }
            }
        }
        self.set_peers(&peers)
    }

    fn set_peers(&self, peers: &Map<String, Value>) -> Result<()> {
        for node in self.cluster.nodes() {
            let path = node.dir().join(FILES).join("workloads.json");
            // Renamed into place, so that it is never read half-written.
            let fresh = path.with_extension("fresh");
            fs::write(&fresh, Value::from(peers.clone()).to_string())
                .and_then(|()| fs::rename(&fresh, &path))
                .with_context(|| format!("writing {}", path.display()))?;
        }
        Ok(())
    }

    /// What a node's ztunnel has counted since it started: `{"pid": .., "pods": [{"uid": .., "name": .., ..}]}`.
    ///
    /// # Errors
    /// When it does not run.
    pub fn stats(&self, node: &Node) -> Result<Value> {
        let path = node.dir().join(FILES).join("stats.sock");
        let ask = || -> Result<Value> {
            let mut stream = UnixStream::connect(&path)?;
            stream.set_read_timeout(Some(ANSWER))?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(serde_json::from_str(&text)?)
        };
        ask().with_context(|| format!("asking ztunnel at {}", path.display()))
    }

    /// What the ztunnel of a pod's node has counted for it.
    ///
    /// # Errors
    /// When there is no such pod, or its ztunnel does not know it.
    pub fn pod_stats(&self, namespace: &str, pod: &str) -> Result<Value> {
        let object = self.cluster.admin().get(&["pod", pod, "-n", namespace])?;
        let node = object["spec"]["nodeName"]
            .as_str()
            .with_context(|| format!("{namespace}/{pod} has no node yet"))?;
        let stats = self.stats(&self.cluster.node(node)?)?;
        let pods = stats["pods"]
            .as_array()
            .map(Vec::as_slice)
            .unwrap_or_default();
        pods.iter()
            .find(|one| one["uid"] == object["metadata"]["uid"])
            .cloned()
            .with_context(|| format!("the ztunnel of {node} serves no {namespace}/{pod}: {stats}"))
    }

    /// Waits until all pods of a namespace are in the mesh, by the annotation that peers go by.
    ///
    /// # Errors
    /// When one is not in time.
    pub fn wait_until_enrolled(&self, namespace: &str) -> Result<()> {
        let what = format!("all pods of {namespace} are in the mesh");
        let args = ["get", "pods", "-n", namespace, "-o", "json"];
        let all = |text: &str| {
            let list: Value = serde_json::from_str(text).unwrap_or_default();
            let pods = list["items"].as_array();
            pods.is_some_and(|pods| {
                !pods.is_empty() && pods.iter().all(|pod| redirection(pod) == Some("enabled"))
            })
        };
        self.cluster
            .admin()
            .wait_until(&what, Duration::from_secs(120), &args, all)
            .map(drop)
    }
}

/// What the agent has written about a pod.
fn redirection(pod: &Value) -> Option<&str> {
    pod["metadata"]["annotations"]["ambient.istio.io/redirection"].as_str()
}

fn standin() -> Result<PathBuf> {
    binary("ZTUNNEL_STANDIN_BIN", "ztunnel-standin")
}
