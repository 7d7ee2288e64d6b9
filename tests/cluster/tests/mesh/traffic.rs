//! Traffic of enrolled pods: from node to node and within one, both families, through Services, and what kubectl does with
//! pods.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use culvert_cluster::pod;
use serde_json::json;

use crate::bed::{AMBIENT, Bed, shell};

#[test]
fn pods_speak_hbone_within_a_node_and_from_node_to_node_in_both_families() {
    let bed = Bed::new("hbone", &[AMBIENT]);
    bed.start(&[
        pod("a", "node1", &["serve"]),
        pod("b", "node2", &["serve"]),
        shell("one", "node1"),
        shell("two", "node2"),
    ]);
    bed.mesh.wait_until_enrolled("hbone").unwrap();
    bed.mesh.tell_peers().unwrap();
    // Ztunnels read their peers a moment later.
    bed.until("ztunnels know their peers", || {
        ["one", "two"].iter().all(|client| {
            bed.ask(client, bed.addresses("a")[0]).unwrap();
            bed.counted(client, "hbone_out") > 0
        })
    });
    for client in ["one", "two"] {
        let own = bed.addresses(client);
        for server in ["a", "b"] {
            for (to, own) in bed.addresses(server).into_iter().zip(&own) {
                let carried = || {
                    [
                        bed.counted(client, "hbone_out"),
                        bed.counted(server, "hbone_in"),
                    ]
                };
                let before = carried();
                let answer = bed.ask(client, to).unwrap();
                // The server sees the client's own address.
                assert_eq!(answer, format!("{server} {}", own.ip()), "{client} to {to}");
                assert_eq!(carried(), before.map(|count| count + 1), "{client} to {to}");
            }
        }
    }
}

#[test]
fn services_reach_enrolled_pods_from_inside_and_outside() {
    let bed = Bed::new("services", &[AMBIENT]);
    let service = json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web"},
        "spec": {
            "selector": {"culvert.test/web": "yes"},
            "ports": [{"port": 80, "targetPort": 8080}],
            "ipFamilyPolicy": "RequireDualStack",
        },
    });
    let web = |name: &str, node: &str| {
        let mut pod = pod(name, node, &["serve"]);
        pod["metadata"]["labels"]["culvert.test/web"] = "yes".into();
        pod
    };
    let outside = Bed::new("services-outside", &[]);
    bed.apply(&[service]);
    bed.start(&[web("a", "node1"), web("b", "node2"), shell("in", "node1")]);
    outside.start(&[shell("out", "node2")]);
    bed.mesh.wait_until_enrolled("services").unwrap();
    let args = ["service", "web", "-n", "services"];
    let service = bed.cluster.admin().get(&args).unwrap();
    let addresses = service["spec"]["clusterIPs"].as_array().unwrap();
    assert_eq!(addresses.len(), 2);
    for address in addresses {
        let address: IpAddr = address.as_str().unwrap().parse().unwrap();
        let to = SocketAddr::new(address, 80);
        for (bed, client) in [(&bed, "in"), (&outside, "out")] {
            let mut seen = BTreeSet::new();
            // The rules of a new Service come a moment later, and which pod answers is chance.
            bed.until(&format!("{client} reaches both pods by {to}"), || {
                if let Ok(answer) = bed.ask(client, to) {
                    seen.insert(answer.split(' ').next().unwrap().to_owned());
                }
                seen.len() == 2
            });
        }
    }
    // All of it through ztunnel, on both sides.
    assert!(bed.counted("in", "outbound_accepts") >= 4);
    for server in ["a", "b"] {
        assert!(bed.counted(server, "inbound_accepts") >= 2, "{server}");
    }
}

#[test]
fn exec_logs_and_port_forward_work_on_enrolled_pods() {
    let bed = Bed::new("kubectl", &[AMBIENT]);
    bed.start(&[pod("a", "node1", &["serve"]), shell("shell", "node2")]);
    bed.mesh.wait_until_enrolled("kubectl").unwrap();
    assert!(bed.log("a").contains("serving on port 8080"));
    let hello = bed.namespace.exec("shell", &["echo", "hello"]).unwrap();
    assert_eq!(hello, "hello\n");

    let answer = bed.namespace.get_forwarded("a", 8080).unwrap();
    assert!(answer.contains("\r\n\r\na "), "{answer}");
    // From within the pod, by its loopback: nobody's business.
    assert_eq!(bed.counted("a", "inbound_accepts"), 0);
}
