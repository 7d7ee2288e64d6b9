//! Every way in which a socket can ask.

use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};

use culvert_e2e::dns::{ask, ask_connected, ask_tcp, bound, question, receive, same};
use culvert_lab::{Capture, Family, connect};

use crate::interface::none_left;
use crate::{BY_RESOLVER, BY_ZTUNNEL, Stage, nobody};

#[test]
fn ztunnel_answers_and_seems_to_be_the_resolver() {
    let stage = Stage::captured("dns-answers").unwrap();
    for family in Family::BOTH {
        let resolver = stage.resolver(family);
        for asking in [ask, ask_connected] {
            assert_eq!(
                asking(&stage.pod, resolver, "mesh.test").unwrap(),
                BY_ZTUNNEL
            );
            assert_eq!(
                asking(&stage.pod, resolver, "else.test").unwrap(),
                BY_RESOLVER
            );
            // Nobody has to be there.
            assert_eq!(
                asking(&stage.pod, nobody(family), "mesh.test").unwrap(),
                BY_ZTUNNEL
            );
        }
    }
    assert_eq!(stage.count("to_dns_udp4"), 6);
    assert_eq!(stage.count("to_dns_udp6"), 6);
    // What ztunnel asked in turn: once for each name that is not its own, or it would be a loop.
    assert_eq!(stage.count("dns_ztunnel_udp4"), 4);
    assert_eq!(stage.resolver.asked("udp", stage.pod_ip(Family::V4)), 4);
    assert_eq!(stage.resolver.total() + stage.resolver6.total(), 4);
    assert_eq!(stage.mesh.stat(&stage.pod, "dns_queries").unwrap(), 12);
}

#[test]
fn a_v6_socket_that_asks_a_v4_resolver() {
    let stage = Stage::captured("dns-mapped").unwrap();
    let SocketAddr::V4(resolver) = stage.resolver(Family::V4) else {
        panic!("a resolver of the other family");
    };
    let mapped = SocketAddrV6::new(resolver.ip().to_ipv6_mapped(), 53, 0, 0).into();
    for asking in [ask, ask_connected] {
        assert_eq!(asking(&stage.pod, mapped, "mesh.test").unwrap(), BY_ZTUNNEL);
    }
    assert_eq!(stage.count("to_dns_udp4"), 2);
    // One socket, both families.
    stage.pod.run(|| {
        let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).unwrap();
        socket.set_read_timeout(Some(culvert_e2e::LONG)).unwrap();
        for to in [mapped, stage.resolver(Family::V6)] {
            socket.send_to(&question(1, "mesh.test"), to).unwrap();
            let (from, _) = receive(&socket).unwrap();
            assert!(same(from, to), "{from} answered, not {to}");
        }
    });
}

#[test]
fn a_v6_socket_that_is_given_a_v4_address() {
    use nix::sys::socket::{MsgFlags, SockaddrIn, connect, sendto};
    use std::os::fd::AsRawFd as _;
    let stage = Stage::captured("dns-v4-on-v6").unwrap();
    let SocketAddr::V4(resolver) = stage.resolver(Family::V4) else {
        panic!("a resolver of the other family");
    };
    // As it stands, not mapped: the kernel takes it all the same.
    let address = SockaddrIn::from(resolver);
    stage.pod.run(|| {
        for connected in [false, true] {
            let socket = unbound(stage.resolver(Family::V6));
            let (fd, question) = (socket.as_raw_fd(), question(1, "mesh.test"));
            if connected {
                connect(fd, &address).unwrap();
                assert!(same(socket.peer_addr().unwrap(), resolver.into()));
                socket.send(&question).unwrap();
            } else {
                sendto(fd, &question, &address, MsgFlags::empty()).unwrap();
            }
            let (from, answer) = receive(&socket).unwrap();
            assert!(same(from, resolver.into()), "{from} answered");
            assert_eq!(answer, (1, BY_ZTUNNEL));
        }
    });
    assert_eq!(stage.count("to_dns_udp4"), 2);
}

