//! What is left alone because somebody said so: excluded ports and networks, inbound bypass, node probes, virtual
//! interfaces; and that one pod's settings and addresses are its alone.

use std::net::IpAddr;

use anyhow::{Context as _, Result};
use culvert_e2e::{
    LONG, Mesh, eventually,
    traffic::{Via, talk},
};
use culvert_lab::{Capture, Family, Ns, Route, Server, connect, roundtrip};

/// Attaches again, as somebody does who changes a pod's settings.
fn reattach(mesh: &Mesh, pod: &Ns, args: &[&str]) -> Result<()> {
    let pid = mesh.ztunnel.pid().to_string();
    let mut all = vec!["--ztunnel", &pid];
    all.extend(args);
    let output = mesh.lab.attach(pod, &all)?;
    anyhow::ensure!(
        output.stdout.contains("updated"),
        "attaching again says: {}",
        output.stdout
    );
    Ok(())
}

#[test]
fn an_excluded_outbound_port_is_left_alone_and_only_that() {
    let mesh = Mesh::new("outport").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    mesh.enrol(&pod, &["--exclude-outbound-port", "8080"])
        .unwrap();
    for family in Family::BOTH {
        let excluded = Server::echo(&outside, outside.at(family, 8080).unwrap()).unwrap();
        let other = Server::echo(&outside, outside.at(family, 8081).unwrap()).unwrap();
        let own = pod.ip(family).unwrap();
        let before = mesh.counter(&pod, "excluded_outbound").unwrap();
        assert_eq!(
            mesh.via(&pod, &pod, &excluded).unwrap(),
            (Via::Nothing, own)
        );
        assert_eq!(
            mesh.counter(&pod, "excluded_outbound").unwrap(),
            before + 1,
            "{family:?}"
        );
        assert_eq!(mesh.via(&pod, &pod, &other).unwrap(), (Via::Outbound, own));
    }
    // Another port instead, while everything runs: the first is captured again.
    reattach(&mesh, &pod, &["--exclude-outbound-port", "8081"]).unwrap();
    for family in Family::BOTH {
        let was = Server::echo(&outside, outside.at(family, 8080).unwrap()).unwrap();
        let is = Server::echo(&outside, outside.at(family, 8081).unwrap()).unwrap();
        assert_eq!(
            mesh.via(&pod, &pod, &was).unwrap().0,
            Via::Outbound,
            "{family:?}"
        );
        assert_eq!(
            mesh.via(&pod, &pod, &is).unwrap().0,
            Via::Nothing,
            "{family:?}"
        );
    }
}

#[test]
fn excluded_networks_are_left_alone_and_change_while_the_pod_runs() {
    let mesh = Mesh::new("outcidr").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let neighbour = mesh.lab.pod("b").unwrap();
    let outside = mesh.lab.outside().unwrap();
    let networks = ["10.88.0.0/16", "fd88::/48"];
    let hosts = Family::BOTH.map(|family| neighbour.ip(family).unwrap().to_string());
    let exclude = |nets: [&str; 2]| {
        [
            "--exclude-outbound-cidr",
            nets[0],
            "--exclude-outbound-cidr",
            nets[1],
        ]
        .map(str::to_owned)
    };
    let far = exclude(networks);
    let near = exclude([&hosts[0], &hosts[1]]);
    let servers: Vec<(Family, Server, Server)> = Family::BOTH
        .into_iter()
        .map(|family| {
            let far = Server::echo(&outside, outside.at(family, 8080).unwrap()).unwrap();
            let near = Server::echo(&neighbour, neighbour.at(family, 8080).unwrap()).unwrap();
            (family, far, near)
        })
        .collect();
    let check = |expected_far: Via, expected_near: Via| {
        for (family, far, near) in &servers {
            assert_eq!(
                mesh.via(&pod, &pod, far).unwrap().0,
                expected_far,
                "{family:?} far"
            );
            assert_eq!(
                mesh.via(&pod, &pod, near).unwrap().0,
                expected_near,
                "{family:?} near"
            );
        }
    };
    mesh.enrol(&pod, &far.each_ref().map(String::as_str))
        .unwrap();
    check(Via::Nothing, Via::Outbound);
    reattach(&mesh, &pod, &near.each_ref().map(String::as_str)).unwrap();
    check(Via::Outbound, Via::Nothing);
    reattach(&mesh, &pod, &[]).unwrap();
    check(Via::Outbound, Via::Outbound);
    assert_eq!(mesh.show(&pod).unwrap()["whole"], true);
}

