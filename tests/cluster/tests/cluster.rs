//! The whole cluster: that it is a real one, and that nothing is left of it.

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
    startupProbe: {{httpGet: {{path: /, port: 8080}}, periodSeconds: 1, failureThreshold: 30}}
    readinessProbe: {{tcpSocket: {{port: 8080}}, periodSeconds: 1}}
    livenessProbe: {{exec: {{command: [cat, /www/index.html]}}, periodSeconds: 5}}
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
