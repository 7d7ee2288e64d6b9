//! Lookups that name the interface they leave by: a message's packet information, a socket option, a resolver's scope. No
//! program sees it, so the routes have to bring them to ztunnel all the same.

use std::io::IoSlice;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};
use std::os::fd::AsRawFd as _;

use culvert_e2e::dns::{Resolver, ask_connected, bound, question, receive};
use culvert_lab::{Capture, Family, Protocol};
use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, sendmsg};

use crate::{BY_RESOLVER, BY_ZTUNNEL, Stage, nobody};

/// One question that names its interface and, if wanted, its source.
fn ask_by(interface: u32, source: Option<IpAddr>, socket: &UdpSocket, to: SocketAddr, id: u16) {
    let question = question(id, "mesh.test");
    let part = [IoSlice::new(&question)];
    let address = SockaddrStorage::from(to);
    let v4 = libc::in_pktinfo {
        ipi_ifindex: interface.try_into().unwrap(),
        ipi_spec_dst: libc::in_addr {
            s_addr: match source {
                Some(IpAddr::V4(ip)) => u32::from(ip).to_be(),
                _ => 0,
            },
        },
        ipi_addr: libc::in_addr { s_addr: 0 },
    };
    let v6 = libc::in6_pktinfo {
        ipi6_addr: libc::in6_addr {
            s6_addr: match source {
                Some(IpAddr::V6(ip)) => ip.octets(),
                _ => [0; 16],
            },
        },
        ipi6_ifindex: interface,
    };
    let control = if to.is_ipv4() {
        ControlMessage::Ipv4PacketInfo(&v4)
    } else {
        ControlMessage::Ipv6PacketInfo(&v6)
    };
    let fd = socket.as_raw_fd();
    sendmsg(fd, &part, &[control], MsgFlags::empty(), Some(&address)).unwrap();
}

/// What the socket sends leaves by this interface, unless the routes know better.
#[expect(unsafe_code, reason = "no wrapper knows IP_UNICAST_IF")]
fn prefer(socket: &UdpSocket, family: Family, interface: u32) {
    // The number in network byte order, unlike all others.
    let interface = interface.to_be();
    let (level, option) = match family {
        Family::V4 => (libc::IPPROTO_IP, 50),
        Family::V6 => (libc::IPPROTO_IPV6, 76),
    };
    let length = libc::socklen_t::try_from(size_of_val(&interface)).unwrap();
    let fd = socket.as_raw_fd();
    // SAFETY: the value is ours and as long as said.
    let code =
        unsafe { libc::setsockopt(fd, level, option, (&raw const interface).cast(), length) };
    assert_eq!(code, 0, "{}", std::io::Error::last_os_error());
}

/// Nothing of the pod's lookups leaves it.
pub(crate) fn none_left(capture: &Capture) {
    let lookup = |port| port == 53 || port == 15053;
    capture
        .none(|p| p.protocol == Protocol::Udp && lookup(p.dst.port()))
        .unwrap();
}

#[test]
fn lookups_that_name_their_interface() {
    let stage = Stage::captured("dns-interface").unwrap();
    let capture = Capture::outside(stage.mesh.lab.node(), &stage.pod).unwrap();
    let interface = stage.pod.ifindex(stage.pod.ifname()).unwrap();
    for family in Family::BOTH {
        let resolvers = [stage.resolver(family), nobody(family)];
        let answered = |socket: &UdpSocket, first: u16| {
            for _ in resolvers {
                let (from, (id, answer)) = receive(socket).unwrap();
                let asked = resolvers[usize::from(id - first)];
                assert_eq!((from, answer), (asked, BY_ZTUNNEL));
            }
        };
        stage.pod.run(|| {
            let socket = bound(resolvers[0]).unwrap();
            for (first, source) in [(0, None), (2, Some(stage.pod_ip(family)))] {
                for (id, to) in (first..).zip(resolvers) {
                    ask_by(interface, source, &socket, to, id);
                }
                answered(&socket, first);
            }
            prefer(&socket, family, interface);
            for (id, to) in (4..).zip(resolvers) {
                socket.send_to(&question(id, "mesh.test"), to).unwrap();
            }
            answered(&socket, 4);
            socket.connect(resolvers[0]).unwrap();
            socket.send(&question(6, "mesh.test")).unwrap();
            assert_eq!(receive(&socket).unwrap(), (resolvers[0], (6, BY_ZTUNNEL)));
        });
    }
    assert_eq!(
        (stage.count("to_dns_udp4"), stage.count("to_dns_udp6")),
        (7, 7)
    );
    none_left(&capture);
}

#[test]
fn a_resolver_of_one_link_is_asked_itself_unless_the_socket_is_connected() {
    let stage = Stage::captured("dns-link").unwrap();
    let node = stage.mesh.lab.node();
    let _resolver = Resolver::start(node, Ipv6Addr::UNSPECIFIED.into(), BY_RESOLVER).unwrap();
    let link = stage.pod.ifindex(stage.pod.ifname()).unwrap();
    let resolver = SocketAddrV6::new(node.link_local("br0").unwrap(), 53, 0, link).into();
    // No program can write the link into the address that an answer is from, and strict clients look at it.
    stage.pod.run(|| {
        let socket = bound(resolver).unwrap();
        socket.send_to(&question(1, "mesh.test"), resolver).unwrap();
        assert_eq!(receive(&socket).unwrap(), (resolver, (1, BY_RESOLVER)));
    });
    assert_eq!(
        ask_connected(&stage.pod, resolver, "mesh.test").unwrap(),
        BY_ZTUNNEL
    );
    assert_eq!(
        (stage.count("to_dns_udp6"), stage.count("dns_left_udp6")),
        (1, 1)
    );
}
