//! Sockets with options: what applications do to theirs for reasons of their own works in an enrolled pod as it does
//! elsewhere. Options used to get past ztunnel are in `escape` and `impostor`.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::os::fd::AsFd;
use std::time::Duration;

use culvert_e2e::cage::{Cage, NEEDLE, PORT, nothing_escaped, tcp};
use culvert_e2e::traffic::talk_as;
use culvert_e2e::{LONG, Mesh, eventually};
use culvert_lab::{Connect, Creds, Family, Ns, Server, connect, roundtrip, sockopt};
use socket2::SockRef;

const APP: u16 = 8080;

#[test]
fn a_connect_that_does_not_block() {
    let cage = Cage::shut("nonblocking", &[]).unwrap();
    let wire = cage.wire().unwrap();
    for family in Family::BOTH {
        let to = cage.server(family).addr();
        let socket = cage.a.run_as(Creds::Nobody, || tcp(family)).unwrap();
        socket.set_nonblocking(true).unwrap();
        match socket.connect(&to.into()) {
            Ok(()) => {}
            Err(e) => assert_eq!(e.raw_os_error(), Some(libc::EINPROGRESS), "{e}"),
        }
        eventually("connected", || Ok(socket.peer_addr().is_ok())).unwrap();
        assert!(socket.take_error().unwrap().is_none());
        assert_eq!(socket.peer_addr().unwrap().as_socket(), Some(to));
        let own = socket.local_addr().unwrap().as_socket().unwrap();
        assert_eq!(own.ip(), cage.a.ip(family).unwrap());
        socket.set_nonblocking(false).unwrap();
        cage.talk(&socket.into(), family, "connected").unwrap();
    }
    nothing_escaped(&wire, "nonblocking").unwrap();
}

#[test]
fn fast_open_by_the_client() {
    let cage = Cage::open("tfo-client").unwrap();
    // Without cookies as well, so that the first SYN already has data: client, server, and both without cookie.
    cage.a
        .set_sysctl("net/ipv4/tcp_fastopen", "0x207")
        .unwrap_or_else(|_| {
            cage.a.set_sysctl("net/ipv4/tcp_fastopen", "519").unwrap();
        });
    cage.enrol(&[]).unwrap();
    let wire = cage.wire().unwrap();
    for family in Family::BOTH {
        let server = cage.server(family);
        for round in 0..3 {
            let before = server.count();
            let mut stream = Connect::to(server.addr())
                .creds(Creds::Nobody)
                .fast_open(&cage.a, NEEDLE)
                .unwrap();
            let mut back = vec![0; NEEDLE.len()];
            stream.read_exact(&mut back).unwrap();
            assert_eq!(back, NEEDLE, "{family} round {round}");
            assert_eq!(server.count(), before + 1, "{family} round {round}");
            // By TCP_FASTOPEN_CONNECT: connect() returns at once, the first write sends the SYN.
            let stream = Connect::to(server.addr())
                .before(|s| {
                    let fd = s.as_fd();
                    sockopt::set_int(fd, libc::IPPROTO_TCP, libc::TCP_FASTOPEN_CONNECT, 1)
                })
                .run(&cage.a)
                .unwrap();
            cage.talk(&stream, family, "TCP_FASTOPEN_CONNECT").unwrap();
            nothing_escaped(&wire, &format!("{family} round {round}")).unwrap();
        }
    }
}

#[test]
fn fast_open_by_the_server() {
    let mesh = Mesh::new("tfo-server").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    for ns in [&pod, &outside] {
        ns.set_sysctl("net/ipv4/tcp_fastopen", "3").unwrap();
    }
    mesh.enrol(&pod, &["--probe-source", "none"]).unwrap();
    for family in Family::BOTH {
        let server = Server::builder(&pod, pod.at(family, APP).unwrap())
            .fast_open()
            .start()
            .unwrap();
        let before = mesh.stat(&pod, "inbound_accepts").unwrap();
        // The second and third time with a cookie: from outside ztunnel's listener knows none, the pod to itself does.
        for client in [&outside, &pod] {
            for round in 0..3 {
                let mut stream = Connect::to(server.addr())
                    .fast_open(client, b"opening words")
                    .unwrap();
                let mut back = [0; 13];
                stream.read_exact(&mut back).unwrap();
                assert_eq!(&back, b"opening words", "{family} round {round}");
                assert_eq!(
                    server.peers().last().unwrap().ip(),
                    client.ip(family).unwrap()
                );
            }
        }
        assert_eq!(mesh.stat(&pod, "inbound_accepts").unwrap(), before + 3);
    }
}

