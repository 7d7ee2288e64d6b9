//! Culvert on a real Kubernetes: real kubelets, a real container runtime, a real CNI chain, two nodes.
#![expect(
    clippy::unwrap_used,
    reason = "test code: a step that fails is a test that fails"
)]

use std::net::IpAddr;

use culvert_cluster::{Cluster, Mesh, Namespace, Options};
use serde_json::Value;

fn options() -> Options {
    Options {
        name: "culvert".to_owned(),
        ..Options::default()
    }
}

/// A server on each node, which is a client too.
fn webs() -> String {
    ["node1", "node2"]
        .map(|node| {
            format!(
                r#"
apiVersion: v1
kind: Pod
metadata: {{name: web-{node}, labels: {{app: web}}}}
spec:
  nodeName: {node}
  terminationGracePeriodSeconds: 1
  containers:
  - name: web
    image: culvert.test/busybox:1
    command: [sh, -c, "mkdir /www; echo {node} > /www/index.html; exec httpd -f -p 8080 -h /www"]
    readinessProbe: {{httpGet: {{path: /, port: 8080}}, periodSeconds: 1}}
    livenessProbe: {{tcpSocket: {{port: 8080}}, periodSeconds: 1}}
"#
            )
        })
        .join("---")
}

/// Every pod asks every pod, by both families; the answer has to be the right one's.
fn everybody_asks_everybody(cluster: &Cluster, namespace: &Namespace<'_>) -> usize {
    let pods = cluster
        .admin()
        .get(&["pods", "-n", namespace.name()])
        .unwrap();
    let pods: &[Value] = pods["items"].as_array().unwrap();
    let mut asked = 0;
    for (client, server) in pods.iter().flat_map(|c| pods.iter().map(move |s| (c, s))) {
        let client = client["metadata"]["name"].as_str().unwrap();
        for address in server["status"]["podIPs"].as_array().unwrap() {
            let address: IpAddr = address["ip"].as_str().unwrap().parse().unwrap();
            let url = format!("http://{}/", std::net::SocketAddr::new(address, 8080));
            let ask = ["curl", "-sSfg", "--max-time", "20", &url];
            let answer = namespace.exec(client, &ask).unwrap();
            assert_eq!(answer.trim(), server["spec"]["nodeName"].as_str().unwrap());
            asked += 1;
        }
    }
    asked
}

#[test]
fn pods_of_a_labelled_namespace_speak_hbone_from_node_to_node() {
    let cluster = Cluster::shared(&options()).unwrap();
    let mesh = Mesh::install(cluster).unwrap();
    let namespace = cluster
        .namespace("hbone", &["istio.io/dataplane-mode=ambient"])
        .unwrap();
    namespace.apply(&webs()).unwrap();
    // Probes of the kubelet pass although the pods have been in the mesh from their first instruction.
    namespace.wait_until_ready().unwrap();
    mesh.wait_until_enrolled("hbone").unwrap();
    mesh.tell_peers().unwrap();
    assert_eq!(everybody_asks_everybody(cluster, &namespace), 8);
    for pod in ["web-node1", "web-node2"] {
        let stats = mesh.pod_stats("hbone", pod).unwrap();
        // To the other pod by both families; a pod's talk to itself is its own business.
        assert_eq!(stats["outbound_accepts"], 2, "{stats}");
        assert_eq!(stats["hbone_out"], 2, "{stats}");
        assert_eq!(stats["hbone_in"], 2, "{stats}");
        assert_eq!(
            stats["inbound_accepts"], 0,
            "probes are not mesh traffic: {stats}"
        );
    }
}

#[test]
fn a_running_namespace_goes_in_and_out_of_the_mesh_without_a_restart() {
    let cluster = Cluster::shared(&options()).unwrap();
    let mesh = Mesh::install(cluster).unwrap();
    let namespace = cluster.namespace("live", &[]).unwrap();
    namespace.apply(&webs()).unwrap();
    namespace.wait_until_ready().unwrap();
    assert_eq!(everybody_asks_everybody(cluster, &namespace), 8);
    assert!(mesh.pod_stats("live", "web-node1").is_err());

    let label = [
        "label",
        "namespace",
        "live",
        "istio.io/dataplane-mode=ambient",
    ];
    cluster.kubectl(&label).unwrap();
    mesh.wait_until_enrolled("live").unwrap();
    everybody_asks_everybody(cluster, &namespace);
    let stats = mesh.pod_stats("live", "web-node1").unwrap();
    assert_eq!(stats["outbound_accepts"], 2, "{stats}");

    let unlabel = ["label", "namespace", "live", "istio.io/dataplane-mode-"];
    cluster.kubectl(&unlabel).unwrap();
    let annotation = r"jsonpath={.items[*].metadata.annotations.ambient\.istio\.io/redirection}";
    let pods = ["get", "pods", "-n", "live", "-o", annotation];
    let limit = std::time::Duration::from_secs(120);
    cluster
        .admin()
        .wait_until("both have left", limit, &pods, str::is_empty)
        .unwrap();
    everybody_asks_everybody(cluster, &namespace);
    let restarts = "jsonpath={.items[*].status.containerStatuses[*].restartCount}";
    let restarts = namespace.kubectl(&["get", "pods", "-o", restarts]).unwrap();
    assert_eq!(restarts, "0 0");
}
