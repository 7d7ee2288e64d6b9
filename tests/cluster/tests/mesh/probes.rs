//! The kubelet's probes of enrolled pods: all four kinds pass, also where the application is spoken to in the mesh alone,
//! and none of them is mesh traffic.

use culvert_cluster::{STRICT, pod};
use serde_json::json;

use crate::bed::{AMBIENT, Bed, PORT, at_the_start, often, shell};

/// How often the kubelet has asked a container, by kind and result, as it says itself.
fn asked(bed: &Bed, pod: &str, container: &str, kind: &str, result: &str) -> u64 {
    let node = bed.pod(pod)["spec"]["nodeName"]
        .as_str()
        .unwrap()
        .to_owned();
    let path = format!("--raw=/api/v1/nodes/{node}/proxy/metrics/probes");
    let text = bed.cluster.kubectl(&["get", &path]).unwrap();
    let wanted = [
        format!("namespace=\"{}\"", bed.name()),
        format!("pod=\"{pod}\""),
        format!("container=\"{container}\""),
        format!("probe_type=\"{kind}\""),
        format!("result=\"{result}\""),
    ];
    let line = text.lines().find(|line| {
        line.starts_with("prober_probe_total{") && wanted.iter().all(|one| line.contains(one))
    });
    let number = line.and_then(|line| line.rsplit(' ').next());
    number.map_or(0, |number| number.parse().unwrap())
}

#[test]
fn probes_of_every_kind_pass_and_are_not_mesh_traffic() {
    let bed = Bed::new("probes", &[AMBIENT]);
    let served = |name: &str, node: &str| {
        let mut pod = pod(name, node, &["serve", "--grpc=9090"]);
        pod["metadata"]["labels"][STRICT] = "yes".into();
        pod["spec"]["restartPolicy"] = "Always".into();
        let http = json!({"path": "/healthz", "port": PORT});
        let main = &mut pod["spec"]["containers"][0];
        main["startupProbe"] = at_the_start(json!({"httpGet": http}));
        main["readinessProbe"] = often(json!({"grpc": {"port": 9090}}));
        main["livenessProbe"] = often(json!({"tcpSocket": {"port": PORT}}));
        let command = ["cat", "/bin/busybox"];
        let exec = json!({
            "name": "exec",
            "image": culvert_cluster::BUSYBOX,
            "command": ["sleep", "1000000"],
            // The other container serves what it is asked for, and may start later.
            "startupProbe": at_the_start(json!({"httpGet": http})),
            "readinessProbe": often(json!({"exec": {"command": command}})),
            "livenessProbe": often(json!({"httpGet": http})),
        });
        pod["spec"]["containers"].as_array_mut().unwrap().push(exec);
        pod
    };
    bed.start(&[served("one", "node1"), served("two", "node2")]);
    bed.mesh.wait_until_enrolled("probes").unwrap();
    bed.mesh.tell_peers().unwrap();
    let before = bed.starts();

    // The policy is in force: plaintext is refused, the mesh is let in.
    let outside = Bed::new("probes-outside", &[]);
    outside.start(&[shell("shell", "node1")]);
    bed.start(&[shell("shell", "node1")]);
    bed.mesh.tell_peers().unwrap();
    let to = bed.addresses("two")[0];
    bed.until("plaintext is refused", || {
        outside.ask("shell", to).is_err() && bed.counted("two", "refused") > 0
    });
    bed.until("the mesh is let in", || {
        bed.ask("shell", to)
            .is_ok_and(|answer| answer.starts_with("two "))
    });
    let refused = bed.counted("two", "refused");
    let plain = bed.counted("two", "inbound_accepts");

    // Many more probes under that policy, of every kind: by gRPC, to a port, by a command, by HTTP.
    for pod in ["one", "two"] {
        for container in ["main", "exec"] {
            assert!(asked(&bed, pod, container, "Startup", "successful") > 0);
            for kind in ["Readiness", "Liveness"] {
                let asked = |result: &str| asked(&bed, pod, container, kind, result);
                let before = asked("successful");
                let what = format!("{container} of {pod} was asked for its {kind} again");
                bed.until(&what, || asked("successful") >= before + 6);
            }
            let failed = asked(&bed, pod, container, "Liveness", "failed");
            assert_eq!(failed, 0, "{container} of {pod}");
        }
    }
    let starts = bed.starts();
    for (container, start) in before {
        assert_eq!(starts[&container], start, "{container}");
    }
    assert_eq!(bed.counted("one", "inbound_accepts"), 0);
    assert_eq!(bed.counted("two", "inbound_accepts"), plain);
    assert_eq!(bed.counted("two", "refused"), refused);
}
