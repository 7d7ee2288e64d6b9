//! The agent rolled to another build and back while pods start and talk: other programs in the kernel, another agent, another
//! plugin, and never a moment in which both nodes are without an agent.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Child, Stdio};

use culvert_cluster::{AGENT, Image, Mesh};
use serde_json::Value;

use crate::alone;
use crate::bed::Bed;
use crate::capture::{Capture, seen_on};
use crate::traffic::{Traffic, installed, of_agent};

/// How an eBPF object begins: ELF, 64 bits, little-endian, version 1, eight unused bytes, relocatable, for BPF.
const OBJECT: [u8; 20] = *b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x01\0\xf7\0";
/// One of the unused bytes.
const UNUSED: usize = 15;
const NEXT: &str = "docker.io/library/culvert:next";

/// Another build as an image: agent and plugin without optimisation and linked to shared libraries, and programs that are
/// loaded anew because their object differs. Returns the plugin of it.
fn bring_another_build(bed: &Bed) -> PathBuf {
    let agent = Mesh::culvert().unwrap();
    let plugin = Mesh::plugin().unwrap();
    let mut bytes = fs::read(agent).unwrap();
    let starts: Vec<_> = bytes
        .windows(OBJECT.len())
        .enumerate()
        .filter_map(|(at, window)| (window == OBJECT).then_some(at))
        .collect();
    assert_eq!(starts.len(), 1, "objects in the agent");
    bytes[starts[0] + UNUSED] ^= 1;
    let patched = bed.cluster.scratch().join("culvert-next");
    fs::write(&patched, bytes).unwrap();
    fs::set_permissions(&patched, fs::Permissions::from_mode(0o755)).unwrap();
    let image = Image::new(NEXT)
        .program("bin/culvert", &patched)
        .unwrap()
        .program("bin/culvert-cni", &plugin)
        .unwrap()
        .entrypoint(&["/bin/culvert"]);
    bed.cluster.add_image(&image).unwrap();
    plugin
}

/// The plugin that a node's runtime calls.
fn plugin_of(bed: &Bed, node: &str) -> Vec<u8> {
    let node = bed.cluster.node(node).unwrap();
    fs::read(node.dir().join("opt/cni/bin/culvert-cni")).unwrap()
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

    /// In which order nodes lost their agent; each was the only one without a ready one.
    fn one_node_after_the_other(self, bed: &Bed) -> Vec<String> {
        // Until the watch has told of what is known to have happened.
        let ready = |pods: &BTreeMap<String, (String, bool)>| {
            let ready = pods.values().filter(|(_, serves)| *serves);
            ready.map(|(node, _)| node.clone()).collect::<Vec<_>>()
        };
        let mut order = Vec::new();
        bed.until("the watch tells of ready agents on both nodes", || {
            let mut pods = BTreeMap::new();
            order.clear();
            for event in self.events() {
                let pod = &event["object"];
                let name = pod["metadata"]["name"].as_str().unwrap().to_owned();
                let node = pod["spec"]["nodeName"].as_str().unwrap_or_default();
                let conditions = pod["status"]["conditions"].as_array();
                let serves = event["type"] != "DELETED"
                    && pod["metadata"]["deletionTimestamp"].is_null()
                    && conditions.is_some_and(|all| {
                        all.iter()
                            .any(|one| one["type"] == "Ready" && one["status"] == "True")
                    });
                let before = pods.insert(name.clone(), (node.to_owned(), serves));
                if before.is_some_and(|(_, served)| served && !serves) {
                    let left = ready(&pods);
                    assert_eq!(left.len(), 1, "{name} goes while ready are {left:?}");
                    assert_ne!(left[0], node);
                    order.push(node.to_owned());
                }
            }
            order.len() == 2 && ready(&pods).len() == 2
        });
        order
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
    let own = plugin_of(bed, "node1");
    assert!(own != other, "the builds are the same");
    let captures = Capture::start(bed.cluster, "rolled");
    let next = ["set", "image", "daemonset/culvert", "agent=culvert:next"];
    let back = ["rollout", "undo", "daemonset/culvert"];
    for (round, change, plugin) in [("next", &next[..], &other), ("back", &back[..], &own)] {
        let watch = Watch::start(bed, round);
        of_agent(bed, change);
        let names = ["node1", "node2"].map(|node| (format!("{round}-{node}"), node));
        let pods = names
            .each_ref()
            .map(|(name, node)| traffic.sender(name, node, "rolled-secret"));
        bed.start(&pods);
        bed.mesh.wait_for_rollout(AGENT.0, AGENT.1).unwrap();
        let mut order = watch.one_node_after_the_other(bed);
        order.sort();
        assert_eq!(order, ["node1", "node2"]);
        for (name, node) in &names {
            bed.wait_for_membership(name, true);
            assert!(installed(bed, node), "an upgrade takes nothing away");
            assert!(plugin_of(bed, node) == *plugin, "{round}: {node}'s plugin");
        }
        traffic.goes_on();
    }
    assert_eq!(seen_on(captures, &["rolled-secret"]), [0]);
}
