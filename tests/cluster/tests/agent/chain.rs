//! The chain of CNI plugins with ours at its end, under each version of the configuration that runtimes speak, by the
//! container runtime and by hand; and pods that have IPv6 alone.

use culvert_cluster::{IN_TIME, Part, Parts, Service, pod};
use serde_json::{Value, json};

use crate::alone;
use crate::bed::{AMBIENT, Bed, at_the_start, often, shell};
use crate::guards::ServiceOff;
use crate::installation::{configurations, foreign, installed, write_foreign};

const NODES: [&str; 2] = ["node1", "node2"];
/// The network's name, under which plugins keep what they know.
const NETWORK: &str = "bridge";

/// The configurations of the nodes, changed for a while as the cluster's own network would do it.
struct Configured<'a> {
    bed: &'a Bed,
    before: Vec<Value>,
}

impl<'a> Configured<'a> {
    fn new(bed: &'a Bed) -> Self {
        Self {
            bed,
            before: NODES.iter().map(|name| foreign(bed, name)).collect(),
        }
    }

    /// Writes what becomes of each, and waits until our plugin is in it again.
    fn write(&self, change: impl Fn(&mut Value)) {
        for (name, list) in NODES.iter().zip(&self.before) {
            let mut list = list.clone();
            change(&mut list);
            write_foreign(self.bed, name, &list.to_string());
            let version = list["cniVersion"].as_str().unwrap();
            self.bed
                .until(&format!("{name} has it, with our plugin"), || {
                    let now = configurations(self.bed, name);
                    let now: Value = serde_json::from_str(&now).unwrap_or_default();
                    now["cniVersion"] == version && installed(self.bed, name)
                });
        }
    }
}

impl Drop for Configured<'_> {
    fn drop(&mut self) {
        self.bed.keep_if_failing();
        for (name, list) in NODES.iter().zip(&self.before) {
            write_foreign(self.bed, name, &list.to_string());
        }
    }
}

/// Addresses that the node's `host-local` has given away.
fn given(bed: &Bed, node: &str) -> String {
    let node = bed.cluster.node(node).unwrap();
    let list = format!("ls /var/lib/cni/networks/{NETWORK}");
    bed.cluster.run_on(&node, &["sh", "-c", &list]).unwrap()
}

/// Whether the ztunnel of a node serves that pod, which need not be known to the API server any more.
fn served(bed: &Bed, node: &str, uid: &Value) -> bool {
    let node = bed.cluster.node(node).unwrap();
    let stats = bed.mesh.stats(&node).unwrap();
    stats["pods"]
        .as_array()
        .unwrap()
        .iter()
        .any(|one| one["uid"] == *uid)
}

#[test]
fn pods_start_are_served_and_end_under_every_version_of_the_configuration() {
    let _alone = alone();
    let bed = Bed::new("versions", &[AMBIENT]);
    let configured = Configured::new(&bed);
    for version in ["0.4.0", "1.0.0", "1.1.0"] {
        configured.write(|list| list["cniVersion"] = version.into());
        let server = |node: &str| pod(&format!("server-{node}"), node, &["serve"]);
        bed.start(&[server("node1"), server("node2"), shell("shell", "node1")]);
        bed.mesh.wait_until_enrolled("versions").unwrap();
        bed.mesh.tell_peers().unwrap();
        for node in NODES {
            for to in bed.addresses(&format!("server-{node}")) {
                bed.until(&format!("{version}: {to} is reached in HBONE"), || {
                    let carried = bed.counted("shell", "hbone_out");
                    bed.ask("shell", to)
                        .is_ok_and(|answer| answer.starts_with("server-"))
                        && bed.counted("shell", "hbone_out") > carried
                });
            }
        }
        // The runtime keeps each result, in the version in which it was given.
        for node in NODES {
            let cache =
                format!("grep -l '\"cniVersion\":\"{version}\"' /var/lib/cni/results/{NETWORK}-*");
            let node = bed.cluster.node(node).unwrap();
            let kept = bed.cluster.run_on(&node, &["sh", "-c", &cache]).unwrap();
            assert!(!kept.is_empty(), "{version}");
        }
        let pods: Vec<(String, Value, Vec<String>)> = ["server-node1", "server-node2"]
            .iter()
            .map(|name| {
                let addresses = bed
                    .addresses(name)
                    .into_iter()
                    .map(|to| to.ip().to_string());
                let uid = bed.pod(name)["metadata"]["uid"].clone();
                (name.replace("server-", ""), uid, addresses.collect())
            })
            .collect();
        for (node, _, addresses) in &pods {
            let given = given(&bed, node);
            assert!(
                addresses
                    .iter()
                    .all(|one| given.lines().any(|line| line == one)),
                "{given}"
            );
        }
        let delete = ["delete", "pod", "--all", IN_TIME];
        bed.namespace.kubectl(&delete).unwrap();
        for (node, uid, addresses) in &pods {
            bed.until(&format!("{version}: {node} has let go of its pod"), || {
                let given = given(&bed, node);
                !served(&bed, node, uid)
                    && !addresses
                        .iter()
                        .any(|one| given.lines().any(|line| line == one))
            });
        }
    }
}