#[test]
fn a_bound_source() {
    let mesh = Mesh::new("bound-source").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    for extra in ["10.77.9.9/16", "fd77::9:9/64"] {
        pod.add_addr("eth0", extra.parse().unwrap()).unwrap();
    }
    mesh.enrol(&pod, &[]).unwrap();
    for family in Family::BOTH {
        let server = Server::echo(&outside, outside.at(family, APP).unwrap()).unwrap();
        let second: IpAddr = match family {
            Family::V4 => "10.77.9.9".parse().unwrap(),
            Family::V6 => "fd77::9:9".parse().unwrap(),
        };
        for source in [pod.ip(family).unwrap(), second] {
            for port in [0, 45_678] {
                let before = mesh.stat(&pod, "outbound_accepts").unwrap();
                let from = SocketAddr::new(source, port);
                let stream = Connect::to(server.addr()).from(from).run(&pod).unwrap();
                roundtrip(&stream, b"bound").unwrap();
                let local = stream.local_addr().unwrap();
                assert_eq!(local.ip(), source);
                assert!(port == 0 || local.port() == port);
                assert_eq!(server.peers().last().unwrap().ip(), source, "{from}");
                assert_eq!(mesh.stat(&pod, "outbound_accepts").unwrap(), before + 1);
            }
        }
    }
}

#[test]
fn a_mark_for_the_applications_own_ends() {
    let cage = Cage::shut("own-mark", &[]).unwrap();
    let wire = cage.wire().unwrap();
    for family in Family::BOTH {
        for mark in [
            0x42,
            0x7,
            0xfff,
            0x142,
            0xabc0_0000,
            0xabc0_0042,
            0xffff_f000,
        ] {
            let what = format!("{family} mark {mark:#x}");
            let stream = Connect::to(cage.server(family).addr())
                .mark(mark)
                .run(&cage.a)
                .unwrap_or_else(|e| panic!("{what}: {e}"));
            cage.talk(&stream, family, &what).unwrap();
            nothing_escaped(&wire, &what).unwrap();
            // What we do not need stays as it was set, before and after connect().
            let now = SockRef::from(&stream).mark().unwrap();
            assert_eq!(now & !0xfff, mark & !0xfff, "{what}");
            cage.a
                .run(|| SockRef::from(&stream).set_mark(0x5550_0042))
                .unwrap();
            let now = SockRef::from(&stream).mark().unwrap();
            assert_eq!(now & !0xfff, 0x5550_0000, "{what}");
            cage.talk(&stream, family, &what).unwrap();
            nothing_escaped(&wire, &what).unwrap();
        }
    }
}

#[test]
fn mptcp() {
    let cage = Cage::shut("mptcp", &["--probe-source", "none"]).unwrap();
    let outside = cage.mesh.lab.outside().unwrap();
    let wire = cage.wire().unwrap();
    for family in Family::BOTH {
        let stream = Connect::to(cage.server(family).addr())
            .mptcp()
            .creds(Creds::Nobody)
            .run(&cage.a)
            .unwrap();
        cage.talk(&stream, family, "MPTCP client").unwrap();
        nothing_escaped(&wire, "MPTCP client").unwrap();
        let server = Server::builder(&cage.a, cage.a.at(family, PORT + 1).unwrap())
            .mptcp()
            .start()
            .unwrap();
        for client in [&outside, &cage.b, &cage.a] {
            talk_as(client, &server, client.ip(family).unwrap())
                .unwrap_or_else(|e| panic!("{family} from {}: {e:?}", client.name()));
            let stream = Connect::to(server.addr()).mptcp().run(client).unwrap();
            roundtrip(&stream, b"both ends").unwrap();
        }
    }
}

