//! Many lookups at once on one socket: in one call, and from several threads.

use std::io::{IoSlice, IoSliceMut};
use std::net::{Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, UdpSocket};
use std::os::fd::AsRawFd as _;

use culvert_e2e::dns::{bound, parse, question, receive, same};
use culvert_lab::Family;
use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrStorage, recvmmsg, sendmmsg};

use crate::{BY_ZTUNNEL, Stage, nobody};

#[test]
fn in_one_call_on_sockets_of_every_kind() {
    let stage = Stage::captured("dns-mmsg").unwrap();
    let [v4, v6] = Family::BOTH.map(|family| [stage.resolver(family), nobody(family)]);
    let mapped = v4.map(|to| match to {
        SocketAddr::V4(v4) => SocketAddrV6::new(v4.ip().to_ipv6_mapped(), v4.port(), 0, 0).into(),
        v6 @ SocketAddr::V6(_) => v6,
    });
    let own = |family| UdpSocket::bind(stage.pod.at(family, 0).unwrap()).unwrap();
    stage.pod.run(|| {
        every_answer_in_few_calls(&bound(v4[0]).unwrap(), &v4);
        every_answer_in_few_calls(&bound(v6[0]).unwrap(), &v6);
        every_answer_in_few_calls(&bound(v6[0]).unwrap(), &[mapped, v6].concat());
        every_answer_in_few_calls(&of_ipv6_alone(), &v6);
        every_answer_in_few_calls(&own(Family::V4), &v4);
        every_answer_in_few_calls(&own(Family::V6), &v6);
    });
    // Twice each.
    assert_eq!(
        (stage.count("to_dns_udp4"), stage.count("to_dns_udp6")),
        (12, 16)
    );
}

fn of_ipv6_alone() -> UdpSocket {
    let socket = socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::DGRAM, None).unwrap();
    socket.set_only_v6(true).unwrap();
    let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0));
    socket.bind(&any.into()).unwrap();
    socket.into()
}

/// `sendmmsg` of one question to each, and `recvmmsg` of what has come, until all has.
fn every_answer_in_few_calls(socket: &UdpSocket, resolvers: &[SocketAddr]) {
    let fd = socket.as_raw_fd();
    socket.set_read_timeout(Some(culvert_e2e::LONG)).unwrap();
    let count = resolvers.len();
    for round in 0..2 {
        let first = u16::try_from(round * count).unwrap();
        let questions: Vec<_> = (first..)
            .take(count)
            .map(|id| question(id, "mesh.test"))
            .collect();
        let parts: Vec<_> = questions.iter().map(|q| [IoSlice::new(q)]).collect();
        let to: Vec<_> = resolvers
            .iter()
            .map(|to| Some(SockaddrStorage::from(*to)))
            .collect();
        let mut headers = MultiHeaders::preallocate(count, None);
        let sent = sendmmsg(fd, &mut headers, &parts, &to, [], MsgFlags::empty()).unwrap();
        assert_eq!(sent.count(), count);
        let mut seen = 0;
        while seen < count {
            let mut buffers = vec![[0_u8; 512]; count];
            let mut parts: Vec<_> = buffers.iter_mut().map(|b| [IoSliceMut::new(b)]).collect();
            let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(count, None);
            let flags = MsgFlags::MSG_WAITFORONE;
            let got = recvmmsg(fd, &mut headers, parts.iter_mut(), flags, None).unwrap();
            let from: Vec<_> = got.map(|m| address(m.address.unwrap())).collect();
            for (from, message) in from.into_iter().zip(&buffers) {
                let (id, answer) = parse(message).unwrap();
                let asked = resolvers[usize::from(id - first)];
                assert!(same(from, asked), "{from} answered, not {asked}");
                assert_eq!(answer, BY_ZTUNNEL);
                seen += 1;
            }
        }
    }
}

fn address(from: SockaddrStorage) -> SocketAddr {
    let v4 = from.as_sockaddr_in();
    let v6 = from.as_sockaddr_in6();
    v4.map(|v4| SocketAddrV4::from(*v4).into())
        .or(v6.map(|v6| SocketAddrV6::from(*v6).into()))
        .unwrap()
}

#[test]
fn in_several_threads() {
    let stage = Stage::captured("dns-threads").unwrap();
    for family in Family::BOTH {
        let resolvers = [stage.resolver(family), nobody(family)];
        stage.pod.run(|| {
            let socket = bound(resolvers[0]).unwrap();
            // Four threads send, one receives: every answer is the one that was asked for.
            std::thread::scope(|scope| {
                for thread in 0..4_u16 {
                    let socket = &socket;
                    scope.spawn(move || {
                        for n in 0..25 {
                            let id = thread * 100 + n;
                            let to = resolvers[usize::from(id % 2)];
                            socket.send_to(&question(id, "mesh.test"), to).unwrap();
                        }
                    });
                }
                for _ in 0..100 {
                    let (from, (id, answer)) = receive(&socket).unwrap();
                    assert_eq!((from, answer), (resolvers[usize::from(id % 2)], BY_ZTUNNEL));
                }
            });
        });
    }
}

#[test]
fn thirty_questions_on_one_socket() {
    let stage = Stage::captured("dns-thirty").unwrap();
    for (family, verdict) in [(Family::V4, "to_dns_udp4"), (Family::V6, "to_dns_udp6")] {
        let resolver = stage.resolver(family);
        for connected in [false, true] {
            let before = stage.count(verdict);
            stage.pod.run(|| {
                let socket = bound(resolver).unwrap();
                if connected {
                    socket.connect(resolver).unwrap();
                }
                for id in 0..30 {
                    let question = question(id, "mesh.test");
                    match connected {
                        true => socket.send(&question).unwrap(),
                        false => socket.send_to(&question, resolver).unwrap(),
                    };
                    assert_eq!(receive(&socket).unwrap(), (resolver, (id, BY_ZTUNNEL)));
                }
            });
            // Decided once for a peer, and for each datagram without.
            let decided = stage.count(verdict) - before;
            assert_eq!(decided, if connected { 1 } else { 30 });
        }
    }
    assert_eq!(stage.mesh.stat(&stage.pod, "dns_queries").unwrap(), 120);
}
