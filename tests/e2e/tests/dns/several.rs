//! One socket that asks several resolvers, or says itself where its datagrams come from: each answer under the name of
//! whom it is from.

use std::io::{IoSlice, IoSliceMut};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, UdpSocket};
use std::os::fd::AsRawFd as _;

use culvert_e2e::dns::{bound, parse, question, receive, same};
use culvert_lab::Family;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg, setsockopt,
    sockopt,
};

use crate::{BY_RESOLVER, BY_ZTUNNEL, Stage};

/// As many resolvers as a socket tells apart, the one that is there last; nobody is at the others.
fn resolvers(stage: &Stage, family: Family) -> Vec<SocketAddr> {
    let mut all: Vec<SocketAddr> = (1..=7_u16)
        .map(|n| match family {
            Family::V4 => SocketAddr::from(([10, 88, 0, 100 + n.to_le_bytes()[0]], 53)),
            Family::V6 => SocketAddr::from(([0xfd88, 0, 0, 0, 0, 0, 0, 0x100 + n], 53)),
        })
        .collect();
    all.push(stage.resolver(family));
    all
}

/// All questions before the first answer, and twice, so that known ones are asked again.
fn every_answer_has_its_own_name(socket: &UdpSocket, resolvers: &[SocketAddr]) {
    let count = u16::try_from(resolvers.len()).unwrap();
    for round in 0..2 {
        for (id, to) in (round * count..).zip(resolvers) {
            socket.send_to(&question(id, "mesh.test"), to).unwrap();
        }
        for _ in resolvers {
            let (from, (id, answer)) = receive(socket).unwrap();
            let asked = resolvers[usize::from(id - round * count)];
            assert!(same(from, asked), "{from} answered, not {asked}");
            assert_eq!(answer, BY_ZTUNNEL);
        }
    }
}

#[test]
fn bound_to_nothing_on_both_families() {
    let stage = Stage::captured("dns-sev-any").unwrap();
    for family in Family::BOTH {
        let resolvers = resolvers(&stage, family);
        stage.pod.run(|| {
            every_answer_has_its_own_name(&bound(resolvers[0]).unwrap(), &resolvers);
        });
    }
    assert_eq!(
        (stage.count("to_dns_udp4"), stage.count("to_dns_udp6")),
        (16, 16)
    );
}

#[test]
fn bound_to_the_pods_address_on_both_families() {
    let stage = Stage::captured("dns-sev-own").unwrap();
    for family in Family::BOTH {
        let resolvers = resolvers(&stage, family);
        stage.pod.run(|| {
            let own = stage.pod.at(family, 0).unwrap();
            every_answer_has_its_own_name(&bound_to(own), &resolvers);
        });
    }
}

/// A socket bound to an address of the pod's.
fn bound_to(addr: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind(addr).unwrap();
    socket.set_read_timeout(Some(culvert_e2e::LONG)).unwrap();
    socket
}

#[test]
fn bound_to_any_of_the_pods_addresses_on_one_interface_and_on_two() {
    let stage = Stage::open("dns-sev-second").unwrap();
    let mut own: Vec<IpAddr> = Family::BOTH.map(|family| stage.pod_ip(family)).to_vec();
    for (interface, nets) in [
        ("eth0", ["10.77.200.1/16", "fd77::200:1/64"]),
        ("net1", ["10.99.0.2/24", "fd99::2/64"]),
    ] {
        if interface != stage.pod.ifname() {
            stage.mesh.lab.add_interface(&stage.pod, interface).unwrap();
        }
        for net in nets {
            let net: ipnet::IpNet = net.parse().unwrap();
            stage.pod.add_addr(interface, net).unwrap();
            own.push(net.addr());
        }
        stage.enrol(&["--dns"]).unwrap();
        stage.pod.run(|| {
            for ip in &own {
                let family = if ip.is_ipv4() { Family::V4 } else { Family::V6 };
                let resolvers = resolvers(&stage, family);
                every_answer_has_its_own_name(&bound_to((*ip, 0).into()), &resolvers);
            }
            // The same port on each, at once: answers go to the socket that asked.
            let all: Vec<(UdpSocket, Vec<SocketAddr>)> = own
                .iter()
                .map(|ip| {
                    let family = if ip.is_ipv4() { Family::V4 } else { Family::V6 };
                    (bound_to((*ip, 5300).into()), resolvers(&stage, family))
                })
                .collect();
            for (id, (socket, resolvers)) in (0..).zip(&all) {
                for to in resolvers {
                    socket.send_to(&question(id, "mesh.test"), to).unwrap();
                }
            }
            for (id, (socket, resolvers)) in (0..).zip(&all) {
                let mut from: Vec<SocketAddr> = Vec::new();
                for _ in resolvers {
                    let (answered, answer) = receive(socket).unwrap();
                    assert_eq!(answer, (id, BY_ZTUNNEL));
                    from.push(answered);
                }
                from.sort_unstable();
                let mut asked = resolvers.clone();
                asked.sort_unstable();
                assert_eq!(from, asked);
            }
        });
    }
}

