//! Every way in which a socket can ask.

use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};

use culvert_e2e::dns::{ask, ask_connected, bound, question, receive, same};
use culvert_lab::{Family, connect};

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
        use std::io::{Read as _, Write as _};
        let mut stream = connect(&stage.pod, nobody(family), culvert_e2e::LONG).unwrap();
        let query = question(3, "mesh.test");
        let length = u16::try_from(query.len()).unwrap().to_be_bytes();
        stream
            .write_all(&[&length, query.as_slice()].concat())
            .unwrap();
        let mut length = [0; 2];
        stream.read_exact(&mut length).unwrap();
        let mut answer = vec![0; u16::from_be_bytes(length).into()];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(culvert_e2e::dns::parse(&answer).unwrap().1, BY_ZTUNNEL);
    }
    assert_eq!(
        (stage.count("to_dns_tcp4"), stage.count("to_dns_tcp6")),
        (1, 1)
    );
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

#[test]
fn a_socket_that_connects_again_reaches_whom_it_asks_for() {
    let stage = Stage::captured("dns-again").unwrap();
    for family in Family::BOTH {
        let echo = stage
            .outside
            .run(|| UdpSocket::bind(stage.outside.at(family, 4000).unwrap()))
            .unwrap();
        echo.set_read_timeout(Some(culvert_e2e::LONG)).unwrap();
        let resolver = stage.resolver(family);
        stage.pod.run(|| {
            // As most resolvers' clients make them: connected without being bound.
            let domain = socket2::Domain::for_address(resolver);
            let socket = socket2::Socket::new(domain, socket2::Type::DGRAM, None).unwrap();
            let socket = UdpSocket::from(socket);
            socket.set_read_timeout(Some(culvert_e2e::LONG)).unwrap();
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
fn many_at_once_in_one_call_and_in_several_threads() {
    let stage = Stage::captured("dns-many").unwrap();
    let resolver = stage.resolver(Family::V4);
    stage.pod.run(|| {
        let socket = bound(resolver).unwrap();
        let others = [resolver, nobody(Family::V4)];
        // Four threads send, one receives: every answer is the one that was asked for.
        std::thread::scope(|scope| {
            for thread in 0..4_u16 {
                let socket = &socket;
                scope.spawn(move || {
                    for n in 0..25 {
                        let id = thread * 100 + n;
                        let to = others[usize::from(id % 2)];
                        socket.send_to(&question(id, "mesh.test"), to).unwrap();
                    }
                });
            }
            for _ in 0..100 {
                let (from, (id, answer)) = receive(&socket).unwrap();
                assert_eq!((from, answer), (others[usize::from(id % 2)], BY_ZTUNNEL));
            }
        });
        several_in_one_call(&socket, others);
    });
}

/// `sendmmsg` and `recvmmsg`.
fn several_in_one_call(socket: &UdpSocket, to: [SocketAddr; 2]) {
    use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrIn, recvmmsg, sendmmsg};
    use std::io::{IoSlice, IoSliceMut};
    use std::os::fd::AsRawFd as _;
    let fd = socket.as_raw_fd();
    let questions = [question(1, "mesh.test"), question(2, "mesh.test")];
    let out: Vec<_> = questions.iter().map(|q| [IoSlice::new(q)]).collect();
    let addrs = to.map(|to| match to {
        SocketAddr::V4(v4) => Some(SockaddrIn::from(v4)),
        SocketAddr::V6(_) => None,
    });
    let mut headers = MultiHeaders::preallocate(2, None);
    let sent = sendmmsg(fd, &mut headers, &out, addrs, [], MsgFlags::empty()).unwrap();
    assert_eq!(sent.count(), 2);
    culvert_e2e::eventually("two answers in one call or two", {
        let mut seen = 0;
        move || {
            let mut buffers = [[0_u8; 512]; 2];
            let mut parts: Vec<_> = buffers.iter_mut().map(|b| [IoSliceMut::new(b)]).collect();
            let mut headers = MultiHeaders::<SockaddrIn>::preallocate(2, None);
            let got = recvmmsg(
                fd,
                &mut headers,
                parts.iter_mut(),
                MsgFlags::MSG_WAITFORONE,
                None,
            )?;
            let from: Vec<_> = got
                .map(|m| SocketAddr::from(std::net::SocketAddrV4::from(m.address.unwrap())))
                .collect();
            for (from, message) in from.into_iter().zip(&buffers) {
                let (id, _) = culvert_e2e::dns::parse(message)?;
                anyhow::ensure!(from == to[usize::from(id - 1)], "{from} answered {id}");
                seen += 1;
            }
            Ok(seen == 2)
        }
    })
    .unwrap();
}

#[test]
fn bound_to_a_device_asks_the_resolver_itself() {
    let stage = Stage::captured("dns-device").unwrap();
    for family in Family::BOTH {
        let resolver = stage.resolver(family);
        stage.pod.run(|| {
            for connected in [false, true] {
                let socket = bound(resolver).unwrap();
                let device = socket2::SockRef::from(&socket);
                device
                    .bind_device(Some(stage.pod.ifname().as_bytes()))
                    .unwrap();
                if connected {
                    socket.connect(resolver).unwrap();
                    socket.send(&question(1, "mesh.test")).unwrap();
                } else {
                    socket.send_to(&question(1, "mesh.test"), resolver).unwrap();
                }
                assert_eq!(receive(&socket).unwrap(), (resolver, (1, BY_RESOLVER)));
            }
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
