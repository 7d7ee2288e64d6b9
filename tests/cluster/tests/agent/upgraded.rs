//! The agent rolled to another build and back while pods start and talk: other programs in the kernel, another agent, another
//! plugin, and never a moment in which both nodes are without an agent.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;
use std::process::{Child, Stdio};

use culvert_cluster::{AGENT, Image, Mesh};
use culvert_e2e::bpf;
use culvert_lab::another_build;
use serde_json::Value;

use crate::bed::Bed;
use crate::capture::{Capture, seen_on};
use crate::installation::{self, installed, of_agent};
use crate::traffic::Traffic;
use crate::{alone, guards};

const NODES: [&str; 2] = ["node1", "node2"];
const NEXT: &str = "docker.io/library/culvert:next";
/// Programs of a node that are not a pod's own.
const PROGRAMS: usize = 4;

/// Another build as an image: agent and plugin without optimisation and linked to shared libraries, and programs that are
/// other instructions. Returns the plugin of it.
fn bring_another_build(bed: &Bed) -> PathBuf {
    let agent = Mesh::culvert().unwrap();
    let plugin = Mesh::plugin().unwrap();
    let rewritten = bed.cluster.scratch().join("culvert-next");
    another_build(&agent, &rewritten).unwrap();
    let image = Image::new(NEXT)
        .program("bin/culvert", &rewritten)
        .unwrap()
        .program("bin/culvert-cni", &plugin)
        .unwrap()
        .entrypoint(&["/bin/culvert"]);
    bed.cluster.add_image(&image).unwrap();
    plugin
}

/// What the kernel has of Culvert for a node.
struct Loaded {
    maps: BTreeSet<u32>,
    programs: BTreeSet<u32>,
    /// The kernel's hashes over the programs' instructions.
    code: BTreeSet<[u8; 8]>,
}

impl Loaded {
    fn on(bed: &Bed, node: &str) -> Self {
        let node = bed.cluster.node(node).unwrap();
        let pins = bed.cluster.root_of(&node).unwrap();
        let maps = bpf::maps_in(&pins.join("sys/fs/bpf/culvert/maps")).unwrap();
        let maps = maps.into_iter().map(|(_, map)| map.id).collect();
        let programs = bpf::programs_using(&maps).unwrap();
        Self {
            code: bpf::program_tags(&programs).unwrap(),
            maps,
            programs,
        }
    }

    /// The programs after it are others, instruction by instruction; what they have noted is what these have noted.
    fn is_followed_by(&self, after: &Self) {
        assert_eq!(after.maps, self.maps, "maps were made anew");
        let new = bpf::program_tags(&(&after.programs - &self.programs)).unwrap();
        assert!(
            new.len() >= PROGRAMS && new.is_disjoint(&self.code),
            "the same code: {new:02x?} of {:02x?}",
            self.code
        );
    }
}

/// Everything that happens to the agents' pods, as the API server tells it.
struct Watch {
    kubectl: Child,
    file: PathBuf,
}

impl Watch {
    fn start(bed: &Bed, name: &str) -> Self {
        let file = bed.cluster.scratch().join(format!("{name}.watch"));
        let args = [
            "get",
            "pods",
            "-n",
            AGENT.1,
            "-l",
            "app.kubernetes.io/name=culvert",
            "--watch",
            "--output-watch-events",
            "-o",
            "json",
        ];
        let kubectl = bed
            .cluster
            .admin()
            .command(&args)
            .stdout(fs::File::create(&file).unwrap())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let watch = Self { kubectl, file };
        bed.until("the watch has begun", || watch.events().len() >= 2);
        watch
    }

    fn events(&self) -> Vec<Value> {
        let text = fs::read_to_string(&self.file).unwrap();
        let all = serde_json::Deserializer::from_str(&text).into_iter::<Value>();
        // The last one may be half-written.
        all.map_while(Result::ok).collect()
    }