#[test]
fn what_is_excluded_asks_its_resolver() {
    let stage = Stage::open("dns-excluded").unwrap();
    let [v4, v6] = Family::BOTH.map(|family| stage.resolver(family));
    let answers = |to: SocketAddr| {
        [ask, ask_connected, ask_tcp].map(|asking| asking(&stage.pod, to, "mesh.test").unwrap())
    };
    // A network, mapped or not; and the port, whoever is asked.
    let one = format!("{}/32", v4.ip());
    stage
        .enrol(&["--dns", "--exclude-outbound-cidr", &one])
        .unwrap();
    assert_eq!(answers(v4), [BY_RESOLVER; 3]);
    let SocketAddr::V4(plain) = v4 else {
        panic!("a resolver of the other family");
    };
    let mapped = SocketAddrV6::new(plain.ip().to_ipv6_mapped(), 53, 0, 0).into();
    assert_eq!(answers(mapped), [BY_RESOLVER; 3]);
    assert_eq!(answers(v6), [BY_ZTUNNEL; 3]);
    let net = format!("{}/64", v6.ip());
    stage
        .enrol(&["--dns", "--exclude-outbound-cidr", &net])
        .unwrap();
    assert_eq!(
        (answers(v4), answers(v6)),
        ([BY_ZTUNNEL; 3], [BY_RESOLVER; 3])
    );
    stage
        .enrol(&["--dns", "--exclude-outbound-port", "53"])
        .unwrap();
    assert_eq!(
        (answers(v4), answers(v6)),
        ([BY_RESOLVER; 3], [BY_RESOLVER; 3])
    );
    // A socket of IPv6 with a peer of IPv4 is asked about at connect() and at each datagram.
    let left = (stage.count("dns_left_udp4"), stage.count("dns_left_udp6"));
    assert_eq!(left, (7, 4));
}

#[test]
fn one_socket_that_asks_several_resolvers_is_told_who_answered() {
    let stage = Stage::captured("dns-several").unwrap();
    stage.pod.run(|| {
        let socket = bound(stage.resolver(Family::V4)).unwrap();
        let resolvers: Vec<SocketAddr> = (1..=7_u8)
            .map(|n| SocketAddr::from(([10, 88, 0, 100 + n], 53)))
            .collect();
        // All questions before the first answer, and twice, so that known ones are asked again.
        for round in 0..2 {
            for (id, to) in (round * 7..).zip(&resolvers) {
                socket.send_to(&question(id, "mesh.test"), to).unwrap();
            }
            for _ in &resolvers {
                let (from, (id, _)) = receive(&socket).unwrap();
                assert_eq!(from, resolvers[usize::from(id - round * 7)]);
            }
        }
    });
}

#[test]
fn an_address_of_its_own_is_kept() {
    let stage = Stage::captured("dns-bound").unwrap();
    for family in Family::BOTH {
        let own = stage.pod.at(family, 0).unwrap();
        let resolver = stage.resolver(family);
        stage.pod.run(|| {
            let socket = UdpSocket::bind(own).unwrap();
            socket.set_read_timeout(Some(culvert_e2e::LONG)).unwrap();
            socket.send_to(&question(1, "mesh.test"), resolver).unwrap();
            let (from, (_, address)) = receive(&socket).unwrap();
            assert_eq!((from, address), (resolver, BY_ZTUNNEL));
            socket.connect(resolver).unwrap();
            assert_eq!(socket.peer_addr().unwrap(), resolver);
            assert_eq!(socket.local_addr().unwrap().ip(), own.ip());
            socket.send(&question(2, "mesh.test")).unwrap();
            assert_eq!(receive(&socket).unwrap().0, resolver);
        });
    }
}

