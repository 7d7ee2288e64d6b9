//! DNS capture beside the real Cilium with socket load balancing for pods, which replaces the address of the DNS service
//! inside `connect()` and `sendmsg()`: ours must see it first. In a cgroup of its own: Cilium's programs are on every
//! socket below theirs.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "test code: a step that fails is a test that fails"
)]

use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use culvert_cluster::{
    AGENT, Apart, Cluster, Cni, Image, Mesh, Namespace, Options, PROXY, Part, Parts, Service,
    coredns,
};
use serde_json::Value;

const IMAGE: &str = "culvert.test/lookup:1";
const BY_ZTUNNEL: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const BY_COREDNS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
/// The v2 hierarchy as the agent sees it.
const HOST_CGROUP: &str = "/host/sys/fs/cgroup/unified";
const PATIENCE: Duration = Duration::from_secs(120);

/// `dig`, which connects its sockets, and a client of musl, which does not and checks who answered.
fn lookup_image(cluster: &Cluster) -> Image {
    let musl = cluster.scratch().join("lookup-musl");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../e2e/clients/lookup.c");
    #[expect(clippy::disallowed_methods, reason = "tests run real programs")]
    let status = Command::new("musl-gcc")
        .args(["-static", "-o"])
        .args([&musl, &source])
        .status();
    assert!(status.unwrap().success(), "musl-gcc (package musl-tools)");
    Image::new(IMAGE)
        .program("bin/dig", "/usr/bin/dig")
        .unwrap()
        .program("bin/lookup", musl)
        .unwrap()
        .program("bin/sleep", "/bin/sleep")
        .unwrap()
        .entrypoint(&["/bin/sleep", "100000"])
}

fn client(name: &str) -> String {
    let resolver = coredns::KUBE_DNS;
    format!(
        r#"
apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  terminationGracePeriodSeconds: 1
  dnsPolicy: None
  dnsConfig: {{nameservers: ["{resolver}"]}}
  containers:
  - {{name: client, image: "{IMAGE}"}}
"#
    )
}

/// What is answered by now, waiting as long as it is something else.
fn eventually(what: &str, wanted: &str, mut ask: impl FnMut() -> anyhow::Result<String>) -> String {
    let began = Instant::now();
    loop {
        let said = ask();
        if let Ok(said) = &said
            && said.contains(wanted)
        {
            return said.clone();
        }
        if began.elapsed() > PATIENCE {
            panic!("{what}: no `{wanted}`, but {said:?}");
        }
        std::thread::sleep(Duration::from_millis(500));
    }
}

/// Every client is told this of a name, under the name of the service.
fn all_are_told(namespace: &Namespace<'_>, name: &str, by: Ipv4Addr) {
    let by = by.to_string();
    for way in ["+notcp", "+tcp"] {
        let said = eventually(&format!("dig {way} {name}"), &by, || {
            namespace.exec("client", &["/bin/dig", way, name])
        });
        let server = format!("SERVER: {0}#53({0})", coredns::KUBE_DNS);
        assert!(said.contains(&server) && said.contains(&by), "{said}");
        // dig says so when an answer comes from somebody else.
        assert!(!said.contains("reply from unexpected source"), "{said}");
    }
    let said = namespace
        .exec("client", &["/bin/lookup", name, "3", "0"])
        .unwrap();
    assert_eq!(said.matches(&format!("{by} ")).count(), 3, "{said}");
}

fn queries(mesh: &Mesh<'_>) -> u64 {
    let stats: Value = mesh.pod_stats("meshed", "client").unwrap();
    stats["dns_queries"].as_u64().unwrap()
}

#[test]
fn lookups_reach_ztunnel_although_cilium_balances_the_dns_service() {
    let apart = Apart::enter(&format!("culvert-dns-{}", std::process::id())).unwrap();
    let cluster = Cluster::up(&Options {
        name: "dnscilium".to_owned(),
        nodes: 1,
        cni: Cni::Cilium,
        on_its_own: false,
    })
    .unwrap();
    let node = cluster.node("node1").unwrap();
    let everywhere = r#"{"data":{"bpf-lb-sock-hostns-only":"false","bpf-lb-sock":"true"}}"#;
    let patch = [
        "patch",
        "configmap",
        "cilium-config",
        "-n",
        "kube-system",
        "-p",
        everywhere,
    ];
    cluster.kubectl(&patch).unwrap();
    cluster.stop_service(&node, Service::Cilium).unwrap();
    cluster.start_service(&node, Service::Cilium).unwrap();
    let dbg = Parts::find().unwrap().get(Part::CiliumDbg).unwrap();
    let status = [dbg.to_str().unwrap(), "status", "--verbose"];
    let said = eventually("cilium-dbg status", "Socket LB Coverage:", || {
        cluster.run_on(&node, &status)
    });
    let coverage = said
        .lines()
        .find(|line| line.contains("Socket LB Coverage:"));
    assert!(coverage.unwrap_or_default().contains("Full"), "{said}");

    coredns::install(&cluster, BY_COREDNS).unwrap();
    cluster.add_image(&lookup_image(&cluster)).unwrap();
    let mesh = Mesh::install(&cluster).unwrap();
    let here = apart.dir().file_name().unwrap().to_str().unwrap();
    for (daemonset, namespace, args) in [
        (
            AGENT.0,
            AGENT.1,
            vec![format!("--dns-cgroup={HOST_CGROUP}/{here}")],
        ),
        (
            PROXY.0,
            PROXY.1,
            vec![
                format!("--dns-name=mesh.test={BY_ZTUNNEL}"),
                format!("--dns-upstream={}:53", coredns::KUBE_DNS),
            ],
        ),
    ] {
        let path = "/spec/template/spec/containers/0/args/-";
        let steps: Vec<Value> = args
            .iter()
            .map(|arg| serde_json::json!({"op": "add", "path": path, "value": arg}))
            .collect();
        let steps = Value::from(steps).to_string();
        let patch = [
            "patch",
            "daemonset",
            daemonset,
            "-n",
            namespace,
            "--type=json",
            "-p",
            &steps,
        ];
        cluster.kubectl(&patch).unwrap();
        mesh.wait_for_rollout(daemonset, namespace).unwrap();
    }

    let plain = cluster.namespace("plain", &[]).unwrap();
    let meshed = cluster
        .namespace("meshed", &["istio.io/dataplane-mode=ambient"])
        .unwrap();
    for namespace in [&plain, &meshed] {
        namespace.apply(&client("client")).unwrap();
        namespace.wait_until_ready().unwrap();
    }
    mesh.wait_until_enrolled("meshed").unwrap();
    all_are_told(&plain, "mesh.test", BY_COREDNS);
    for _ in 0..2 {
        all_are_told(&meshed, "mesh.test", BY_ZTUNNEL);
        // ztunnel asks the service itself, and Cilium's balancing gets it there.
        all_are_told(&meshed, "else.test", BY_COREDNS);
        assert!(queries(&mesh) >= 10);
        // Cilium's agent starts anew and puts its programs there again.
        cluster.stop_service(&node, Service::Cilium).unwrap();
        cluster.start_service(&node, Service::Cilium).unwrap();
    }
    all_are_told(&plain, "mesh.test", BY_COREDNS);
    drop((plain, meshed));
    drop(cluster);
}
