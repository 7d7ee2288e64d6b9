//! Culvert on a real Kubernetes: real kubelets, a real container runtime, a real CNI chain, two nodes.
#![expect(
    clippy::unwrap_used,
    reason = "test code: a step that fails is a test that fails"
)]

mod webs;

use culvert_cluster::{Cluster, Mesh, Options};

use crate::webs::{everybody_asks_everybody, webs};

fn options() -> Options {
    Options {
        name: "culvert".to_owned(),
        ..Options::default()
    }
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