#[test]
fn lookups_over_tcp_are_answered_as_well() {
    let stage = Stage::captured("dns-tcp").unwrap();
    for family in Family::BOTH {
        let answer = ask_tcp(&stage.pod, nobody(family), "mesh.test");
        assert_eq!(answer.unwrap(), BY_ZTUNNEL);
    }
    assert_eq!(
        (stage.count("to_dns_tcp4"), stage.count("to_dns_tcp6")),
        (1, 1)
    );
}

#[test]
fn a_stream_to_ztunnels_own_port_keeps_its_peers_name() {
    let stage = Stage::captured("dns-stream").unwrap();
    for family in Family::BOTH {
        // There is a resolver by now that answers would be named after.
        ask(&stage.pod, stage.resolver(family), "mesh.test").unwrap();
        let ztunnel = SocketAddr::new(family.loopback(), 15053);
        let stream = connect(&stage.pod, ztunnel, culvert_e2e::LONG).unwrap();
        let peer = stage.pod.run(|| stream.peer_addr().unwrap());
        assert_eq!(peer, ztunnel);
    }
}

#[test]
fn other_ports_and_near_resolvers_are_left_alone() {
    let stage = Stage::captured("dns-left").unwrap();
    let pod = &stage.pod;
    for family in Family::BOTH {
        // A resolver of the pod's own, on loopback and on its address.
        for ip in [family.loopback(), stage.pod_ip(family)] {
            let own = culvert_e2e::dns::Resolver::start(pod, ip, crate::BY_OTHER).unwrap();
            assert_eq!(ask(pod, own.addr(), "mesh.test").unwrap(), crate::BY_OTHER);
            assert_eq!(
                ask_connected(pod, own.addr(), "mesh.test").unwrap(),
                crate::BY_OTHER
            );
            // And its answers to others, asked from port 53 as some resolvers do.
            if ip == stage.pod_ip(family) {
                let seen = stage.outside.run(|| {
                    let mine = stage.outside.at(family, 0).unwrap();
                    let socket = UdpSocket::bind(mine).unwrap();
                    socket.set_read_timeout(Some(culvert_e2e::LONG)).unwrap();
                    socket
                        .send_to(&question(5, "mesh.test"), own.addr())
                        .unwrap();
                    receive(&socket).unwrap()
                });
                assert_eq!(seen, (own.addr(), (5, crate::BY_OTHER)));
            }
        }
        // Multicast DNS and any other port.
        let echo = stage
            .outside
            .run(|| UdpSocket::bind(stage.outside.at(family, 5353).unwrap()));
        let echo = echo.unwrap();
        pod.run(|| {
            let socket = bound(echo.local_addr().unwrap()).unwrap();
            socket
                .send_to(b"hello", echo.local_addr().unwrap())
                .unwrap();
        });
        echo.set_read_timeout(Some(culvert_e2e::LONG)).unwrap();
        assert_eq!(
            echo.recv_from(&mut [0; 9]).unwrap().1.ip(),
            stage.pod_ip(family)
        );
    }
    assert_eq!(
        (stage.count("to_dns_udp4"), stage.count("to_dns_udp6")),
        (0, 0)
    );
    assert_eq!(
        (stage.count("dns_left_udp4"), stage.count("dns_left_udp6")),
        (4, 4)
    );
}

/// A socket as most resolvers' clients make them: bound to nothing.
fn unbound(resolver: SocketAddr) -> UdpSocket {
    let domain = socket2::Domain::for_address(resolver);
    let socket = socket2::Socket::new(domain, socket2::Type::DGRAM, None).unwrap();
    let socket = UdpSocket::from(socket);
    socket.set_read_timeout(Some(culvert_e2e::LONG)).unwrap();
    socket
}

