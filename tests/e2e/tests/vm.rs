//! What must hold on every kernel that is supported: `cargo xtask test vm` runs these tests in emulated guests, where
//! nothing but static binaries is at hand and everything is thirty times slower. So they are few, execute no program
//! but `culvert` and the stand-in, and bound waiting from above generously.
//!
//! Finer points of each case are tested by the other files of this directory on the machine's own kernel.

use std::io::{self, Read as _};
use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6, TcpStream};
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use anyhow::Result;
use culvert_e2e::{LONG, Mesh, eventually};
use culvert_lab::{
    Capture, Connect, Creds, Family, Lab, Server, Ztunnel, ZtunnelOptions, connect, roundtrip,
    sockopt,
};
use socket2::Socket;

/// Long enough for an emulated machine with other things to do; a reset that is lost costs a connection attempt, ten
/// seconds. How fast it really is, other tests measure.
const AT_ONCE: Duration = Duration::from_secs(3);
/// What a pod's namespace has to look like as before: see `Ns::picture`.
const SYSCTLS: [&str; 3] = [
    "net/ipv4/tcp_fwmark_accept",
    "net/ipv4/fwmark_reflect",
    "net/ipv6/fwmark_reflect",
];
const SO_BINDTOIFINDEX: i32 = 62;

fn loopback(family: Family, port: u16) -> SocketAddr {
    SocketAddr::new(family.loopback(), port)
}

/// Waits for the server's first byte or the end; true when there was an answer.
fn answered(mut stream: &TcpStream) -> bool {
    matches!(stream.read(&mut [0]), Ok(1))
}

