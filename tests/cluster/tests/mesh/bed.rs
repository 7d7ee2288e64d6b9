//! What the tests of the mesh stand on: a namespace in the shared cluster with Culvert, and questions about its pods.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use culvert_cluster::{Cluster, Mesh, Namespace, pod};
use serde_json::{Value, json};

use crate::turns::{self, Turn};

/// Generous: the machine may be busy with other things.
pub(crate) const LONG: Duration = Duration::from_secs(120);
/// The label that puts pods into the mesh.
pub(crate) const AMBIENT: &str = "istio.io/dataplane-mode=ambient";
pub(crate) const PORT: u16 = 8080;

pub(crate) struct Bed {
    pub(crate) cluster: &'static Cluster,
    pub(crate) mesh: Mesh<'static>,
    pub(crate) namespace: Namespace<'static>,
    /// Last: it is given up when the namespace is gone.
    _turn: Turn,
}

impl Bed {
    pub(crate) fn new(name: &str, labels: &[&str]) -> Self {
        let cluster = Cluster::shared(&crate::options()).unwrap();
        let mesh = Mesh::install(cluster).unwrap();
        cluster.add_workload().unwrap();
        let turn = turns::shared();
        mesh.put_right().unwrap();
        let namespace = cluster.namespace(name, labels).unwrap();
        Self {
            cluster,
            mesh,
            namespace,
            _turn: turn,
        }
    }

    /// Writes down what is to be known about a failure, for what is about to put something back in one.
    pub(crate) fn keep_if_failing(&self) {
        if std::thread::panicking() {
            self.namespace.keep();
        }
    }

    pub(crate) fn name(&self) -> &str {
        self.namespace.name()
    }

    /// Makes all of them at once and waits until they are ready.
    pub(crate) fn start(&self, pods: &[Value]) {
        self.apply(pods);
        self.namespace.wait_until_ready().unwrap();
    }

    pub(crate) fn apply(&self, objects: &[Value]) {
        let list = json!({"apiVersion": "v1", "kind": "List", "items": objects});
        self.namespace.apply(&list.to_string()).unwrap();
    }

    /// Two servers, one on each node: `a` and `b`.
    pub(crate) fn start_servers(&self) {
        self.start(&[pod("a", "node1", &["serve"]), pod("b", "node2", &["serve"])]);
    }

    /// A pod as the API server has it. One that a controller is about to make is waited for.
    pub(crate) fn pod(&self, name: &str) -> Value {
        let args = ["get", "pod", name, "-n", self.name(), "-o", "json"];
        let what = format!("{name} is there");
        let admin = self.cluster.admin();
        let found = admin.wait_until(&what, LONG, &args, |_| true).unwrap();
        serde_json::from_str(&found).unwrap()
    }

    pub(crate) fn pods(&self) -> Vec<Value> {
        let list = self.cluster.admin().get(&["pods", "-n", self.name()]);
        list.unwrap()["items"].as_array().unwrap().clone()
    }

    /// A pod's addresses, IPv4 first.
    pub(crate) fn addresses(&self, name: &str) -> Vec<SocketAddr> {
        let pod = self.pod(name);
        let addresses = pod["status"]["podIPs"].as_array().unwrap();
        let address = |one: &Value| -> IpAddr { one["ip"].as_str().unwrap().parse().unwrap() };
        addresses
            .iter()
            .map(|one| SocketAddr::new(address(one), PORT))
            .collect()
    }

    /// What `curl` in a pod with a shell gets from there: who answered, and whom it saw as the client.
    pub(crate) fn ask(&self, client: &str, to: SocketAddr) -> anyhow::Result<String> {
        let url = format!("http://{to}/");
        let ask = ["curl", "-sSfg", "--max-time", "20", &url];
        Ok(self.namespace.exec(client, &ask)?.trim().to_owned())
    }

    pub(crate) fn log(&self, pod: &str) -> String {
        // Nothing as long as it has not been started.
        let log = self.namespace.kubectl(&["logs", pod, "--tail=-1"]);
        log.unwrap_or_default()
    }

    /// The number behind a word in the last line of a pod's log that has it.
    pub(crate) fn told(&self, pod: &str, word: &str) -> Option<u64> {
        number_behind(word, &self.log(pod))
    }