#[test]
fn a_socket_that_connects_again_reaches_whom_it_asks_for() {
    let stage = Stage::open("dns-again").unwrap();
    for interfaces in 1..=2 {
        if interfaces == 2 {
            stage.mesh.lab.add_interface(&stage.pod, "net1").unwrap();
        }
        stage.enrol(&["--dns"]).unwrap();
        for family in Family::BOTH {
            let echo = stage
                .outside
                .run(|| UdpSocket::bind(stage.outside.at(family, 4000).unwrap()))
                .unwrap();
            echo.set_read_timeout(Some(culvert_e2e::LONG)).unwrap();
            let resolver = stage.resolver(family);
            stage.pod.run(|| {
                let socket = unbound(resolver);
                for _ in 0..2 {
                    socket.connect(resolver).unwrap();
                    assert_eq!(socket.peer_addr().unwrap(), resolver);
                    assert_eq!(socket.local_addr().unwrap().ip(), stage.pod_ip(family));
                    socket.send(&question(1, "mesh.test")).unwrap();
                    assert_eq!(receive(&socket).unwrap(), (resolver, (1, BY_ZTUNNEL)));

                    socket.connect(echo.local_addr().unwrap()).unwrap();
                    socket.send(b"hello").unwrap();
                    let (_, from) = echo.recv_from(&mut [0; 9]).unwrap();
                    assert_eq!(from.ip(), stage.pod_ip(family));
                    assert_eq!(socket.peer_addr().unwrap(), echo.local_addr().unwrap());
                }
            });
        }
    }
}

#[test]
fn a_socket_without_its_peer_any_more() {
    let stage = Stage::captured("dns-unspec").unwrap();
    let resolver = stage.resolver(Family::V4);
    stage.pod.run(|| {
        let socket = bound(resolver).unwrap();
        socket.connect(resolver).unwrap();
        disconnect(&socket);
        assert!(socket.peer_addr().is_err());
        for to in [nobody(Family::V4), resolver] {
            socket.send_to(&question(1, "mesh.test"), to).unwrap();
            assert_eq!(receive(&socket).unwrap(), (to, (1, BY_ZTUNNEL)));
        }
    });
}

/// `connect()` to nobody.
#[expect(unsafe_code, reason = "no safe wrapper takes AF_UNSPEC")]
fn disconnect(socket: &UdpSocket) {
    use std::os::fd::AsRawFd as _;
    // SAFETY: plain data, for which all zeros (AF_UNSPEC) is valid.
    let nobody: libc::sockaddr = unsafe { std::mem::zeroed() };
    let length = libc::socklen_t::try_from(size_of_val(&nobody)).unwrap();
    // SAFETY: the address is ours and as long as said.
    let code = unsafe { libc::connect(socket.as_raw_fd(), &raw const nobody, length) };
    assert_eq!(code, 0);
}

#[test]
fn a_socket_with_a_peer_keeps_its_name_whomever_it_asks_besides() {
    let stage = Stage::captured("dns-besides").unwrap();
    for family in Family::BOTH {
        let resolver = stage.resolver(family);
        stage.pod.run(|| {
            let socket = bound(resolver).unwrap();
            socket.connect(resolver).unwrap();
            let besides = nobody(family);
            socket.send_to(&question(1, "mesh.test"), besides).unwrap();
            // Without us such a socket takes no answer of another's at all.
            assert_eq!(receive(&socket).unwrap(), (resolver, (1, BY_ZTUNNEL)));
            assert_eq!(socket.peer_addr().unwrap(), resolver);
        });
    }
}

/// Binds it to a device of the pod's.
fn on(socket: UdpSocket, device: &str) -> UdpSocket {
    let bound = socket2::SockRef::from(&socket);
    bound.bind_device(Some(device.as_bytes())).unwrap();
    socket
}

/// Whoever answers the one question that a connected socket asks.
fn asks(socket: &UdpSocket, resolver: SocketAddr) -> std::net::Ipv4Addr {
    socket.connect(resolver).unwrap();
    socket.send(&question(1, "mesh.test")).unwrap();
    let (from, (_, answer)) = receive(socket).unwrap();
    assert_eq!((from, socket.peer_addr().unwrap()), (resolver, resolver));
    answer
}

