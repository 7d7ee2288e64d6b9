//! Namespaces and pods of other nodes, as objects in the real API server: what the agent holds of them, and what it costs.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, ServiceAccount};
use kube::api::PostParams;
use kube::{Api, Client};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::cost::{self, Idle};
use super::fleet::Fleet;
use super::site::{MODE, Site};
use crate::interrupt;
use crate::process::Memory;

/// Names of pods that do not ask for the mesh, and of those that do, begin with this; no other name holds it.
const PLAIN: &str = "elsewhere-pod-";
const ASKING: &str = "asking-pod-";
/// Of so many pods one asks by a label of its own.
const ASKING_IN: usize = 10;
/// Pods a node.
const A_NODE: usize = 100;
const AT_ONCE: usize = 16;

/// What there was and what came of it.
#[derive(Debug)]
pub(super) struct Others {
    pub(super) namespaces: usize,
    pub(super) pods: usize,
    pub(super) idle: Idle,
    /// A while after a restart, with all of them there from the start.
    pub(super) restarted: Memory,
    /// How often names of the pods are in the agent's memory; of its own node's pods; of those that ask for the mesh.
    pub(super) held: usize,
    pub(super) own: usize,
    pub(super) asking: usize,
}

/// Makes them, and looks at the agent of the node whose pods are real.
pub(super) fn measure(
    site: &Site,
    fleet: &Fleet<'_>,
    (namespaces, pods): (usize, usize),
    time: Duration,
) -> Result<Others> {
    let client = &site.client;
    site.runtime.block_on(async {
        let nodes = (0..pods.div_ceil(A_NODE)).map(|number| make_node(client, number));
        all("nodes", nodes.collect()).await?;
        let made = (0..namespaces).map(|number| make_namespace(client, number));
        all("namespaces", made.collect()).await?;
        let made = (0..pods).map(|number| make_pod(client, number, number % namespaces));
        all("pods", made.collect()).await
    })?;
    let idle = Idle::measure(site, fleet, time)?;
    let (agent, _ready) = cost::replace_agent(site, fleet)?;
    cost::pause(time.min(Duration::from_secs(15)))?;
    let own = agent.holds(&fleet.one_name()?)?;
    ensure!(
        own > 0,
        "the agent's memory was searched, and not even its own node's pods were found in it"
    );
    Ok(Others {
        namespaces,
        pods,
        idle,
        restarted: Memory::of(agent.pid)?,
        held: agent.holds(PLAIN)?,
        own,
        asking: agent.holds(ASKING)?,
    })
}

/// Some at a time, all of them.
async fn all<F: Future<Output = Result<()>>>(what: &str, made: Vec<F>) -> Result<()> {
    let count = made.len();
    let mut made = stream::iter(made).buffer_unordered(AT_ONCE);
    let mut done = 0;
    while let Some(()) = made.try_next().await? {
        done += 1;
        if done % 100 == 0 || done == count {
            interrupt::check()?;
            eprint!("\r  {done} of {count} {what} ");
        }
    }
    eprintln!();
    Ok(())
}

/// One that has no kubelet. Its pods tolerate that.
async fn make_node(client: &Client, number: usize) -> Result<()> {
    let node = json!({"metadata": {"name": format!("elsewhere-{number}")}});
    create::<Node>(&Api::all(client.clone()), node).await
}

async fn make_namespace(client: &Client, number: usize) -> Result<()> {
    let name = namespace(number);
    // Half of them in the mesh.
    let mode = if number.is_multiple_of(2) {
        "ambient"
    } else {
        "none"
    };
    let object = json!({"metadata": {"name": name, "labels": {MODE: mode, "team": "bench"}}});
    create::<Namespace>(&Api::all(client.clone()), object).await?;
    // Its controller makes twenty a second.
    let accounts = Api::<ServiceAccount>::namespaced(client.clone(), &name);
    let made = create(&accounts, json!({"metadata": {"name": "default"}})).await;
    match accounts.get_opt("default").await? {
        Some(_) => Ok(()),
        None => made,
    }
}

async fn make_pod(client: &Client, number: usize, of: usize) -> Result<()> {
    let asks = number.is_multiple_of(ASKING_IN);
    let name = if asks { ASKING } else { PLAIN };
    let mut labels = json!({"app": "elsewhere", "pod-template-hash": "5d8f7c9b6"});
    if asks {
        labels[MODE] = "ambient".into();
    }
    let pod = json!({
        "metadata": {"name": format!("{name}{number}"), "labels": labels},
        "spec": {
            "nodeName": format!("elsewhere-{}", number / A_NODE),
            "tolerations": [{"operator": "Exists"}],
            "containers": [{"name": "main", "image": "elsewhere"}],
        },
    });
    create::<Pod>(&Api::namespaced(client.clone(), &namespace(of)), pod).await
}

fn namespace(number: usize) -> String {
    format!("team-{number}")
}

async fn create<K>(api: &Api<K>, object: Value) -> Result<()>
where
    K: kube::Resource + Clone + std::fmt::Debug + serde::Serialize + DeserializeOwned,
{
    let object: K = serde_json::from_value(object).context("a manifest of the benchmark")?;
    let made = api.create(&PostParams::default(), &object).await;
    made.map(drop)
        .with_context(|| format!("making {:?}", object.meta().name))
}

impl Others {
    /// The most of both.
    pub(super) fn resident(&self) -> u64 {
        self.idle.memory.rss.max(self.restarted.rss)
    }

    pub(super) fn json(&self) -> Value {
        json!({
            "namespaces": self.namespaces, "pods": self.pods, "idle": self.idle.json(),
            "restarted": self.restarted.json(),
            "names_in_memory": {"of_others": self.held, "own": self.own, "asking": self.asking},
        })
    }
}