#[test]
fn load_is_verified_pinned_repeatable_and_undone() {
    let lab = Lab::new("vm-load").unwrap();
    let preflight = lab.culvert(&["-o", "json", "preflight"]).unwrap();
    let preflight = preflight.ok().unwrap().json().unwrap();
    assert_eq!(preflight["ok"], true, "{preflight}");

    let load = || -> Result<_> { lab.culvert(&["-o", "json", "load"])?.ok()?.json() };
    let first = load().unwrap();
    let programs = first["programs"].as_array().unwrap();
    let mut names: Vec<_> = programs
        .iter()
        .map(|p| p["name"].as_str().unwrap())
        .collect();
    names.sort_unstable();
    assert_eq!(
        names,
        [
            "culvert_connect",
            "culvert_enter",
            "culvert_sockopt",
            "culvert_steer"
        ]
    );
    for program in programs {
        assert!(program["bytes_xlated"].as_u64().unwrap() > 0, "{program}");
        assert!(
            program["verified_instructions"].as_u64().unwrap() > 0,
            "{program}"
        );
    }
    let pins = lab.pins().unwrap();
    assert!(!pins.is_empty());

    let second = load().unwrap();
    assert_eq!(second["adopted"], true, "{second}");
    for (before, after) in programs.iter().zip(second["programs"].as_array().unwrap()) {
        assert_eq!(before["tag"], after["tag"]);
        assert!(
            after["action"] == "kept" || after["action"] == "checked",
            "{after}"
        );
    }
    assert_eq!(lab.pins().unwrap(), pins);

    lab.culvert(&["unload"]).unwrap().ok().unwrap();
    assert_eq!(lab.pins().unwrap(), Vec::<std::path::PathBuf>::new());
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

/// Binds a socket to the pod's interface: by name or by index.
fn bind_device(socket: &Socket, ifname: &str, index: Option<u32>) -> io::Result<()> {
    match index {
        None => socket.bind_device(Some(ifname.as_bytes())),
        Some(index) => sockopt::set_int(
            socket.as_fd(),
            libc::SOL_SOCKET,
            SO_BINDTOIFINDEX,
            index.cast_signed(),
        ),
    }
}

#[test]
fn device_bound_sockets_are_captured_before_and_after_connect() {
    let (mesh, [a, b]) = Mesh::meshed("vm-device", ["a", "b"]).unwrap();
    let index = a.ifindex(a.ifname()).unwrap();
    for family in Family::BOTH {
        let wire = Capture::outside(mesh.lab.node(), &a).unwrap();
        let server = Server::echo(&b, b.at(family, 8080).unwrap()).unwrap();
        let before = mesh.stat(&a, "outbound_accepts").unwrap();
        let mut made = 0;
        for creds in [Creds::Root, Creds::Nobody] {
            for by in [None, Some(index)] {
                let bind = |socket: &Socket| bind_device(socket, a.ifname(), by);
                let early = Connect::to(server.addr())
                    .creds(creds)
                    .before(bind)
                    .run(&a)
                    .unwrap();
                assert_eq!(roundtrip(&early, b"before").unwrap(), b"before");

                let late = Connect::to(server.addr()).creds(creds).run(&a).unwrap();
                assert_eq!(roundtrip(&late, b"first").unwrap(), b"first");
                let late = Socket::from(late);
                a.run_as(creds, || bind(&late)).unwrap();
                let late = TcpStream::from(late);
                assert_eq!(roundtrip(&late, b"second").unwrap(), b"second");
                made += 2;
            }
        }
        assert_eq!(
            mesh.stat(&a, "outbound_accepts").unwrap(),
            before + made,
            "{family}"
        );
        wire.none(|packet| packet.has_port(8080)).unwrap();
    }
}

#[test]
fn device_bound_by_its_scope_is_captured() {
    let mesh = Mesh::new("vm-scope").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    mesh.enrol(&pod, &[]).unwrap();
    let wire = Capture::outside(mesh.lab.node(), &pod).unwrap();
    let index = pod.ifindex(pod.ifname()).unwrap();
    let neighbour: Ipv6Addr = "fe80::77".parse().unwrap();
    let to = SocketAddrV6::new(neighbour, 8080, 0, index);
    let stream = connect(&pod, to.into(), LONG).unwrap();
    eventually("ztunnel accepted it", || {
        Ok(mesh.stat(&pod, "outbound_accepts")? == 1)
    })
    .unwrap();
    let local = stream.local_addr().unwrap().port();
    wire.none(|packet| packet.has_port(local)).unwrap();
}

#[test]
fn device_bound_later_than_enrolment_with_an_interface_added() {
    let mesh = Mesh::new("vm-added").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    mesh.enrol(&pod, &[]).unwrap();
    let _watch = mesh.lab.culvert_spawn(&["netns", "watch"]).unwrap();
    let far = mesh.lab.add_interface(&pod, "net1").unwrap();
    let route = format!("dev #{} ", pod.ifindex("net1").unwrap());
    eventually("the new interface has its turn-round", || {
        let shown = mesh.show(&pod)?;
        Ok(shown["whole"] == true && shown["programmed"].to_string().contains(&route))
    })
    .unwrap();
    for family in Family::BOTH {
        let server = Server::echo(&outside, outside.at(family, 8080).unwrap()).unwrap();
        let wire = Capture::start(mesh.lab.node(), &far).unwrap();
        let before = mesh.stat(&pod, "outbound_accepts").unwrap();
        let stream = Connect::to(server.addr()).device("net1").run(&pod).unwrap();
        assert_eq!(roundtrip(&stream, b"hello").unwrap(), b"hello");
        assert_eq!(
            mesh.stat(&pod, "outbound_accepts").unwrap(),
            before + 1,
            "{family}"
        );
        wire.none(culvert_lab::Packet::is_tcp).unwrap();
    }
}

#[test]
fn impostor_with_cap_net_raw_cannot_take_a_mark() {
    let mesh = Mesh::new("vm-impostor").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    mesh.enrol(&pod, &[]).unwrap();
    for family in Family::BOTH {
        let server = Server::echo(&outside, outside.at(family, 8080).unwrap()).unwrap();
        for mark in [0x539, 0x111, 0x112, 0x113] {
            let before = mesh.stat(&pod, "outbound_accepts").unwrap();
            let refused = |socket: &Socket| match socket.set_mark(mark) {
                Err(error) if error.raw_os_error() == Some(libc::EPERM) => Ok(()),
                other => Err(io::Error::other(format!("mark {mark:#x}: {other:?}"))),
            };
            let stream = Connect::to(server.addr())
                .creds(Creds::NetRawOnly)
                .before(refused)
                .run(&pod)
                .unwrap();
            let socket = Socket::from(stream);
            pod.run_as(Creds::NetRawOnly, || refused(&socket)).unwrap();
            assert_eq!(roundtrip(&socket.into(), b"hello").unwrap(), b"hello");
            assert_eq!(
                mesh.stat(&pod, "outbound_accepts").unwrap(),
                before + 1,
                "{family}"
            );
        }
        // A mark for ends of its own is the app's to set, and changes nothing for us.
        let stream = Connect::to(server.addr())
            .creds(Creds::NetRawOnly)
            .mark(0x7000)
            .run(&pod)
            .unwrap();
        assert_eq!(roundtrip(&stream, b"hello").unwrap(), b"hello");
    }
    assert_eq!(mesh.stat(&pod, "outbound_accepts").unwrap(), 10);
    assert_eq!(mesh.counter(&pod, "impostor").unwrap(), 16);
}

#[test]
fn outbound_waits_for_a_ztunnel_that_is_away_and_leaks_nothing() {
    let mut mesh = Mesh::new("vm-hold").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    mesh.enrol(&pod, &["--hold", "forever"]).unwrap();
    mesh.ztunnel.kill().unwrap();
    let wire = Capture::outside(mesh.lab.node(), &pod).unwrap();
    let mut waiting = Vec::new();
    for family in Family::BOTH {
        let server = Server::echo(&outside, outside.at(family, 8080).unwrap()).unwrap();
        waiting.push((Connect::to(server.addr()).start(&pod).unwrap(), server));
    }
    // Two SYNs of each go by: the first, and its repetition after a second.
    for (connecting, server) in &waiting {
        assert!(!connecting.settled(Duration::from_millis(1200)).unwrap());
        assert_eq!(server.count(), 0);
    }
    wire.none(culvert_lab::Packet::is_tcp).unwrap();

    mesh.ztunnel = Ztunnel::start(&mesh.lab, &mesh.zds, &ZtunnelOptions::new()).unwrap();
    let pid = mesh.ztunnel.pid().to_string();
    mesh.lab
        .attach(&pod, &["--hold", "forever", "--ztunnel", &pid])
        .unwrap();
    for (connecting, _) in waiting {
        let stream = connecting.wait(4 * LONG).unwrap();
        assert_eq!(roundtrip(&stream, b"hello").unwrap(), b"hello");
    }
    assert_eq!(mesh.stat(&pod, "outbound_accepts").unwrap(), 2);
}

#[test]
fn outbound_is_refused_once_the_hold_is_over() {
    let mesh = Mesh::new("vm-refuse").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    mesh.enrol(&pod, &["--hold", "0"]).unwrap();
    mesh.ztunnel.kill().unwrap();
    let wire = Capture::outside(mesh.lab.node(), &pod).unwrap();
    for family in Family::BOTH {
        let to = outside.at(family, 8080).unwrap();
        let started = Instant::now();
        let error = connect(&pod, to, LONG).unwrap_err();
        assert_eq!(
            error.raw_os_error(),
            Some(libc::EHOSTUNREACH),
            "{family}: {error}"
        );
        assert!(
            started.elapsed() < AT_ONCE,
            "{family}: {:?}",
            started.elapsed()
        );
    }
    wire.none(culvert_lab::Packet::is_tcp).unwrap();
}

#[test]
fn detach_leaves_all_as_it_was_and_cuts_nothing() {
    let mesh = Mesh::new("vm-detach").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    let picture = pod.picture(&SYSCTLS).unwrap();
    let servers: Vec<_> = Family::BOTH
        .into_iter()
        .map(|family| Server::echo(&outside, outside.at(family, 8080).unwrap()).unwrap())
        .collect();
    let open = || -> Vec<_> {
        let one = |server: &Server| connect(&pod, server.addr(), LONG).unwrap();
        servers.iter().map(one).collect()
    };
    let alive = |streams: &[TcpStream]| {
        for stream in streams {
            assert_eq!(roundtrip(stream, b"alive").unwrap(), b"alive");
        }
    };

    let earlier = open();
    mesh.enrol(&pod, &[]).unwrap();
    assert_ne!(pod.picture(&SYSCTLS).unwrap(), picture);
    alive(&earlier);
    let captured = open();
    alive(&captured);
    assert_eq!(mesh.stat(&pod, "outbound_accepts").unwrap(), 2);

    // Those that go through ztunnel live on, on rules that stay for as long.
    mesh.lab.detach(&pod).unwrap();
    let later = open();
    for streams in [&earlier, &captured, &later] {
        alive(streams);
    }
    assert_eq!(mesh.stat(&pod, "outbound_accepts").unwrap(), 2);
    for (server, stream) in servers.iter().zip(&later) {
        assert_eq!(server.peers()[2], stream.local_addr().unwrap());
    }

    drop(captured);
    mesh.zds.del(pod.name()).unwrap();
    let path = pod.path().display().to_string();
    let wait = LONG.as_secs().to_string();
    let detach = ["netns", "detach", "--netns", &path, "--wait", &wait];
    mesh.lab.culvert(&detach).unwrap().ok().unwrap();
    assert_eq!(pod.picture(&SYSCTLS).unwrap(), picture);
    alive(&earlier);
    alive(&later);
    mesh.lab.culvert(&["unload"]).unwrap().ok().unwrap();
    assert_eq!(mesh.lab.pins().unwrap(), Vec::<std::path::PathBuf>::new());
    alive(&open());
}