    /// How often a container has tried until it was answered, which it has been: one that sends, or that keeps a
    /// connection up.
    pub(crate) fn tries(&self, pod: &str, container: &str) -> u64 {
        let args = ["logs", pod, "-c", container, "--tail=-1"];
        let mut tries = None;
        // It may say so a moment after it has been answered.
        self.until(&format!("{pod} says how often it has tried"), || {
            let log = self.namespace.kubectl(&args).unwrap_or_default();
            tries = number_behind("tries", &log);
            tries.is_some()
        });
        tries.unwrap()
    }

    /// Waits until a connection that is kept up has carried more than it has by now.
    pub(crate) fn wait_for_more_lines(&self, talker: &str) {
        let before = self.told(talker, "lines").unwrap_or(0);
        self.until(&format!("{talker} goes on talking"), || {
            self.told(talker, "lines") > Some(before + 10)
        });
    }

    pub(crate) fn until(&self, what: &str, mut holds: impl FnMut() -> bool) {
        let started = Instant::now();
        while !holds() {
            assert!(started.elapsed() < LONG, "{what}: not in {LONG:?}");
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Waits until a pod is, or is not, in the mesh: for its peers and for its ztunnel.
    pub(crate) fn wait_for_membership(&self, pod: &str, member: bool) {
        let wanted = member.then_some("enabled");
        self.until(&format!("{pod} is in the mesh: {member}"), || {
            redirection(&self.pod(pod)).as_deref() == wanted
                && self.mesh.pod_stats(self.name(), pod).is_ok() == member
        });
    }

    pub(crate) fn label_namespace(&self, label: &str) {
        let args = ["label", "namespace", self.name(), label];
        self.cluster.kubectl(&args).unwrap();
    }

    /// A counter of a pod's ztunnel.
    pub(crate) fn counted(&self, pod: &str, counter: &str) -> u64 {
        let stats = self.mesh.pod_stats(self.name(), pod).unwrap();
        stats[counter].as_u64().unwrap()
    }

    /// Which containers have been started when, and how often: the same again if nothing was started anew.
    pub(crate) fn starts(&self) -> BTreeMap<String, String> {
        let mut starts = BTreeMap::new();
        for pod in self.pods() {
            let name = pod["metadata"]["name"].as_str().unwrap();
            for one in pod["status"]["containerStatuses"].as_array().unwrap() {
                let facts = [
                    &one["containerID"],
                    &one["restartCount"],
                    &one["state"]["running"]["startedAt"],
                ];
                let facts = facts.map(ToString::to_string).join(" ");
                starts.insert(format!("{name}/{}", one["name"]), facts);
            }
        }
        starts
    }
}

/// The number behind a word in the last line that has it.
fn number_behind(word: &str, log: &str) -> Option<u64> {
    log.lines().rev().find_map(|line| {
        let mut words = line.split_whitespace();
        words.find(|one| *one == word)?;
        words.next()?.parse().ok()
    })
}

/// What the agent has written about a pod.
pub(crate) fn redirection(pod: &Value) -> Option<String> {
    let text = pod["metadata"]["annotations"]["ambient.istio.io/redirection"].as_str();
    text.map(str::to_owned)
}

/// A pod with a shell and curl, which serves nothing.
pub(crate) fn shell(name: &str, node: &str) -> Value {
    let mut shell = pod(name, node, &[]);
    shell["spec"]["containers"][0] = json!({
        "name": "main",
        "image": culvert_cluster::BUSYBOX,
        "command": ["sleep", "1000000"],
    });
    shell
}

/// A probe every second, whose answer may take its time: a busy machine is no application that fails.
pub(crate) fn often(mut probe: Value) -> Value {
    probe["periodSeconds"] = 1.into();
    probe["timeoutSeconds"] = 20.into();
    probe
}

/// The same at the start of a container, which may take a minute.
pub(crate) fn at_the_start(probe: Value) -> Value {
    let mut probe = often(probe);
    probe["failureThreshold"] = 60.into();
    probe
}

/// What was counted of clients that try again when they are not answered: each at least once, none more often than it has
/// tried.
pub(crate) fn counted_once_each(counted: u64, tries: &[u64]) {
    let (least, most) = (u64::try_from(tries.len()).unwrap(), tries.iter().sum());
    assert!(
        (least..=most).contains(&counted),
        "{counted} counted of as many tries as {tries:?}"
    );
}

/// A pod that keeps one connection up.
pub(crate) fn talker(name: &str, node: &str, to: SocketAddr) -> Value {
    pod(name, node, &["talk", &to.to_string()])
}