    /// In which order nodes lost their agent: when its pod was told to go, the other node had a ready one. A pod whose
    /// readiness fails for a moment on a busy machine is no agent that is lost.
    fn one_node_after_the_other(self, bed: &Bed) -> Vec<String> {
        let ready = |pods: &BTreeMap<String, Agent>| {
            let ready = pods.values().filter(|agent| agent.ready && !agent.goes);
            ready.map(|agent| agent.node.clone()).collect::<Vec<_>>()
        };
        let mut order = Vec::new();
        // Until the watch has told of what is known to have happened.
        bed.until("the watch tells of ready agents on both nodes", || {
            let mut pods = BTreeMap::new();
            order.clear();
            for event in self.events() {
                let uid = event["object"]["metadata"]["uid"].as_str().unwrap();
                let now = Agent::of(&event);
                let goes = now.goes.then(|| now.node.clone());
                let before = pods.insert(uid.to_owned(), now);
                if let Some(node) = goes
                    && before.is_none_or(|before| !before.goes)
                {
                    let left = ready(&pods);
                    assert_eq!(left.len(), 1, "{node}'s goes while ready are {left:?}");
                    assert_ne!(left[0], node);
                    order.push(node);
                }
            }
            order.len() == 2 && ready(&pods).len() == 2
        });
        order
    }
}

/// An agent's pod, as an event of the watch has it.
struct Agent {
    node: String,
    ready: bool,
    /// It has been told to end, or has ended.
    goes: bool,
}

impl Agent {
    fn of(event: &Value) -> Self {
        let pod = &event["object"];
        let conditions = pod["status"]["conditions"].as_array();
        let ready = |one: &Value| one["type"] == "Ready" && one["status"] == "True";
        Self {
            node: pod["spec"]["nodeName"]
                .as_str()
                .unwrap_or_default()
                .to_owned(),
            ready: conditions.is_some_and(|all| all.iter().any(ready)),
            goes: event["type"] == "DELETED" || !pod["metadata"]["deletionTimestamp"].is_null(),
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // Ended already, unless the API server lives.
        let _ended = self.kubectl.kill();
        let _reaped = self.kubectl.wait();
    }
}

#[test]
fn the_agent_is_rolled_to_another_build_and_back_one_node_after_the_other() {
    let _alone = alone();
    let traffic = Traffic::start("rolled");
    let bed = &traffic.bed;
    let other = fs::read(bring_another_build(bed)).unwrap();
    let plugin_of = |node: &str| fs::read(installation::plugin_of(bed, node)).unwrap();
    let own = plugin_of("node1");
    assert!(own != other, "the builds are the same");
    let captures = Capture::start(bed.cluster, "rolled");
    let _back = guards::Culvert(bed);
    let next = ["set", "image", "daemonset/culvert", "agent=culvert:next"];
    let back = ["rollout", "undo", "daemonset/culvert"];
    for (round, change, plugin) in [("next", &next[..], &other), ("back", &back[..], &own)] {
        let watch = Watch::start(bed, round);
        let loaded = NODES.map(|node| Loaded::on(bed, node));
        of_agent(bed, change);
        let names = NODES.map(|node| (format!("{round}-{node}"), node));
        let pods = names
            .each_ref()
            .map(|(name, node)| traffic.sender(name, node, "rolled-secret"));
        bed.start(&pods);
        bed.mesh.wait_for_rollout(AGENT.0, AGENT.1).unwrap();
        let mut order = watch.one_node_after_the_other(bed);
        order.sort();
        assert_eq!(order, NODES);
        for (name, node) in &names {
            bed.wait_for_membership(name, true);
            assert!(installed(bed, node), "an upgrade takes nothing away");
            assert!(plugin_of(node) == *plugin, "{round}: {node}'s plugin");
        }
        for (node, before) in NODES.iter().zip(loaded) {
            before.is_followed_by(&Loaded::on(bed, node));
        }
        traffic.goes_on();
    }
    assert_eq!(seen_on(captures, &["rolled-secret"]), [0]);
}