#[test]
fn one_socket_for_both_families() {
    let stage = Stage::captured("dns-sev-both").unwrap();
    let mapped = |addr: SocketAddr| match addr {
        SocketAddr::V4(v4) => SocketAddrV6::new(v4.ip().to_ipv6_mapped(), v4.port(), 0, 0).into(),
        v6 @ SocketAddr::V6(_) => v6,
    };
    let [four, six] = Family::BOTH.map(|family| resolvers(&stage, family));
    // Slots are a socket's, not a family's.
    let both: Vec<SocketAddr> = four[..4]
        .iter()
        .zip(&six[..4])
        .flat_map(|(v4, v6)| [mapped(*v4), *v6])
        .collect();
    stage.pod.run(|| {
        every_answer_has_its_own_name(&bound(both[0]).unwrap(), &both);
    });
}

#[test]
fn several_threads_on_one_v6_socket() {
    let stage = Stage::captured("dns-sev-threads").unwrap();
    let resolvers = resolvers(&stage, Family::V6);
    stage.pod.run(|| {
        let socket = bound(resolvers[0]).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4_u16 {
                let (socket, resolvers) = (&socket, &resolvers);
                scope.spawn(move || {
                    for n in 0..25 {
                        let id = thread * 25 + n;
                        let to = resolvers[usize::from(id) % resolvers.len()];
                        socket.send_to(&question(id, "mesh.test"), to).unwrap();
                    }
                });
            }
            for _ in 0..100 {
                let (from, (id, answer)) = receive(&socket).unwrap();
                let asked = resolvers[usize::from(id) % resolvers.len()];
                assert_eq!((from, answer), (asked, BY_ZTUNNEL));
            }
        });
    });
}

/// One question whose source the message itself names.
fn ask_from(socket: &UdpSocket, to: SocketAddr, id: u16, source: IpAddr) {
    let question = question(id, "mesh.test");
    let part = [IoSlice::new(&question)];
    let fd = socket.as_raw_fd();
    let to = SockaddrStorage::from(to);
    let (v4, v6);
    let control = match source {
        IpAddr::V4(ip) => {
            v4 = libc::in_pktinfo {
                ipi_ifindex: 0,
                ipi_spec_dst: libc::in_addr {
                    s_addr: u32::from(ip).to_be(),
                },
                ipi_addr: libc::in_addr { s_addr: 0 },
            };
            ControlMessage::Ipv4PacketInfo(&v4)
        }
        IpAddr::V6(ip) => {
            v6 = libc::in6_pktinfo {
                ipi6_addr: libc::in6_addr {
                    s6_addr: ip.octets(),
                },
                ipi6_ifindex: 0,
            };
            ControlMessage::Ipv6PacketInfo(&v6)
        }
    };
    sendmsg(fd, &part, &[control], MsgFlags::empty(), Some(&to)).unwrap();
}

