//! Agents that cannot work on a node: what is wrong, and what to do, stands where people look for it, and the node's
//! network is as it was.

use culvert_cluster::{AGENT, IN_TIME, Node, pod};
use serde_json::{Value, json};

use crate::bed::Bed;
use crate::installation::{installed, of_agent};
use crate::variant::{Variants, agent_pod, daemonset, second_agent};
use crate::{alone, guards};

const NODES: [&str; 2] = ["node1", "node2"];

/// As on a kernel without BPF.
const NO_BPF: &str = r#"{
    "defaultAction": "SCMP_ACT_ALLOW",
    "syscalls": [{"names": ["bpf"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}]
}"#;

/// All that a network of pods is made from: configurations, plugins that they name, rules. Ours may lie among the plugins,
/// where nothing runs it.
fn network(bed: &Bed, node: &Node) -> String {
    let look = "cd /etc/cni/net.d && sha256sum * && cd /opt/cni/bin && ls --full-time | grep -v -e total -e culvert-cni && \
                ip rule && ip -6 rule";
    bed.cluster.run_on(node, &["sh", "-ec", look]).unwrap()
}

fn with_host_path(mut pod: Value, volume: &str, path: &str) -> Value {
    let volumes = pod["spec"]["volumes"].as_array_mut().unwrap();
    let volume = volumes
        .iter_mut()
        .find(|one| one["name"] == volume)
        .unwrap();
    volume["hostPath"]["path"] = path.into();
    pod
}

fn with_environment(mut pod: Value, name: &str, value: &str) -> Value {
    let env = pod["spec"]["containers"][0]["env"].as_array_mut().unwrap();
    env.push(json!({"name": name, "value": value}));
    pod
}

/// What the agent of a node says of itself; nothing when it does not answer.
fn readyz(bed: &Bed, node: &str) -> String {
    let node = bed.cluster.node(node).unwrap();
    let ask = [
        "curl",
        "-sS",
        "--max-time",
        "5",
        "http://127.0.0.1:8000/readyz",
    ];
    bed.cluster.run_on(&node, &ask).unwrap_or_default()
}

/// An agent that goes on running although it cannot work.
struct Stuck<'a> {
    name: &'a str,
    node: &'a str,
    /// The task that is not done, as its readiness has it.
    task: &'a str,
    /// What is wrong and what to do.
    texts: &'a [&'a str],
}

/// Waits until an agent says what is wrong where its readiness is asked for, in its log, and, where it may write them, by
/// an event about its pod; the pod is seen not to be ready.
fn not_ready(bed: &Bed, variants: &Variants<'_>, stuck: &Stuck<'_>, may_write_events: bool) {
    let Stuck { name, .. } = *stuck;
    let all_in = |said: &str| stuck.texts.iter().all(|text| said.contains(text));
    bed.until(&format!("{name} says why it is not ready"), || {
        let said = readyz(bed, stuck.node);
        let waits = format!("WAIT  {}", stuck.task);
        said.lines()
            .any(|line| line.starts_with(&waits) && all_in(line))
    });
    bed.until(&format!("{name} says so in its log"), || {
        variants.log(name).lines().any(all_in)
    });
    if may_write_events {
        bed.until(&format!("an event of {name}'s says so"), || {
            let told = |(reason, note): &(String, String)| {
                reason == "CulvertCniConfiguration" && all_in(note)
            };
            variants.events(name).iter().any(told)
        });
    }
    bed.until(&format!("{name}: an event tells of it"), || {
        let told = |(reason, note): &(String, String)| {
            reason == "Unhealthy" && note.contains("Readiness probe failed")
        };
        variants.events(name).iter().any(told)
    });
    let pod = variants.pod(name);
    assert_eq!(
        pod["status"]["containerStatuses"][0]["ready"], false,
        "{pod:#}"
    );
    assert_eq!(
        pod["status"]["containerStatuses"][0]["restartCount"], 0,
        "{pod:#}"
    );
}

