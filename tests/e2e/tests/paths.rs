//! The ordinary paths of a connection: out, in, to itself, between pods, plain and HBONE.

use culvert_e2e::{LONG, Mesh, eventually};
use culvert_lab::{Capture, Family, Server, connect, roundtrip};

#[test]
fn outbound_goes_through_ztunnel_from_the_pods_own_address() {
    let mesh = Mesh::new("outbound").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    mesh.enrol(&pod, &[]).unwrap();
    for family in Family::BOTH {
        let server = Server::echo(&outside, outside.at(family, 8080).unwrap()).unwrap();
        let before = mesh.stat(&pod, "outbound_accepts").unwrap();
        let stream = connect(&pod, server.addr(), LONG).unwrap();
        roundtrip(&stream, b"hello").unwrap();
        eventually("ztunnel accepted it", || {
            Ok(mesh.stat(&pod, "outbound_accepts")? == before + 1)
        })
        .unwrap();
        assert_eq!(
            server.peers()[0].ip(),
            pod.ip(family).unwrap(),
            "{family:?}"
        );
    }
    assert_eq!(mesh.show(&pod).unwrap()["whole"], true);
}

#[test]
fn inbound_plaintext_goes_through_ztunnel_from_the_clients_address() {
    let mesh = Mesh::new("inbound").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    mesh.enrol(&pod, &["--probe-source", "none"]).unwrap();
    for family in Family::BOTH {
        let server = Server::echo(&pod, pod.at(family, 8080).unwrap()).unwrap();
        let before = mesh.stat(&pod, "inbound_accepts").unwrap();
        let stream = connect(&outside, server.addr(), LONG).unwrap();
        roundtrip(&stream, b"hello").unwrap();
        eventually("ztunnel accepted it", || {
            Ok(mesh.stat(&pod, "inbound_accepts")? == before + 1)
        })
        .unwrap();
        assert_eq!(
            server.peers()[0].ip(),
            outside.ip(family).unwrap(),
            "{family:?}"
        );
    }
}

#[test]
fn between_enrolled_pods_only_tls_is_on_the_wire() {
    let (mesh, [a, b]) = Mesh::meshed("hbone", ["a", "b"]).unwrap();
    for family in Family::BOTH {
        let wire = Capture::outside(mesh.lab.node(), &a).unwrap();
        let server = Server::echo(&b, b.at(family, 8080).unwrap()).unwrap();
        let stream = connect(&a, server.addr(), LONG).unwrap();
        roundtrip(&stream, b"a secret between two pods").unwrap();
        assert_eq!(server.peers()[0].ip(), a.ip(family).unwrap(), "{family:?}");
        assert!(
            wire.ports().unwrap().contains(&15008),
            "{}",
            wire.describe()
        );
        assert!(!wire.contains(b"a secret between two pods").unwrap());
        assert!(
            !wire.ports().unwrap().contains(&8080),
            "{}",
            wire.describe()
        );
    }
}

#[test]
fn a_pod_reaches_itself_without_ztunnel() {
    let mesh = Mesh::new("self").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    mesh.enrol(&pod, &[]).unwrap();
    for family in Family::BOTH {
        let own = Server::echo(&pod, pod.at(family, 8080).unwrap()).unwrap();
        roundtrip(&connect(&pod, own.addr(), LONG).unwrap(), b"own").unwrap();
        let loopback = match family {
            Family::V4 => "127.0.0.1:8081",
            Family::V6 => "[::1]:8081",
        };
        let server = Server::echo(&pod, loopback.parse().unwrap()).unwrap();
        roundtrip(&connect(&pod, server.addr(), LONG).unwrap(), b"loopback").unwrap();
    }
    assert_eq!(mesh.stat(&pod, "outbound_accepts").unwrap(), 0);
    assert_eq!(mesh.stat(&pod, "inbound_accepts").unwrap(), 0);
}
