//! Who is in the mesh, and what running pods notice of it: nothing.

use culvert_cluster::{AGENT, PROXY, pod};
use serde_json::{Value, json};

use crate::bed::{AMBIENT, Bed, counted_once_each, redirection, shell, talker};
use crate::elsewhere::Elsewhere;

#[test]
fn a_running_namespace_goes_in_and_out_without_a_restart_and_without_a_cut() {
    let bed = Bed::new("live", &[]);
    bed.start_servers();
    let (near, far) = (bed.addresses("a"), bed.addresses("b"));
    bed.start(&[
        shell("shell", "node1"),
        talker("near", "node1", near[0]),
        talker("far", "node1", far[0]),
        talker("far6", "node1", far[1]),
    ]);
    let talkers = ["near", "far", "far6"];
    for talker in talkers {
        bed.wait_for_more_lines(talker);
    }
    assert!(bed.ask("shell", far[0]).unwrap().starts_with("b "));
    assert!(bed.mesh.pod_stats("live", "shell").is_err());
    let before = bed.starts();

    bed.label_namespace(AMBIENT);
    bed.mesh.wait_until_enrolled("live").unwrap();
    bed.mesh.tell_peers().unwrap();
    bed.until("new connections are carried in HBONE", || {
        bed.ask("shell", far[0]).unwrap();
        bed.counted("shell", "hbone_out") > 0
    });
    for talker in talkers {
        bed.wait_for_more_lines(talker);
    }
    assert_eq!(bed.starts(), before);

    // One that begins inside the mesh, to be kept too when the pods leave it.
    bed.apply(&[talker("inside", "node1", far[0])]);
    bed.wait_for_more_lines("inside");
    let tries = bed.tries("inside", "main");
    counted_once_each(bed.counted("inside", "hbone_out"), &[tries]);
    let before = bed.starts();
    bed.label_namespace("istio.io/dataplane-mode-");
    for pod in ["a", "b", "shell", "near", "far", "far6", "inside"] {
        bed.until(&format!("{pod} has left"), || {
            redirection(&bed.pod(pod)).is_none()
        });
    }
    bed.mesh.tell_peers().unwrap();
    bed.until("new connections go direct", || {
        // Nobody's ztunnel is between: the server sees the client itself, and so it did before; nothing is counted.
        bed.ask("shell", far[0])
            .is_ok_and(|answer| answer.starts_with("b "))
            && bed.mesh.pod_stats("live", "shell").is_err()
    });
    for talker in ["near", "far", "far6", "inside"] {
        bed.wait_for_more_lines(talker);
    }
    assert_eq!(bed.starts(), before, "nothing was started anew");
}

#[test]
fn a_pods_label_beats_its_namespaces() {
    let bed = Bed::new("labels", &[]);
    let labelled = |name: &str, node: &str, mode: &str| {
        let mut pod = pod(name, node, &["serve"]);
        pod["metadata"]["labels"]["istio.io/dataplane-mode"] = mode.into();
        pod
    };
    bed.start(&[
        labelled("opted-in", "node1", "ambient"),
        labelled("opted-out", "node2", "none"),
        pod("neither", "node1", &["serve"]),
    ]);
    bed.wait_for_membership("opted-in", true);
    bed.wait_for_membership("neither", false);
    bed.wait_for_membership("opted-out", false);
    bed.label_namespace(AMBIENT);
    bed.wait_for_membership("neither", true);
    bed.wait_for_membership("opted-out", false);
    // Live, both ways.
    let label = |pod: &str, label: &str| {
        let args = ["label", "pod", pod, "--overwrite", label];
        bed.namespace.kubectl(&args).unwrap();
    };
    label("opted-out", AMBIENT);
    label("opted-in", "istio.io/dataplane-mode=none");
    bed.wait_for_membership("opted-out", true);
    bed.wait_for_membership("opted-in", false);
    label("opted-in", "istio.io/dataplane-mode-");
    bed.wait_for_membership("opted-in", true);
}

#[test]
fn pods_of_the_node_of_the_system_and_of_the_mesh_itself_are_left_alone() {
    let bed = Bed::new("spared", &[AMBIENT]);
    let mut host = shell("host", "node1");
    host["spec"]["hostNetwork"] = true.into();
    let mut sidecar = shell("sidecar", "node1");
    sidecar["metadata"]["annotations"] = json!({"sidecar.istio.io/status": "{}"});
    let mut system = shell("spared-system", "node1");
    system["metadata"]["labels"]["istio.io/dataplane-mode"] = "ambient".into();
    let _system = Elsewhere::pod(&bed, "kube-system", system);
    // Labelled, a namespace of the mesh's own: ztunnel is to be passed over even so.
    let _label = Elsewhere::label(&bed, PROXY.1, AMBIENT);
    bed.start(&[host, sidecar]);
    // Later than all of them, and enrolled: by then the others would have been.
    let _later = Elsewhere::pod(&bed, PROXY.1, shell("spared-later", "node1"));
    bed.start(&[shell("plain", "node1")]);
    bed.wait_for_membership("plain", true);
    let of = |namespace: &str, name: &str| {
        let args = ["pod", name, "-n", namespace];
        bed.cluster.admin().get(&args).unwrap()
    };
    bed.until("a pod of ztunnel's namespace is in the mesh", || {
        redirection(&of(PROXY.1, "spared-later")).as_deref() == Some("enabled")
    });
    for (namespace, name) in [
        (bed.name(), "host"),
        (bed.name(), "sidecar"),
        ("kube-system", "spared-system"),
    ] {
        assert_eq!(redirection(&of(namespace, name)), None, "{name}");
        assert!(bed.mesh.pod_stats(namespace, name).is_err(), "{name}");
    }
    for (name, namespace) in [AGENT, PROXY] {
        let pods = bed.cluster.admin().get(&["pods", "-n", namespace]).unwrap();
        let of_it = |pod: &&Value| pod["metadata"]["ownerReferences"][0]["name"] == name;
        let pods: Vec<_> = pods["items"]
            .as_array()
            .unwrap()
            .iter()
            .filter(of_it)
            .collect();
        assert_eq!(pods.len(), 2, "{name} on each node");
        for pod in pods {
            assert_eq!(redirection(pod), None, "{pod:#}");
        }
    }
}