#[test]
fn an_agent_that_cannot_work_says_what_to_do_and_leaves_the_network_as_it_was() {
    let _alone = alone();
    let bed = Bed::new("refused", &[crate::bed::AMBIENT]);
    let daemonset = daemonset(&bed);
    let role = ["clusterrole", "culvert"];
    let mut role = bed.cluster.admin().get(&role).unwrap();
    let nodes = bed.cluster.nodes();
    let _back = guards::Culvert(&bed);
    of_agent(&bed, &["delete", "daemonset", AGENT.0, IN_TIME]);
    for node in NODES {
        bed.until(&format!("{node} is as before"), || !installed(&bed, node));
    }
    // Its ports are taken for as long as its pods are there: a kubelet refuses others that want them.
    let pods = "--selector=app.kubernetes.io/name=culvert";
    of_agent(
        &bed,
        &["wait", "--for=delete", "pod", pods, "--timeout=120s"],
    );
    let look = || -> Vec<String> { nodes.iter().map(|node| network(&bed, node)).collect() };
    let before = look();
    for node in &nodes {
        let dir = node.dir().join("var/lib/kubelet/seccomp");
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("no-bpf.json"), NO_BPF).unwrap();
    }

    let second = |name: &str| second_agent(&daemonset, name);
    let mut no_bpf = second("no-bpf");
    no_bpf["spec"]["securityContext"]["seccompProfile"] =
        json!({"type": "Localhost", "localhostProfile": "no-bpf.json"});
    let mut no_plugin = agent_pod(&daemonset, "no-plugin", "node1");
    let args = no_plugin["spec"]["containers"][0]["args"]
        .as_array_mut()
        .unwrap();
    args.push("--plugin-binary=/bin/not-in-the-image".into());
    let contradiction = with_environment(second("contradiction"), "CULVERT_CNI_OWN_CONFIG", "true");
    let variants = Variants::start(
        &bed,
        &[
            with_environment(contradiction, "CULVERT_CNI_CHAINED", "false"),
            with_host_path(second("no-cgroup2"), "cgroup", "/sys/fs/cgroup/memory"),
            with_host_path(second("no-bpffs"), "bpffs", "/var/lib"),
            no_bpf,
            with_host_path(second("no-directory"), "cni-bin", "/opt/nowhere"),
            no_plugin,
            with_host_path(
                agent_pod(&daemonset, "no-network", "node2"),
                "cni-conf",
                "/etc/cni/other.d",
            ),
        ],
    );
    for (name, texts) in [
        (
            "contradiction",
            &["set one of cni-own-config=true and cni-chained=false"][..],
        ),
        (
            "no-cgroup2",
            &["cannot find the cgroup v2 hierarchy", "mount -t cgroup2"],
        ),
        (
            "no-bpffs",
            &["no bpffs is mounted there", "mount -t bpf bpf /sys/fs/bpf"],
        ),
        (
            "no-bpf",
            &[
                "cannot load programs into this kernel",
                "boot Linux 6.1 or later",
            ],
        ),
    ] {
        let said = variants.ended(name);
        for text in texts {
            assert!(said.contains(text), "{name}: not `{text}` but: {said}");
        }
    }
    // The kubelet does not even begin.
    bed.until("a directory that is not there is named", || {
        let told = |(reason, note): &(String, String)| {
            reason == "FailedMount" && note.contains("/opt/nowhere is not a directory")
        };
        variants.events("no-directory").iter().any(told)
    });
    let no_plugin = Stuck {
        name: "no-plugin",
        node: "node1",
        task: "cni-installed",
        texts: &[
            "/bin/not-in-the-image",
            "name its place with --plugin-binary",
        ],
    };
    let no_network = Stuck {
        name: "no-network",
        node: "node2",
        task: "cni-installed",
        texts: &["there is no CNI configuration yet", "hostPaths.cniConf"],
    };
    for stuck in [no_plugin, no_network] {
        not_ready(&bed, &variants, &stuck, true);
    }
    assert_eq!(look(), before);

    variants.delete(true);
    bed.cluster
        .kubectl(&["delete", "clusterrole", "culvert", IN_TIME])
        .unwrap();
    let pods = [agent_pod(&daemonset, "no-role", "node1")];
    let variants = Variants::start(&bed, &pods);
    let no_role = Stuck {
        name: "no-role",
        node: "node1",
        task: "watch",
        texts: &[
            "namespaces is forbidden",
            "the chart's ClusterRole lists what is needed",
        ],
    };
    not_ready(&bed, &variants, &no_role, false);
    bed.until("it says what it may not do", || {
        let said = readyz(&bed, "node1");
        said.contains("WAIT  cni-installed") && said.contains("list, watch namespaces")
    });
    assert_eq!(look(), before);
    // Pods of the mesh start all the same, outside it, on both nodes.
    bed.start(&NODES.map(|node| pod(&format!("on-{node}"), node, &["serve"])));
    let url = format!("http://{}/", bed.addresses("on-node1")[0]);
    let ask = ["curl", "-sSf", "--max-time", "20", &url];
    let answer = bed.cluster.run_on(&nodes[1], &ask).unwrap();
    assert!(answer.starts_with("on-node1 "), "{answer}");

    // Granted, it goes on by itself.
    for of_the_server in [
        "uid",
        "resourceVersion",
        "creationTimestamp",
        "managedFields",
    ] {
        role["metadata"]
            .as_object_mut()
            .unwrap()
            .remove(of_the_server);
    }
    bed.cluster.apply(&role.to_string()).unwrap();
    bed.until("it is ready", || {
        variants.pod("no-role")["status"]["containerStatuses"][0]["ready"] == true
    });
    assert!(installed(&bed, "node1"));
    bed.wait_for_membership("on-node1", true);
    variants.delete(true);
}
