//! The plugin behind real ones: Debian's `bridge` and `host-local` make a pod's network, ours asks the agent's own server
//! about it, and what the runtime gets is what they have made.
#![expect(
    clippy::unwrap_used,
    reason = "test code: a step that fails is a test that fails"
)]

use std::{
    collections::BTreeSet,
    fs,
    net::IpAddr,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use anyhow::{Context as _, Result, ensure};
use culvert::cni_server::{Counters, Handler, Listener, Method, router};
use culvert_cni::api::{
    AddReply, AddRequest, CheckReply, CheckRequest, DelRequest, GcRequest, Refusal, StatusReply,
    code,
};
use culvert_e2e::cni::{Attachment, DEBIAN_PLUGINS, Network, PluginError};
use culvert_lab::{Lab, plugin_binary};
use serde_json::{Value, json};

const ARGS: &str = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart-0;K8S_POD_UID=4f1c";

/// Lets a pod start when the plugin has named its namespace and addresses rightly.
#[derive(Default)]
struct Witness {
    /// Inode of the namespace, and the addresses, of each ADD.
    added: Mutex<Vec<(u64, BTreeSet<IpAddr>)>>,
    deleted: Mutex<Vec<DelRequest>>,
    refuse: Mutex<bool>,
}

impl Handler for Witness {
    async fn add(&self, request: AddRequest) -> Result<AddReply, Refusal> {
        let inode = fs::metadata(&request.netns).map_or(0, |data| data.ino());
        let addresses = request.addresses.into_iter().collect();
        self.added.lock().unwrap().push((inode, addresses));
        if *self.refuse.lock().unwrap() {
            let message = "runtime class gvisor is not served";
            return Err(Refusal::for_good(
                code::CANNOT_ENROL,
                message,
                "use another",
            ));
        }
        Ok(AddReply {
            enrolled: true,
            reason: "label".into(),
            ..AddReply::default()
        })
    }

    async fn del(&self, request: DelRequest) -> Result<(), Refusal> {
        self.deleted.lock().unwrap().push(request);
        Ok(())
    }

    async fn check(&self, request: CheckRequest) -> Result<CheckReply, Refusal> {
        let problem = fs::metadata(&request.netns).err();
        Ok(CheckReply {
            enrolled: true,
            problem: problem.map(|error| error.to_string()),
        })
    }

    async fn gc(&self, _request: GcRequest) -> Result<(), Refusal> {
        Ok(())
    }

    fn status(&self) -> StatusReply {
        StatusReply::default()
    }
}

/// The agent's server in this process.
struct Agent {
    runtime: Option<tokio::runtime::Runtime>,
    socket: PathBuf,
    witness: Arc<Witness>,
    counters: Arc<Counters>,
}

impl Agent {
    fn start(lab: &Lab) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let socket = lab.scratch().join("run/agent.sock");
        let (witness, counters) = (Arc::<Witness>::default(), Arc::<Counters>::default());
        let app = router(witness.clone(), counters.clone());
        let guard = runtime.enter();
        let listener = Listener::bind(&socket)?;
        drop(guard);
        runtime.spawn(listener.serve(app, std::future::pending()));
        Ok(Self {
            runtime: Some(runtime),
            socket,
            witness,
            counters,
        })
    }

    fn count(&self, method: Method, code: u16) -> u64 {
        let all = self.counters.answered();
        all.filter(|(m, c, _)| (*m, *c) == (method, code))
            .map(|(_, _, count)| count)
            .sum()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

fn network(lab: &Lab, version: &str, with_us: bool, socket: &Path) -> Result<Network> {
    let mut plugins = vec![json!({
        "type": "bridge",
        "bridge": "cni0",
        "isGateway": true,
        "ipam": {
            "type": "host-local",
            "dataDir": lab.scratch().join("ipam"),
            "ranges": [[{"subnet": "10.66.0.0/24"}], [{"subnet": "fd66::/64"}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    })];
    if with_us {
        plugins.push(json!({
            "type": "culvert-cni",
            "socket": socket,
            "logFile": lab.scratch().join("cni.log"),
            "decisionFile": lab.scratch().join("decisions.json"),
            "excludedNamespaces": ["kube-system"],
            "budgetSeconds": 10,
        }));
    }
    let list = json!({"cniVersion": version, "name": "podnet", "plugins": plugins});
    let ours = plugin_binary()?;
    let ours = ours.parent().context("a binary is in a directory")?;
    Network::new(&list, &[Path::new(DEBIAN_PLUGINS), ours])
}

fn chain(name: &str, version: &str) -> Result<()> {
    let lab = Lab::new(name)?;
    let agent = Agent::start(&lab)?;
    let network = network(&lab, version, true, &agent.socket)?;
    let pod = lab.pod_builder("pod").no_interface().build()?;
    let attachment = Attachment {
        container: "c1",
        netns: Some(pod.path()),
        ifname: "eth0",
        args: ARGS,
    };
    let result = network.add(lab.node(), &attachment)?;
    // What the others made is whole, and nothing of ours is in it.
    ensure!(result["cniVersion"] == version, "{result}");
    let there: BTreeSet<IpAddr> = result["ips"]
        .as_array()
        .context("no addresses")?
        .iter()
        .map(|ip| {
            let address = ip["address"].as_str().unwrap_or_default();
            Ok(address.split('/').next().unwrap_or_default().parse()?)
        })
        .collect::<Result<_>>()?;
    ensure!(there.len() == 2, "{result}");
    let inside: BTreeSet<IpAddr> = pod
        .addrs()?
        .into_iter()
        .map(|(_, net)| net.addr())
        .collect();
    ensure!(there.is_subset(&inside), "{there:?} are not in {inside:?}");
    // What the agent was told is true.
    ensure!(*agent.witness.added.lock().unwrap() == [(pod.inode()?, there)]);
    // A further interface of the same pod: asked about, too.
    let second = Attachment {
        ifname: "net1",
        ..attachment.clone()
    };
    let second_result = network.add(lab.node(), &second)?;
    ensure!(agent.count(Method::Add, 200) == 2);
    if version != "0.3.1" {
        network.check(lab.node(), &attachment, &result)?;
        ensure!(agent.count(Method::Check, 200) == 1);
    }
    network.del(lab.node(), &second, Some(&second_result))?;
    network.del(lab.node(), &attachment, Some(&result))?;
    ensure!(pod.ifindex("eth0").is_err() && pod.ifindex("net1").is_err());
    let deleted: Vec<_> = std::mem::take(&mut *agent.witness.deleted.lock().unwrap());
    let names: Vec<_> = deleted.iter().map(|del| del.ifname.as_str()).collect();
    ensure!(names == ["net1", "eth0"], "{deleted:?}");
    Ok(())
}

#[test]
fn cni_chain_of_0_3_1() -> Result<()> {
    chain("cni-chain-031", "0.3.1")
}

#[test]
fn cni_chain_of_0_4_0() -> Result<()> {
    chain("cni-chain-040", "0.4.0")
}

#[test]
fn cni_chain_of_1_0_0() -> Result<()> {
    chain("cni-chain-100", "1.0.0")
}

/// A chain with us in it ends with the same result, to the key, as one without.
#[test]
fn cni_chain_leaves_results_alone() -> Result<()> {
    let lab = Lab::new("cni-same")?;
    let agent = Agent::start(&lab)?;
    let mut results = Vec::new();
    for with_us in [false, true] {
        let network = network(&lab, "1.0.0", with_us, &agent.socket)?;
        let pod = lab.pod_builder("pod").no_interface().build()?;
        let attachment = Attachment {
            container: "c1",
            netns: Some(pod.path()),
            ifname: "eth0",
            args: ARGS,
        };
        let result = network.add(lab.node(), &attachment)?;
        network.del(lab.node(), &attachment, Some(&result))?;
        lab.delete(pod)?;
        results.push(without_chance(result).to_string());
    }
    ensure!(results[0] == results[1], "{results:#?}");
    Ok(())
}

/// Addresses and names that are new each time.
fn without_chance(mut result: Value) -> Value {
    for interface in result["interfaces"].as_array_mut().into_iter().flatten() {
        for key in ["mac", "name", "sandbox"] {
            if let Some(value) = interface.get_mut(key) {
                *value = json!("x");
            }
        }
    }
    for ip in result["ips"].as_array_mut().into_iter().flatten() {
        ip["address"] = json!("x");
    }
    result
}

/// The agent refuses, or is not there: the pod fails, and its DEL cleans up all the same.
#[test]
fn cni_chain_fails_closed_and_is_taken_down() -> Result<()> {
    let lab = Lab::new("cni-closed")?;
    let agent = Agent::start(&lab)?;
    *agent.witness.refuse.lock().unwrap() = true;
    let network = network(&lab, "1.0.0", true, &agent.socket)?;
    let pod = lab.pod_builder("pod").no_interface().build()?;
    let attachment = Attachment {
        container: "c1",
        netns: Some(pod.path()),
        ifname: "eth0",
        args: ARGS,
    };
    let fails = |with: u64| -> Result<()> {
        let error = network.add(lab.node(), &attachment).err();
        let error = error.context("the pod started")?;
        let error: PluginError = error.downcast()?;
        ensure!(
            error.plugin == "culvert-cni" && error.error["code"] == with,
            "{error}"
        );
        network.del(lab.node(), &attachment, None)?;
        ensure!(pod.ifindex("eth0").is_err());
        Ok(())
    };
    fails(100)?;
    drop(agent);
    fails(11)?;
    // But one of an excluded namespace starts.
    let system = Attachment {
        args: "IgnoreUnknown=1;K8S_POD_NAMESPACE=kube-system;K8S_POD_NAME=dns-0",
        ..attachment
    };
    let result = network.add(lab.node(), &system)?;
    ensure!(pod.ifindex("eth0").is_ok());
    network.del(lab.node(), &system, Some(&result))?;
    Ok(())
}
