//! The whole cluster: that it is a real one, and that nothing is left of it.
#![expect(
    clippy::unwrap_used,
    reason = "test code: a step that fails is a test that fails"
)]

use std::time::{Duration, Instant};

use culvert_cluster::{Cluster, Options, Service};

const LONG: Duration = Duration::from_secs(120);

/// A server and a client on each node, with probes of three kinds, and a dual-stack Service.
fn workload(namespace: &str) -> String {
    let mut manifests = format!(
        "apiVersion: v1\nkind: Namespace\nmetadata: {{name: {namespace}}}\n---\n\
         apiVersion: v1\nkind: Service\nmetadata: {{name: web, namespace: {namespace}}}\n\
         spec: {{selector: {{app: web}}, ports: [{{port: 80, targetPort: 8080}}], ipFamilyPolicy: RequireDualStack}}\n"
    );
    for node in ["node1", "node2"] {
        manifests += &format!(
            r#"---
apiVersion: v1
kind: Pod
metadata: {{name: web-{node}, namespace: {namespace}, labels: {{app: web}}}}
spec:
  nodeName: {node}
  terminationGracePeriodSeconds: 1
  containers:
  - name: web
    image: culvert.test/busybox:1
    command: [sh, -c, "echo serving; mkdir /www; echo $NODE > /www/index.html; exec httpd -f -p 8080 -h /www"]
    env: [{{name: NODE, valueFrom: {{fieldRef: {{fieldPath: spec.nodeName}}}}}}]
    startupProbe: {{httpGet: {{path: /, port: 8080}}, periodSeconds: 1, timeoutSeconds: 20, failureThreshold: 60}}
    readinessProbe: {{tcpSocket: {{port: 8080}}, periodSeconds: 1, timeoutSeconds: 20}}
    livenessProbe: {{exec: {{command: [cat, /www/index.html]}}, periodSeconds: 5, timeoutSeconds: 20}}
"#
        );
    }
    manifests
}

#[test]
fn pods_run_on_both_nodes_and_reach_each_other_by_both_families() {
    let started = Instant::now();
    let cluster = Cluster::up(&Options {
        name: "whole".to_owned(),
        ..Options::default()
    })
    .unwrap();
    eprintln!("up in {:?}", started.elapsed());
    cluster.apply(&workload("whole")).unwrap();
    let ready = [
        "wait",
        "--for=condition=Ready",
        "pod",
        "--all",
        "-n",
        "whole",
        "--timeout=120s",
    ];
    cluster.kubectl(&ready).unwrap();
    eprintln!("pods ready {:?} after the start", started.elapsed());

    let pods = cluster.admin().get(&["pods", "-n", "whole"]).unwrap();
    let service = cluster
        .admin()
        .get(&["service", "web", "-n", "whole"])
        .unwrap();
    let url = |address: &str, port: u16| {
        if address.contains(':') {
            format!("http://[{address}]:{port}/")
        } else {
            format!("http://{address}:{port}/")
        }
    };
    let from = |pod: &str, url: &str| {
        cluster.kubectl(&[
            "exec",
            "-n",
            "whole",
            pod,
            "--",
            "curl",
            "-sSfg",
            "--max-time",
            "10",
            url,
        ])
    };
    for pod in pods["items"].as_array().unwrap() {
        let node = pod["spec"]["nodeName"].as_str().unwrap();
        let addresses = pod["status"]["podIPs"].as_array().unwrap();
        assert_eq!(addresses.len(), 2, "{pod:#}");
        for client in ["web-node1", "web-node2"] {
            for address in addresses {
                let url = url(address["ip"].as_str().unwrap(), 8080);
                assert_eq!(
                    from(client, &url).unwrap().trim(),
                    node,
                    "{client} to {url}"
                );
            }
        }
        let name = pod["metadata"]["name"].as_str().unwrap();
        let log = cluster.kubectl(&["logs", "-n", "whole", name]).unwrap();
        assert_eq!(log.trim(), "serving");
    }
    for client in ["web-node1", "web-node2"] {
        for address in service["spec"]["clusterIPs"].as_array().unwrap() {
            let url = url(address.as_str().unwrap(), 80);
            // The rules of a new Service come a moment later.
            let mut seen = std::collections::BTreeSet::new();
            let started = Instant::now();
            while seen.len() < 2 {
                if let Ok(node) = from(client, &url) {
                    seen.insert(node.trim().to_owned());
                }
                assert!(started.elapsed() < LONG, "{client} to {url}: only {seen:?}");
            }
        }
    }
    // A pod's own account reaches the API server through its Service.
    let token = cluster
        .kubectl(&[
            "exec",
            "-n",
            "whole",
            "web-node2",
            "--",
            "cat",
            "/var/run/secrets/kubernetes.io/serviceaccount/token",
        ])
        .unwrap();
    assert_eq!(token.matches('.').count(), 2, "{token}");

    let node = cluster.node("node1").unwrap();
    let (netns, dir) = (node.netns(), node.dir().to_path_buf());
    assert!(
        cluster
            .run_on(&node, &["ip", "link", "show", "cni0"])
            .is_ok()
    );
    drop(cluster);
    let left = |command: &[&str]| {
        let (program, args) = command.split_first().unwrap();
        #[expect(
            clippy::disallowed_methods,
            reason = "looking at the machine from outside"
        )]
        let output = std::process::Command::new(program)
            .args(args)
            .output()
            .unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    assert!(!dir.exists());
    assert!(!left(&["ip", "netns", "list"]).contains(&netns));
    let bridge = netns.split('-').next().unwrap();
    assert!(!left(&["ip", "-o", "link"]).contains(&format!("{bridge}:")));
    assert!(!left(&["cat", "/proc/mounts"]).contains(&netns));
    assert!(!left(&["find", "/sys/fs/cgroup", "-maxdepth", "2", "-type", "d"]).contains(&netns));
}

