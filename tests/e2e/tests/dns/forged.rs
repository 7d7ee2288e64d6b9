//! What passes for an answer of ztunnel's without being one.

use std::io::{ErrorKind, IoSlice};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;

use culvert_e2e::dns::{ask, bound, question};
use culvert_lab::{Creds, Family, Ns};
use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, sendmsg};

use crate::Stage;

const PORT: u16 = 15053;
/// What answers of a socket's second resolver come from.
const SLOT: Ipv4Addr = Ipv4Addr::new(127, 53, 0, 1);

/// Bound beside whoever else is there, as far as the kernel allows.
fn beside(ip: IpAddr) -> UdpSocket {
    let addr = SocketAddr::new(ip, PORT);
    let domain = socket2::Domain::for_address(addr);
    let socket = socket2::Socket::new(domain, socket2::Type::DGRAM, None).unwrap();
    socket.set_reuse_port(true).unwrap();
    socket.bind(&addr.into()).unwrap();
    socket.into()
}

/// A datagram that names its source itself.
fn send_from(socket: &UdpSocket, source: Ipv4Addr, to: SocketAddr) -> nix::Result<usize> {
    let source = libc::in_pktinfo {
        ipi_ifindex: 0,
        ipi_spec_dst: libc::in_addr {
            s_addr: u32::from(source).to_be(),
        },
        ipi_addr: libc::in_addr { s_addr: 0 },
    };
    let part = [IoSlice::new(b"forged")];
    let control = [ControlMessage::Ipv4PacketInfo(&source)];
    let to = SockaddrStorage::from(to);
    let fd = socket.as_raw_fd();
    sendmsg(fd, &part, &control, MsgFlags::empty(), Some(&to))
}

/// How each attempt to reach the victim's port went: true for sent.
fn attempts(pod: &Ns, victim: [u16; 2]) -> Vec<bool> {
    let [four, six] = victim;
    let own = Family::BOTH.map(|family| pod.ip(family).unwrap());
    let sent = |result: std::io::Result<()>| {
        let refused = |e: std::io::Error| assert_eq!(e.kind(), ErrorKind::PermissionDenied);
        result.map_err(refused).is_ok()
    };
    let mut went = pod.run_as(Creds::Nobody, || {
        let slot = UdpSocket::bind((SLOT, PORT)).unwrap();
        let send = |to: (IpAddr, u16)| sent(slot.send_to(b"forged", to).map(drop));
        let mut went = vec![
            send((own[0], four)),
            send((Ipv4Addr::LOCALHOST.into(), four)),
        ];
        went.push(sent(slot.connect((own[0], four))));
        let plain = UdpSocket::bind((own[0], PORT)).unwrap();
        let from_slot = send_from(&plain, SLOT, (own[0], four).into());
        went.push(sent(from_slot.map(drop).map_err(Into::into)));
        went
    });
    went.extend(pod.run(|| {
        let beside = beside(Ipv6Addr::LOCALHOST.into());
        let sends = [sent(beside.send_to(b"forged", (own[1], six)).map(drop))];
        let connects = [sent(beside.connect((own[1], six)))];
        [sends, connects].concat()
    }));
    went
}

#[test]
fn nobody_but_ztunnel_answers_under_a_resolvers_name() {
    let stage = Stage::captured("dns-forged").unwrap();
    let stranger = stage.mesh.lab.pod("b").unwrap();
    // Captured, but for its lookups: nothing of its own is renamed, so nothing has to be refused.
    let without = stage.mesh.lab.pod("c").unwrap();
    stage.mesh.enrol(&without, &[]).unwrap();
    // Its lookups are not captured any more; sockets from before are still told their resolver's name.
    let formerly = stage.mesh.lab.pod("d").unwrap();
    stage.mesh.enrol(&formerly, &["--dns"]).unwrap();
    stage.mesh.expect_listeners(&formerly, 5).unwrap();
    for family in Family::BOTH {
        ask(&formerly, stage.resolver(family), "mesh.test").unwrap();
    }
    stage.mesh.enrol(&formerly, &[]).unwrap();
    for (pod, forged) in [
        (&stage.pod, false),
        (&stranger, true),
        (&without, true),
        (&formerly, false),
    ] {
        let victims = pod.run(|| {
            Family::BOTH.map(|family| {
                let resolver = stage.resolver(family);
                let socket = bound(resolver).unwrap();
                socket.send_to(&question(1, "mesh.test"), resolver).unwrap();
                socket.recv(&mut [0; 512]).unwrap();
                socket.set_nonblocking(true).unwrap();
                socket
            })
        });
        let ports = victims
            .each_ref()
            .map(|victim| victim.local_addr().unwrap().port());
        assert_eq!(attempts(pod, ports), [forged; 6]);
        for victim in &victims {
            assert_eq!(victim.recv(&mut [0; 512]).is_ok(), forged);
        }
    }
    for (pod, refused) in [(&stage.pod, 6), (&without, 0), (&formerly, 6)] {
        assert_eq!(stage.mesh.counter(pod, "impostor").unwrap(), refused);
    }
    // From an address of its own anybody may use the port.
    stage.pod.run(|| {
        let plain = UdpSocket::bind(stage.pod.at(Family::V4, PORT).unwrap()).unwrap();
        let other = bound(stage.resolver(Family::V4)).unwrap();
        let to = (Ipv4Addr::LOCALHOST, other.local_addr().unwrap().port());
        plain.send_to(b"hello", to).unwrap();
        assert_eq!(
            other.recv_from(&mut [0; 9]).unwrap().1,
            plain.local_addr().unwrap()
        );
    });
}