#[test]
fn every_verb_works_by_hand_against_the_installed_chain() {
    let _alone = alone();
    let bed = Bed::new("by-hand", &[AMBIENT]);
    let configured = Configured::new(&bed);
    configured.write(|list| list["cniVersion"] = "1.1.0".into());
    let node = bed.cluster.node("node1").unwrap();
    let cnitool = Parts::find()
        .unwrap()
        .get(Part::Cnitool)
        .unwrap()
        .display()
        .to_string();
    // A pod of this node that no kubelet starts.
    let kubelet = ServiceOff::begin(&bed, &node, Service::Kubelet);
    bed.apply(&[pod("hand", "node1", &["serve"])]);
    let uid = bed.pod("hand")["metadata"]["uid"].clone();
    let args = format!(
        "CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=by-hand;K8S_POD_NAME=hand;K8S_POD_UID={}",
        uid.as_str().unwrap()
    );
    let netns = "/run/netns/by-hand";
    let run = |verb: &str| {
        let line = [
            "env",
            "CNI_PATH=/opt/cni/bin",
            "NETCONFPATH=/etc/cni/net.d",
            &args,
            &cnitool,
            verb,
            NETWORK,
            netns,
        ];
        bed.cluster.run_on(&node, &line)
    };
    bed.cluster
        .run_on(&node, &["ip", "netns", "add", "by-hand"])
        .unwrap();
    let rules = || {
        let list = format!("nsenter --net={netns} ip rule list");
        bed.cluster.run_on(&node, &["sh", "-c", &list]).unwrap()
    };
    let before = rules();

    run("status").unwrap();
    let result: Value = serde_json::from_str(&run("add").unwrap()).unwrap();
    assert_eq!(result["cniVersion"], "1.1.0");
    assert_eq!(result["ips"].as_array().unwrap().len(), 2, "{result}");
    assert!(
        served(&bed, "node1", &uid),
        "ADD ends when ztunnel serves the pod"
    );
    assert_ne!(rules(), before);
    run("check").unwrap();
    run("del").unwrap();
    bed.until("DEL: ztunnel has let go of it", || {
        !served(&bed, "node1", &uid)
    });
    run("del").unwrap();
    assert!(run("check").is_err());

    // What nobody names any more is let go of.
    bed.cluster
        .run_on(&node, &["ip", "netns", "delete", "by-hand"])
        .unwrap();
    bed.cluster
        .run_on(&node, &["ip", "netns", "add", "by-hand"])
        .unwrap();
    run("add").unwrap();
    assert!(served(&bed, "node1", &uid));
    // It names nobody at all, which our plugin does not take for an empty list: others' pods would be let go of.
    let refused = run("gc").unwrap_err().to_string();
    assert!(
        refused.contains("a GC without cni.dev/valid-attachments"),
        "{refused}"
    );
    bed.until("GC: ztunnel has let go of it", || {
        !served(&bed, "node1", &uid)
    });
    run("status").unwrap();

    bed.cluster
        .run_on(&node, &["ip", "netns", "delete", "by-hand"])
        .unwrap();
    let delete = [
        "delete",
        "pod",
        "hand",
        "--grace-period=0",
        "--force",
        IN_TIME,
    ];
    bed.namespace.kubectl(&delete).unwrap();
    drop(kubelet);
    // The node works on.
    bed.start(&[pod("after", "node1", &["serve"])]);
    bed.wait_for_membership("after", true);
}

#[test]
fn pods_with_ipv6_alone_are_served() {
    let _alone = alone();
    let bed = Bed::new("six", &[AMBIENT]);
    let configured = Configured::new(&bed);
    // By another version than before, by which its being in force is told.
    configured.write(|list| {
        list["cniVersion"] = "0.4.0".into();
        let ipam = &mut list["plugins"][0]["ipam"];
        let mut six = ipam["ranges"][1].clone();
        // Addresses that no pod had before: the node may still know a neighbour by one, and the bridge plugin tells it
        // of no new one over IPv6.
        let subnet = six[0]["subnet"].as_str().unwrap().to_owned();
        six[0]["rangeStart"] = subnet.replace("::/64", "::6:0").into();
        ipam["ranges"] = json!([six]);
        ipam["routes"] = json!([{"dst": "::/0"}]);
    });
    let served = |name: &str, node: &str| {
        let mut pod = pod(name, node, &["serve"]);
        let get = json!({"httpGet": {"path": "/", "port": 8080}});
        let main = &mut pod["spec"]["containers"][0];
        main["startupProbe"] = at_the_start(get.clone());
        main["readinessProbe"] = often(get.clone());
        main["livenessProbe"] = often(get);
        pod
    };
    bed.start(&[
        served("a", "node1"),
        served("b", "node2"),
        shell("one", "node1"),
        shell("two", "node2"),
    ]);
    bed.mesh.wait_until_enrolled("six").unwrap();
    bed.mesh.tell_peers().unwrap();
    for name in ["a", "b", "one", "two"] {
        let addresses = bed.addresses(name);
        assert!(
            addresses.len() == 1 && addresses[0].is_ipv6(),
            "{name}: {addresses:?}"
        );
    }
    for server in ["a", "b"] {
        // Probes of the kubelet are not the mesh's.
        assert_eq!(bed.counted(server, "inbound_accepts"), 0, "{server}");
        for client in ["one", "two"] {
            let (own, to) = (bed.addresses(client)[0], bed.addresses(server)[0]);
            bed.until(&format!("{client} reaches {server} in HBONE"), || {
                let carried = || {
                    [
                        bed.counted(client, "hbone_out"),
                        bed.counted(server, "hbone_in"),
                    ]
                };
                let before = carried();
                let answer = bed.ask(client, to).unwrap();
                // The server sees the client's own address.
                assert_eq!(answer, format!("{server} {}", own.ip()));
                carried() == before.map(|count| count + 1)
            });
        }
    }
    assert!(
        bed.pods()
            .iter()
            .all(|pod| pod["status"]["containerStatuses"][0]["restartCount"] == 0)
    );
}