#[test]
fn a_node_loses_its_power_and_its_services_and_comes_back() {
    let cluster = Cluster::up(&Options {
        name: "power".to_owned(),
        nodes: 1,
        ..Options::default()
    })
    .unwrap();
    cluster
        .apply(
            r#"
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: d, namespace: default}
spec:
  selector: {matchLabels: {app: d}}
  template:
    metadata: {labels: {app: d}}
    spec:
      hostPID: true
      terminationGracePeriodSeconds: 1
      containers:
      - name: d
        image: culvert.test/busybox:1
        command: [sleep, "1000000"]
        volumeMounts: [{name: run, mountPath: /host/run}]
      volumes: [{name: run, hostPath: {path: /run}}]
"#,
        )
        .unwrap();
    let rolled_out = ["rollout", "status", "daemonset/d", "--timeout=120s"];
    cluster.kubectl(&rolled_out).unwrap();
    let in_pod =
        |command: &[&str]| cluster.kubectl(&[&["exec", "daemonset/d", "--"][..], command].concat());
    // Host paths and the host's processes are those of the node, not of the machine.
    assert!(in_pod(&["ls", "/host/run/node-is-ready"]).is_ok());
    let processes = in_pod(&["ps", "-o", "args"]).unwrap();
    assert!(processes.contains("kubelet --config"), "{processes}");
    assert!(!processes.contains("kube-apiserver"), "{processes}");

    let node = cluster.node("node1").unwrap();
    let id = || {
        let pods = cluster.admin().get(&["pods"]).unwrap();
        pods["items"][0]["status"]["containerStatuses"][0]["containerID"].to_string()
    };
    let before = id();
    for service in [Service::Kubelet, Service::Containerd] {
        cluster.stop_service(&node, service).unwrap();
        cluster.start_service(&node, service).unwrap();
    }
    cluster
        .admin()
        .wait_until(
            "exec works again",
            LONG,
            &["exec", "daemonset/d", "--", "true"],
            |_| true,
        )
        .unwrap();
    assert_eq!(id(), before, "containers outlive kubelet and containerd");

    cluster
        .run_on(&node, &["touch", "/run/gone", "/var/lib/stays"])
        .unwrap();
    cluster.power_off(&node).unwrap();
    assert!(cluster.run_on(&node, &["true"]).is_err());
    cluster
        .power_on(&node, &[Service::Kubelet, Service::KubeProxy])
        .unwrap();
    assert!(cluster.run_on(&node, &["ls", "/run/gone"]).is_err());
    assert!(cluster.run_on(&node, &["ls", "/var/lib/stays"]).is_ok());
    let started = Instant::now();
    while id() == before || in_pod(&["true"]).is_err() {
        assert!(started.elapsed() < LONG, "the pod does not come back");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Every process number in a cluster's notes.
fn processes(state: &serde_json::Value) -> Vec<String> {
    match state {
        serde_json::Value::Object(map) => map
            .iter()
            .flat_map(|(key, value)| match value.as_i64() {
                Some(pid) if key == "pid" => vec![pid.to_string()],
                _ => processes(value),
            })
            .collect(),
        serde_json::Value::Array(list) => list.iter().flat_map(processes).collect(),
        _ => Vec::new(),
    }
}

/// `cargo xtask cluster` by its program, for one cluster, which goes with the value.
struct Verbs(String);

impl Verbs {
    fn run(&self, words: &[&str]) -> (bool, String) {
        let words = [words, &["--name", &self.0]].concat();
        command(env!("CARGO_BIN_EXE_culvert-cluster"), &words)
    }

    /// Starts it and returns its directory.
    fn up(&self) -> std::path::PathBuf {
        let (done, said) = self.run(&["up", "--nodes", "1", "--cni", "none"]);
        assert!(done, "{said}");
        let kubeconfig = said
            .lines()
            .find_map(|line| line.strip_prefix("export KUBECONFIG="));
        let mut dir = std::path::PathBuf::from(kubeconfig.unwrap());
        assert!(dir.pop());
        dir
    }
}

impl Drop for Verbs {
    fn drop(&mut self) {
        let (done, said) = self.run(&["down"]);
        if !done {
            eprintln!("{said}");
        }
    }
}

/// Whether it succeeded, and all that it said.
#[expect(clippy::disallowed_methods, reason = "the verbs are tested")]
fn command(program: &str, words: &[&str]) -> (bool, String) {
    let output = std::process::Command::new(program)
        .args(words)
        .output()
        .unwrap();
    let said = [&output.stdout[..], &output.stderr].concat();
    (
        output.status.success(),
        String::from_utf8_lossy(&said).into_owned(),
    )
}

#[test]
fn one_that_was_killed_is_no_obstacle_to_the_next_of_its_name() {
    let verbs = Verbs(format!("stale{}", std::process::id()));
    let dir = verbs.up();
    let read = || -> serde_json::Value {
        let text = std::fs::read_to_string(dir.join("state.json")).unwrap();
        serde_json::from_str(&text).unwrap()
    };
    let first = read();
    let pids = processes(&first);
    assert!(pids.len() >= 7, "{first:#}");
    let words: Vec<&str> = ["-9"]
        .into_iter()
        .chain(pids.iter().map(String::as_str))
        .collect();
    // One that ends with another is gone by then.
    let _some_gone = command("kill", &words);
    let started = Instant::now();
    while verbs.run(&["status", "-o", "json"]).0 {
        assert!(started.elapsed() < LONG, "killed, it counts as up");
        std::thread::sleep(Duration::from_millis(200));
    }

    // What is left of it is in nobody's way.
    assert_eq!(verbs.up(), dir);
    assert!(processes(&read()).iter().all(|pid| !pids.contains(pid)));
    for _twice in 0..2 {
        let (done, said) = verbs.run(&["down"]);
        assert!(done, "{said}");
    }
    assert!(!dir.exists());
    // Whoever comes next may have its addresses, but nothing has its directory.
    let name = dir.display().to_string();
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
    assert!(!mounts.contains(&name), "{mounts}");
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        assert!(!line.contains(&name), "{line}");
    }
}