#[test]
fn an_excluded_inbound_port_is_left_alone_and_only_that() {
    let mesh = Mesh::new("inport").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    mesh.enrol(
        &pod,
        &["--probe-source", "none", "--exclude-inbound-port", "8080"],
    )
    .unwrap();
    for family in Family::BOTH {
        let excluded = Server::echo(&pod, pod.at(family, 8080).unwrap()).unwrap();
        let other = Server::echo(&pod, pod.at(family, 8081).unwrap()).unwrap();
        let client = outside.ip(family).unwrap();
        assert_eq!(
            mesh.via(&pod, &outside, &excluded).unwrap(),
            (Via::Nothing, client),
            "{family:?}"
        );
        assert_eq!(
            mesh.via(&pod, &outside, &other).unwrap(),
            (Via::Inbound, client),
            "{family:?}"
        );
    }
    assert!(mesh.counter(&pod, "pass_excluded_inbound").unwrap() >= 2);
}

#[test]
fn bypass_inbound_leaves_all_plaintext_inbound_alone_and_outbound_captured() {
    let mesh = Mesh::new("bypass").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    mesh.enrol(&pod, &["--probe-source", "none", "--bypass-inbound"])
        .unwrap();
    let servers: Vec<(Family, Server)> = Family::BOTH
        .into_iter()
        .map(|family| {
            (
                family,
                Server::echo(&pod, pod.at(family, 8080).unwrap()).unwrap(),
            )
        })
        .collect();
    for (family, server) in &servers {
        let client = outside.ip(*family).unwrap();
        assert_eq!(
            mesh.via(&pod, &outside, server).unwrap(),
            (Via::Nothing, client),
            "{family:?}"
        );
        let far = Server::echo(&outside, outside.at(*family, 8080).unwrap()).unwrap();
        assert_eq!(
            mesh.via(&pod, &pod, &far).unwrap().0,
            Via::Outbound,
            "{family:?}"
        );
    }
    reattach(&mesh, &pod, &["--probe-source", "none"]).unwrap();
    for (family, server) in &servers {
        assert_eq!(
            mesh.via(&pod, &outside, server).unwrap().0,
            Via::Inbound,
            "{family:?}: bypass was switched off"
        );
    }
}

/// A virtual machine behind an interface of the pod, with addresses that are not the pod's, reachable from everywhere.
fn virtual_machine(mesh: &Mesh, pod: &Ns) -> Result<Ns> {
    let vm = mesh.lab.pod_builder("vm").no_interface().build()?;
    pod.add_veth("tap0", &vm, "eth0")?;
    for key in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"] {
        pod.set_sysctl(key, "1")?;
    }
    for (near, far, family) in [
        ("10.99.0.1/24", "10.99.0.2/24", Family::V4),
        ("fd99::1/64", "fd99::2/64", Family::V6),
    ] {
        let near: ipnet::IpNet = near.parse()?;
        pod.add_addr("tap0", near)?;
        vm.add_addr("eth0", far.parse()?)?;
        vm.add_route(&Route::default_via(near.addr()))?;
        mesh.lab
            .node()
            .add_route(&Route::via(near.trunc(), pod.ip(family)?))?;
    }
    Ok(vm)
}