#[test]
fn bound_to_a_device() {
    let stage = Stage::open("dns-device").unwrap();
    let capture = Capture::outside(stage.mesh.lab.node(), &stage.pod).unwrap();
    for interfaces in 1..=2 {
        if interfaces == 2 {
            // Without a default route: lookups leave by the first one.
            stage.mesh.lab.add_interface(&stage.pod, "net1").unwrap();
        }
        stage.enrol(&["--dns"]).unwrap();
        let before = [stage.count("to_dns_udp4"), stage.count("to_dns_udp6")];
        for family in Family::BOTH {
            let resolver = stage.resolver(family);
            let own = stage.pod.at(family, 0).unwrap();
            let device = stage.pod.ifname();
            stage.pod.run(|| {
                // Several resolvers of one socket: each answer has its own name.
                for socket in [
                    unbound(resolver),
                    bound(resolver).unwrap(),
                    UdpSocket::bind(own).unwrap(),
                ] {
                    let socket = on(socket, device);
                    socket.set_read_timeout(Some(culvert_e2e::LONG)).unwrap();
                    for to in [resolver, nobody(family), resolver] {
                        socket.send_to(&question(1, "mesh.test"), to).unwrap();
                        assert_eq!(receive(&socket).unwrap(), (to, (1, BY_ZTUNNEL)));
                    }
                }
                assert_eq!(asks(&on(unbound(resolver), device), resolver), BY_ZTUNNEL);
                let with_address = UdpSocket::bind(own).unwrap();
                with_address
                    .set_read_timeout(Some(culvert_e2e::LONG))
                    .unwrap();
                assert_eq!(asks(&on(with_address, device), resolver), BY_ZTUNNEL);
                // Bound once it has its peer.
                let late = unbound(resolver);
                assert_eq!(asks(&late, resolver), BY_ZTUNNEL);
                let late = on(late, device);
                late.send(&question(2, "mesh.test")).unwrap();
                assert_eq!(receive(&late).unwrap(), (resolver, (2, BY_ZTUNNEL)));
            });
        }
        let after = [stage.count("to_dns_udp4"), stage.count("to_dns_udp6")];
        assert_eq!(after, before.map(|count| count + 12));
    }
    none_left(&capture);
}

#[test]
fn bound_to_a_device_by_which_no_answer_would_come() {
    let stage = Stage::captured("dns-deaf").unwrap();
    for family in Family::BOTH {
        let resolver = stage.resolver(family);
        stage.pod.run(|| {
            // A port and no address: connected to loopback it would be given one of loopback's.
            let socket = on(bound(resolver).unwrap(), stage.pod.ifname());
            assert_eq!(asks(&socket, resolver), BY_RESOLVER);
            // Another address than lookups come from.
            let second: ipnet::IpNet = match family {
                Family::V4 => "10.77.200.1/16",
                Family::V6 => "fd77::200:1/64",
            }
            .parse()
            .unwrap();
            stage.pod.add_addr(stage.pod.ifname(), second).unwrap();
            let socket = UdpSocket::bind((second.addr(), 0)).unwrap();
            socket.set_read_timeout(Some(culvert_e2e::LONG)).unwrap();
            let socket = on(socket, stage.pod.ifname());
            assert_eq!(asks(&socket, resolver), BY_RESOLVER);
        });
    }
    assert_eq!(
        (stage.count("dns_left_udp4"), stage.count("dns_left_udp6")),
        (2, 2)
    );
}

#[test]
fn a_mark_alone_does_not_get_past() {
    let stage = Stage::captured("dns-mark").unwrap();
    let resolver = stage.resolver(Family::V4);
    stage.pod.run(|| {
        let socket = bound(resolver).unwrap();
        socket2::SockRef::from(&socket).set_mark(0x539).unwrap();
        socket.send_to(&question(1, "mesh.test"), resolver).unwrap();
        assert_eq!(receive(&socket).unwrap(), (resolver, (1, BY_ZTUNNEL)));
    });
    assert_eq!(stage.count("impostor"), 1);
    assert_eq!(stage.count("dns_ztunnel_udp4"), 0);
}
