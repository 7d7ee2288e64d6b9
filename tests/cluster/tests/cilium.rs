//! Culvert beside the real Cilium, at its fast settings: no kube-proxy, routing and masquerading in BPF, socket load
//! balancing for the host alone.
#![expect(
    clippy::unwrap_used,
    reason = "test code: a step that fails is a test that fails"
)]

mod webs;

use culvert_cluster::{Cluster, Cni, Mesh, Options, Service};

use crate::webs::{everybody_asks_everybody, webs};

fn options() -> Options {
    Options {
        name: "cilium".to_owned(),
        cni: Cni::Cilium,
        ..Options::default()
    }
}

#[test]
fn pods_of_cilium_reach_each_other_and_a_service() {
    let cluster = Cluster::shared(&options()).unwrap();
    let namespace = cluster.namespace("plain", &[]).unwrap();
    namespace.apply(&webs()).unwrap();
    namespace
        .apply(
            "apiVersion: v1\nkind: Service\nmetadata: {name: web}\n\
             spec: {selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}\n",
        )
        .unwrap();
    namespace.wait_until_ready().unwrap();
    assert_eq!(everybody_asks_everybody(cluster, &namespace), 8);
    let address = "jsonpath={.spec.clusterIP}";
    let address = namespace
        .kubectl(&["get", "service", "web", "-o", address])
        .unwrap();
    let url = format!("http://{address}/");
    // The rules of a new Service come a moment later.
    let ask = [
        "curl",
        "-sSf",
        "--retry",
        "20",
        "--retry-all-errors",
        "--retry-delay",
        "1",
        &url,
    ];
    let answer = namespace.exec("web-node1", &ask).unwrap();
    assert!(answer.starts_with("node"), "{answer}");
}

#[test]
fn enrolled_pods_answer_their_probes_beside_cilium_and_speak_hbone() {
    let cluster = Cluster::shared(&options()).unwrap();
    let mesh = Mesh::install(cluster).unwrap();
    let namespace = cluster
        .namespace("mesh", &["istio.io/dataplane-mode=ambient"])
        .unwrap();
    namespace.apply(&webs()).unwrap();
    namespace.wait_until_ready().unwrap();
    mesh.wait_until_enrolled("mesh").unwrap();
    mesh.tell_peers().unwrap();
    // Cilium's agent starts anew while pods run: it loads its programs again and writes its CNI configuration.
    for node in cluster.nodes() {
        cluster.stop_service(&node, Service::Cilium).unwrap();
        cluster.start_service(&node, Service::Cilium).unwrap();
    }
    assert_eq!(everybody_asks_everybody(cluster, &namespace), 8);
    for pod in ["web-node1", "web-node2"] {
        let stats = mesh.pod_stats("mesh", pod).unwrap();
        assert_eq!(stats["hbone_out"], 2, "{stats}");
        assert_eq!(stats["hbone_in"], 2, "{stats}");
        assert_eq!(
            stats["inbound_accepts"], 0,
            "probes are not mesh traffic: {stats}"
        );
    }
    let restarts = "jsonpath={.items[*].status.containerStatuses[*].restartCount}";
    let restarts = namespace.kubectl(&["get", "pods", "-o", restarts]).unwrap();
    assert_eq!(restarts, "0 0", "liveness probes pass");
}
