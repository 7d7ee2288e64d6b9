//! The ways a connection may take: by ztunnel, past it, to a closed door.

use std::io::{self, Read as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Instant;

use culvert_e2e::{LONG, Mesh, eventually};
use culvert_lab::{Capture, Connect, Family, Server, connect, roundtrip};

use crate::AT_ONCE;

fn loopback(family: Family, port: u16) -> SocketAddr {
    SocketAddr::new(family.loopback(), port)
}

/// Waits for the server's first byte or the end; true when there was an answer.
fn answered(mut stream: &TcpStream) -> bool {
    matches!(stream.read(&mut [0]), Ok(1))
}

#[test]
fn outbound_goes_through_ztunnel_from_the_pods_own_address() {
    let mesh = Mesh::new("vm-outbound").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    mesh.enrol(&pod, &[]).unwrap();
    for family in Family::BOTH {
        let server = Server::echo(&outside, outside.at(family, 8080).unwrap()).unwrap();
        let before = mesh.stat(&pod, "outbound_accepts").unwrap();
        let stream = connect(&pod, server.addr(), LONG).unwrap();
        assert_eq!(roundtrip(&stream, b"hello").unwrap(), b"hello");
        let after = mesh.stat(&pod, "outbound_accepts").unwrap();
        assert_eq!(after, before + 1, "{family}");
        let seen = server.peers()[0];
        assert_eq!(seen.ip(), pod.ip(family).unwrap());
        assert_ne!(
            seen,
            stream.local_addr().unwrap(),
            "the app's own socket got out"
        );
    }
    assert_eq!(mesh.show(&pod).unwrap()["whole"], true);
}

#[test]
fn inbound_goes_through_ztunnel_from_the_clients_address() {
    let mesh = Mesh::new("vm-inbound").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    mesh.enrol(&pod, &[]).unwrap();
    for family in Family::BOTH {
        let server = Server::echo(&pod, pod.at(family, 8080).unwrap()).unwrap();
        let before = mesh.stat(&pod, "inbound_accepts").unwrap();
        let stream = connect(&outside, server.addr(), LONG).unwrap();
        assert_eq!(roundtrip(&stream, b"hello").unwrap(), b"hello");
        assert_eq!(
            mesh.stat(&pod, "inbound_accepts").unwrap(),
            before + 1,
            "{family}"
        );
        assert_eq!(server.peers()[0].ip(), outside.ip(family).unwrap());

        // A probe from the node goes past ztunnel, and the app sees the node's own address.
        let node = mesh.lab.node();
        let probe = connect(node, server.addr(), LONG).unwrap();
        assert_eq!(roundtrip(&probe, b"probe").unwrap(), b"probe");
        assert_eq!(
            mesh.stat(&pod, "inbound_accepts").unwrap(),
            before + 1,
            "{family}"
        );
        assert_eq!(server.peers()[1], probe.local_addr().unwrap());
    }
}

#[test]
fn outbound_to_an_excluded_network_or_port_goes_direct() {
    let mesh = Mesh::new("vm-excluded").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    let networks = Family::BOTH.map(|family| {
        let net = outside.ip(family).unwrap();
        format!("{net}/{}", family.host_len())
    });
    for flags in [
        vec!["--exclude-outbound-port", "8080"],
        vec![
            "--exclude-outbound-cidr",
            &networks[0],
            "--exclude-outbound-cidr",
            &networks[1],
        ],
    ] {
        mesh.enrol(&pod, &flags).unwrap();
        for family in Family::BOTH {
            let server = Server::echo(&outside, outside.at(family, 8080).unwrap()).unwrap();
            let stream = connect(&pod, server.addr(), LONG).unwrap();
            assert_eq!(roundtrip(&stream, b"direct").unwrap(), b"direct");
            assert_eq!(server.peers(), [stream.local_addr().unwrap()], "{flags:?}");
        }
    }
    assert_eq!(mesh.stat(&pod, "outbound_accepts").unwrap(), 0);
    // And back again: what is no longer named is captured.
    mesh.enrol(&pod, &[]).unwrap();
    for family in Family::BOTH {
        let server = Server::echo(&outside, outside.at(family, 8080).unwrap()).unwrap();
        let stream = connect(&pod, server.addr(), LONG).unwrap();
        assert_eq!(roundtrip(&stream, b"captured").unwrap(), b"captured");
    }
    assert_eq!(mesh.stat(&pod, "outbound_accepts").unwrap(), 2);
}

#[test]
fn outbound_and_inbound_with_mptcp_go_through_ztunnel() {
    let mesh = Mesh::new("vm-mptcp").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    mesh.enrol(&pod, &[]).unwrap();
    for family in Family::BOTH {
        for (from, to, accepts) in [
            (&pod, &outside, "outbound_accepts"),
            (&outside, &pod, "inbound_accepts"),
        ] {
            let addr = to.at(family, 8080).unwrap();
            let server = Server::builder(to, addr).mptcp().start().unwrap();
            let before = mesh.stat(&pod, accepts).unwrap();
            let stream = Connect::to(addr).mptcp().run(from).unwrap();
            assert_eq!(roundtrip(&stream, b"hello").unwrap(), b"hello");
            assert_eq!(mesh.stat(&pod, accepts).unwrap(), before + 1, "{family}");
            assert_eq!(server.peers()[0].ip(), from.ip(family).unwrap());
        }
    }
}

#[test]
fn outbound_decisions_are_told_to_who_watches() {
    let mesh = Mesh::new("vm-events").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    mesh.enrol(&pod, &[]).unwrap();
    let server = Server::echo(&outside, outside.at(Family::V4, 8080).unwrap()).unwrap();
    let events = mesh.lab.culvert_spawn(&["-o", "json", "events"]).unwrap();
    // Watching begins a moment after the start: until then nothing is written.
    eventually("a decision is told", || {
        let stream = connect(&pod, server.addr(), LONG)?;
        roundtrip(&stream, b"hello")?;
        Ok(events.stdout().contains("captured"))
    })
    .unwrap();
}

#[test]
fn hbone_alone_is_on_the_wire_between_enrolled_pods() {
    const SECRET: &[u8] = b"a secret between two pods";
    let (mesh, [a, b]) = Mesh::meshed("vm-hbone", ["a", "b"]).unwrap();
    for family in Family::BOTH {
        let wire = Capture::outside(mesh.lab.node(), &a).unwrap();
        let server = Server::echo(&b, b.at(family, 8080).unwrap()).unwrap();
        let stream = connect(&a, server.addr(), LONG).unwrap();
        assert_eq!(roundtrip(&stream, SECRET).unwrap(), SECRET);
        assert_eq!(server.peers()[0].ip(), a.ip(family).unwrap(), "{family}");
        assert!(
            wire.ports().unwrap().contains(&15008),
            "{}",
            wire.describe()
        );
        assert!(!wire.contains(SECRET).unwrap());
        wire.none(|packet| packet.has_port(8080)).unwrap();
    }
}

#[test]
fn self_call_by_own_address_and_loopback_passes_ztunnel_by() {
    let mesh = Mesh::new("vm-self").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    mesh.enrol(&pod, &[]).unwrap();
    for family in Family::BOTH {
        let own = Server::echo(&pod, pod.at(family, 8080).unwrap()).unwrap();
        let lo = Server::echo(&pod, loopback(family, 8081)).unwrap();
        for server in [&own, &lo] {
            let stream = connect(&pod, server.addr(), LONG).unwrap();
            assert_eq!(roundtrip(&stream, b"me").unwrap(), b"me");
            assert_eq!(server.peers(), [stream.local_addr().unwrap()]);
        }
    }
    assert_eq!(mesh.stat(&pod, "outbound_accepts").unwrap(), 0);
    assert_eq!(mesh.stat(&pod, "inbound_accepts").unwrap(), 0);
}

#[test]
fn closed_port_is_told_at_once() {
    let mesh = Mesh::new("vm-closed").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    mesh.enrol(&pod, &[]).unwrap();
    for family in Family::BOTH {
        // ztunnel accepts for the app, is refused by it, and hangs up. Were the reset lost, it would try for seconds.
        for (from, to) in [(&outside, &pod), (&pod, &outside)] {
            let stream = connect(from, to.at(family, 9).unwrap(), LONG).unwrap();
            let started = Instant::now();
            assert!(!answered(&stream));
            assert!(
                started.elapsed() < AT_ONCE,
                "{family}: {:?}",
                started.elapsed()
            );
        }
        // Without ztunnel between, the refusal is the kernel's own.
        for to in [pod.at(family, 9).unwrap(), loopback(family, 9)] {
            let started = Instant::now();
            let error = connect(&pod, to, LONG).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{to}");
            assert!(started.elapsed() < AT_ONCE, "{to}: {:?}", started.elapsed());
        }
    }
    assert_eq!(mesh.stat(&pod, "inbound_accepts").unwrap(), 2);
    assert_eq!(mesh.stat(&pod, "outbound_accepts").unwrap(), 2);
}