#[test]
fn what_a_virtual_machine_sends_is_captured_when_its_interface_is_named() {
    let mesh = Mesh::new("virtual").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    let vm = virtual_machine(&mesh, &pod).unwrap();
    mesh.enrol(&pod, &["--probe-source", "none"]).unwrap();
    let addresses: [IpAddr; 2] = ["10.99.0.2".parse().unwrap(), "fd99::2".parse().unwrap()];
    let servers: Vec<(Family, Server)> = Family::BOTH
        .into_iter()
        .map(|family| {
            (
                family,
                Server::echo(&outside, outside.at(family, 8080).unwrap()).unwrap(),
            )
        })
        .collect();
    // Not named: the pod only forwards it.
    for ((family, server), address) in servers.iter().zip(addresses) {
        assert_eq!(
            mesh.via(&pod, &vm, server).unwrap(),
            (Via::Nothing, address),
            "{family:?}"
        );
    }
    reattach(
        &mesh,
        &pod,
        &["--probe-source", "none", "--virtual-interface", "tap0"],
    )
    .unwrap();
    for (family, server) in &servers {
        let wire = Capture::start(mesh.lab.node(), "out0").unwrap();
        let (via, peer) = mesh.via(&pod, &vm, server).unwrap();
        assert_eq!(via, Via::Outbound, "{family:?}");
        assert_eq!(
            peer,
            pod.ip(*family).unwrap(),
            "{family:?}: ztunnel's own way out"
        );
        wire.none(|p| p.is_tcp() && addresses.contains(&p.src.ip()))
            .unwrap();
    }
    assert!(mesh.counter(&pod, "to_outbound_virtual").unwrap() >= 2);
    assert_eq!(mesh.show(&pod).unwrap()["whole"], true);
    // The machine still reaches the pod that carries it, and its rules go when it is no longer named.
    for family in Family::BOTH {
        let own = Server::echo(&pod, pod.at(family, 8090).unwrap()).unwrap();
        talk(&vm, own.addr()).unwrap();
    }
    reattach(&mesh, &pod, &["--probe-source", "none"]).unwrap();
    for ((family, server), address) in servers.iter().zip(addresses) {
        assert_eq!(
            mesh.via(&pod, &vm, server).unwrap(),
            (Via::Nothing, address),
            "{family:?}"
        );
    }
}

#[test]
fn a_node_probe_reaches_the_app_from_the_nodes_own_address_without_ztunnel() {
    let mesh = Mesh::new("probe").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let neighbour = mesh.lab.pod("b").unwrap();
    mesh.enrol(&pod, &["--probe-source", "node"]).unwrap();
    let node = mesh.lab.node();
    for family in Family::BOTH {
        let server = Server::echo(&pod, pod.at(family, 8080).unwrap()).unwrap();
        let vouched = mesh.counter(&pod, "vouched").unwrap();
        assert_eq!(
            mesh.via(&pod, node, &server).unwrap(),
            (Via::Nothing, node.ip(family).unwrap()),
            "{family:?}"
        );
        assert_eq!(
            mesh.counter(&pod, "vouched").unwrap(),
            vouched + 1,
            "{family:?}"
        );
        // Only the node's own processes: who comes from elsewhere on the node goes through ztunnel.
        assert_eq!(
            mesh.via(&pod, &neighbour, &server).unwrap(),
            (Via::Inbound, neighbour.ip(family).unwrap()),
            "{family:?}"
        );
    }
    // Also while ztunnel is away, as a kubelet's probes must.
    mesh.ztunnel.kill().unwrap();
    for family in Family::BOTH {
        let server = Server::echo(&pod, pod.at(family, 8080).unwrap()).unwrap();
        talk(node, server.addr()).unwrap();
    }
    // Nothing remembers a probe that is over.
    eventually("no probe is remembered", || {
        let vouched = culvert_e2e::bpf::Map::pinned(&mesh.lab.bpffs().join("maps/VOUCHED"))?;
        Ok(vouched.keys()?.is_empty())
    })
    .unwrap();
}

#[test]
fn with_probe_source_none_the_nodes_connections_go_through_ztunnel_too() {
    let mesh = Mesh::new("noprobe").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    mesh.enrol(&pod, &["--probe-source", "none"]).unwrap();
    let node = mesh.lab.node();
    for family in Family::BOTH {
        let server = Server::echo(&pod, pod.at(family, 8080).unwrap()).unwrap();
        assert_eq!(
            mesh.via(&pod, node, &server).unwrap(),
            (Via::Inbound, node.ip(family).unwrap()),
            "{family:?}"
        );
    }
    assert_eq!(mesh.counter(&pod, "vouched").unwrap(), 0);
}