/// One answer with who it is from; that it names the address it came to is what the socket asked for.
fn receive_with_address(socket: &UdpSocket) -> (SocketAddr, u16) {
    let mut buffer = [0; 512];
    let mut control = nix::cmsg_space!(libc::in6_pktinfo);
    let mut parts = [IoSliceMut::new(&mut buffer)];
    let got = recvmsg::<SockaddrStorage>(
        socket.as_raw_fd(),
        &mut parts,
        Some(&mut control),
        MsgFlags::empty(),
    )
    .unwrap();
    let from = got.address.unwrap();
    let v4 = from
        .as_sockaddr_in()
        .map(|v4| SocketAddr::V4(SocketAddrV4::from(*v4)));
    let v6 = from
        .as_sockaddr_in6()
        .map(|v6| SocketAddr::V6(SocketAddrV6::from(*v6)));
    let from = v4.or(v6).unwrap();
    let told = got.cmsgs().unwrap().any(|message| {
        matches!(
            message,
            ControlMessageOwned::Ipv4PacketInfo(_) | ControlMessageOwned::Ipv6PacketInfo(_)
        )
    });
    assert!(told, "no packet information");
    (from, parse(&buffer).unwrap().0)
}

#[test]
fn messages_that_name_their_source() {
    let stage = Stage::captured("dns-pktinfo").unwrap();
    for family in Family::BOTH {
        let resolvers = resolvers(&stage, family);
        stage.pod.run(|| {
            let socket = bound(resolvers[0]).unwrap();
            match family {
                Family::V4 => setsockopt(&socket, sockopt::Ipv4PacketInfo, &true).unwrap(),
                Family::V6 => setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true).unwrap(),
            }
            for (id, to) in (0..).zip(&resolvers) {
                ask_from(&socket, *to, id, stage.pod_ip(family));
            }
            for _ in &resolvers {
                let (from, id) = receive_with_address(&socket);
                assert_eq!(from, resolvers[usize::from(id)]);
            }
        });
    }
    assert_eq!(
        (stage.count("to_dns_udp4"), stage.count("to_dns_udp6")),
        (8, 8)
    );
}

#[test]
fn a_socket_with_a_peer_from_before_is_answered_by_that_peer() {
    let stage = Stage::open("dns-sev-early").unwrap();
    let sockets: Vec<(UdpSocket, SocketAddr)> = Family::BOTH
        .map(|family| stage.resolver(family))
        .into_iter()
        // Of IPv6, with a peer of IPv4: the kernel names the peer at every datagram.
        .chain([match stage.resolver(Family::V4) {
            SocketAddr::V4(v4) => SocketAddrV6::new(v4.ip().to_ipv6_mapped(), 53, 0, 0).into(),
            v6 @ SocketAddr::V6(_) => v6,
        }])
        .map(|resolver| {
            let socket = stage.pod.run(|| bound(resolver)).unwrap();
            socket.connect(resolver).unwrap();
            (socket, resolver)
        })
        .collect();
    stage.enrol(&["--dns"]).unwrap();
    for (socket, resolver) in &sockets {
        let asks = |id| {
            let (from, answer) = receive(socket).unwrap();
            assert!(same(from, *resolver), "{from} answered, not {resolver}");
            assert_eq!(answer, (id, BY_RESOLVER));
        };
        socket.send(&question(1, "mesh.test")).unwrap();
        asks(1);
        // What names its destination goes to ztunnel only if the answer would be taken.
        if resolver.is_ipv4() {
            socket.send_to(&question(2, "mesh.test"), resolver).unwrap();
            asks(2);
        }
        socket.connect(resolver).unwrap();
        socket.send(&question(3, "mesh.test")).unwrap();
        assert_eq!(receive(socket).unwrap().1, (3, BY_ZTUNNEL));
        assert!(same(socket.peer_addr().unwrap(), *resolver));
    }
}

#[test]
fn a_wildcard_of_ipv6_alone() {
    let stage = Stage::captured("dns-sev-only6").unwrap();
    let resolvers = resolvers(&stage, Family::V6);
    stage.pod.run(|| {
        let socket =
            socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::DGRAM, None).unwrap();
        socket.set_only_v6(true).unwrap();
        socket
            .bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)).into())
            .unwrap();
        let socket = UdpSocket::from(socket);
        socket.set_read_timeout(Some(culvert_e2e::LONG)).unwrap();
        every_answer_has_its_own_name(&socket, &resolvers);
    });
}