#[test]
fn v4_mapped_addresses() {
    let cage = Cage::shut("v4-mapped", &["--probe-source", "none"]).unwrap();
    let outside = cage.mesh.lab.outside().unwrap();
    let wire = cage.wire().unwrap();
    let mapped = |ns: &Ns, port| SocketAddr::new(ns.v4().unwrap().to_ipv6_mapped().into(), port);
    let stream = connect(&cage.a, mapped(&cage.b, PORT), LONG).unwrap();
    cage.talk(&stream, Family::V4, "out").unwrap();
    nothing_escaped(&wire, "out").unwrap();
    // Bound to an own mapped address as well.
    let stream = Connect::to(mapped(&cage.b, PORT))
        .from(mapped(&cage.a, 0))
        .run(&cage.a)
        .unwrap();
    cage.talk(&stream, Family::V4, "out, bound").unwrap();
    nothing_escaped(&wire, "out, bound").unwrap();
    // A listener on a mapped address, from outside, through HBONE and from the pod itself.
    let server = Server::echo(&cage.a, mapped(&cage.a, PORT + 1)).unwrap();
    for client in [&outside, &cage.b, &cage.a] {
        let stream = connect(client, cage.a.at(Family::V4, PORT + 1).unwrap(), LONG).unwrap();
        roundtrip(&stream, b"mapped").unwrap();
        let seen = server.peers().last().unwrap().ip().to_canonical();
        assert_eq!(seen, client.ip(Family::V4).unwrap());
    }
    // To itself and to loopback, mapped.
    for ip in [cage.a.v4().unwrap(), std::net::Ipv4Addr::LOCALHOST] {
        let home = Server::echo(&cage.a, SocketAddr::new(ip.into(), PORT + 2)).unwrap();
        let to = SocketAddr::new(ip.to_ipv6_mapped().into(), PORT + 2);
        roundtrip(&connect(&cage.a, to, LONG).unwrap(), b"home").unwrap();
        assert_eq!(home.count(), 1);
    }
}

#[test]
fn the_pods_own_link_local_addresses() {
    let (mesh, pod, _) = Mesh::one_pod("own-link-local").unwrap();
    let own = pod.link_local("eth0").unwrap();
    let scope = pod.ifindex("eth0").unwrap();
    let at = |port| SocketAddr::from(SocketAddrV6::new(own, port, 0, scope));
    let bound = Server::echo(&pod, at(APP)).unwrap();
    let any = Server::echo(&pod, SocketAddr::new(Family::V6.unspecified(), APP + 1)).unwrap();
    for (server, port) in [(&bound, APP), (&any, APP + 1)] {
        let stream = connect(&pod, at(port), LONG).unwrap();
        roundtrip(&stream, b"own")
            .unwrap_or_else(|e| panic!("{port}: {e}: {:#}", mesh.show(&pod).unwrap()));
        assert_eq!(server.peers()[0].ip(), IpAddr::from(own));
    }
    assert_eq!(mesh.stat(&pod, "outbound_accepts").unwrap(), 0);
    assert_eq!(mesh.stat(&pod, "inbound_accepts").unwrap(), 0);
}

/// Half of a connection closed stays so, and the other half goes on.
#[test]
fn a_connection_closed_on_one_side() {
    let cage = Cage::shut("half-closed", &[]).unwrap();
    for family in Family::BOTH {
        let server = Server::builder(&cage.b, cage.b.at(family, PORT + 1).unwrap())
            .greet(b"first words")
            .start()
            .unwrap();
        let mut stream = connect(&cage.a, server.addr(), LONG).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        stream.write_all(NEEDLE).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut heard = Vec::new();
        stream.read_to_end(&mut heard).unwrap();
        assert_eq!(heard, [b"first words".as_slice(), NEEDLE].concat());
    }
}

/// The unspecified address means the pod itself.
#[test]
fn the_unspecified_destination() {
    let (mesh, pod, _) = Mesh::one_pod("unspecified").unwrap();
    for family in Family::BOTH {
        let server = Server::echo(&pod, SocketAddr::new(family.unspecified(), APP)).unwrap();
        let to = SocketAddr::new(family.unspecified(), APP);
        roundtrip(&connect(&pod, to, LONG).unwrap(), b"here").unwrap();
        assert_eq!(server.count(), 1);
    }
    assert_eq!(mesh.stat(&pod, "outbound_accepts").unwrap(), 0);
}