#[test]
fn two_pods_with_the_same_addresses_are_two_pods() {
    let mesh = Mesh::new("sameip").unwrap();
    let a = mesh.lab.pod("a").unwrap();
    let b = mesh
        .lab
        .pod_builder("b")
        .bridge("br1")
        .same_addrs(&a)
        .build()
        .unwrap();
    let near_a = mesh.lab.pod("na").unwrap();
    let near_b = mesh.lab.pod_builder("nb").bridge("br1").build().unwrap();
    mesh.enrol(&a, &["--probe-source", "none"]).unwrap();
    mesh.enrol(
        &b,
        &["--probe-source", "none", "--exclude-outbound-port", "8082"],
    )
    .unwrap();
    let both_ways = |pod: &Ns, near: &Ns| {
        for family in Family::BOTH {
            let far = Server::echo(near, near.at(family, 8080).unwrap()).unwrap();
            assert_eq!(
                mesh.via(pod, pod, &far).unwrap(),
                (Via::Outbound, pod.ip(family).unwrap()),
                "{} {family:?}",
                pod.name()
            );
            let own = Server::echo(pod, pod.at(family, 8081).unwrap()).unwrap();
            assert_eq!(
                mesh.via(pod, near, &own).unwrap(),
                (Via::Inbound, near.ip(family).unwrap()),
                "{} {family:?}",
                pod.name()
            );
        }
    };
    both_ways(&a, &near_a);
    both_ways(&b, &near_b);
    // What is excluded in one is not in the other.
    for family in Family::BOTH {
        for (pod, near, expected) in [(&a, &near_a, Via::Outbound), (&b, &near_b, Via::Nothing)] {
            let server = Server::echo(near, near.at(family, 8082).unwrap()).unwrap();
            assert_eq!(
                mesh.via(pod, pod, &server).unwrap().0,
                expected,
                "{} {family:?}",
                pod.name()
            );
        }
    }
    // One goes, the other stays as it was.
    mesh.lab.detach(&a).unwrap();
    both_ways(&b, &near_b);
    assert_eq!(mesh.show(&b).unwrap()["whole"], true);
    for family in Family::BOTH {
        let far = Server::echo(&near_a, near_a.at(family, 8080).unwrap()).unwrap();
        assert_eq!(
            mesh.via(&a, &a, &far).unwrap().0,
            Via::Nothing,
            "{family:?}"
        );
    }
}

#[test]
fn probes_find_the_other_of_two_pods_with_one_address_after_the_first_has_gone() {
    let mesh = Mesh::new("sameprobe").unwrap();
    // Enrolled second and detached again: it takes the address's place in the node's table and must give it back.
    let a = mesh.lab.pod("a").unwrap();
    let b = mesh
        .lab
        .pod_builder("b")
        .bridge("br1")
        .same_addrs(&a)
        .build()
        .unwrap();
    mesh.enrol(&a, &["--probe-source", "node"]).unwrap();
    mesh.enrol(&b, &["--probe-source", "node"]).unwrap();
    mesh.lab.detach(&b).unwrap();
    for family in Family::BOTH {
        let server = Server::echo(&a, a.at(family, 8080).unwrap()).unwrap();
        let stream = connect(mesh.lab.node(), server.addr(), LONG)
            .with_context(|| format!("{family:?}"))
            .unwrap();
        roundtrip(&stream, b"probe").unwrap();
        assert_eq!(
            server.peers()[0].ip(),
            mesh.lab.node().ip(family).unwrap(),
            "{family:?}"
        );
    }
    assert_eq!(mesh.stat(&a, "inbound_accepts").unwrap(), 0);
    assert_eq!(mesh.counter(&a, "vouched").unwrap(), 2);
}
