//! Attempts of a pod's own processes to get one plaintext byte past ztunnel, with what any process may do to its sockets
//! and with what root of the pod may.
//!
//! The destination is a pod that ztunnel reaches through HBONE, so that neither its port nor the needle may ever be seen
//! on the node's end of the pod's interface. What CAP_NET_RAW allows is in `impostor`.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::AsFd;
use std::time::Duration;

use culvert_e2e::LONG;
use culvert_e2e::cage::{Cage, MOMENT, NEEDLE, PORT, connect_socket, nothing_escaped, tcp};
use culvert_lab::{
    Connect, Creds, Family, Route, Rule, RuleAction, Server, connect, roundtrip, sockopt,
};

const WHO: [Creds; 2] = [Creds::Nobody, Creds::Root];

#[test]
fn the_wire_shows_what_is_not_captured() {
    let cage = Cage::open("control").unwrap();
    for family in Family::BOTH {
        let wire = cage.wire().unwrap();
        let stream = connect(&cage.a, cage.server(family).addr(), LONG).unwrap();
        cage.talk(&stream, family, "not enrolled").unwrap();
        assert!(wire.contains(NEEDLE).unwrap());
        assert!(wire.ports().unwrap().contains(&PORT));
    }
}

#[test]
fn a_link_local_destination_with_scope() {
    let cage = Cage::open("link-local").unwrap();
    let node = cage.mesh.lab.node();
    let on_node = Server::echo(node, SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), PORT)).unwrap();
    let on_b = Server::echo(
        &cage.b,
        SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), PORT + 1),
    )
    .unwrap();
    let scope = cage.a.ifindex("eth0").unwrap();
    let peers = [
        (node.link_local("br0").unwrap(), PORT),
        (cage.b.link_local("eth0").unwrap(), PORT + 1),
    ];
    for (peer, port) in peers {
        let to = SocketAddrV6::new(peer, port, 0, scope).into();
        let stream = connect(&cage.a, to, LONG).unwrap();
        roundtrip(&stream, NEEDLE).unwrap();
    }
    cage.enrol(&[]).unwrap();
    let wire = cage.wire().unwrap();
    for (peer, port) in peers {
        for who in WHO {
            let to = SocketAddrV6::new(peer, port, 0, scope).into();
            let what = format!("{to} {who}");
            if let Ok(stream) = Connect::to(to).creds(who).timeout(MOMENT).run(&cage.a) {
                // ztunnel took it; it has no scope to reach such a peer with.
                let _cut = roundtrip(&stream, NEEDLE);
            }
            wire.none(|p| p.is_tcp() && p.dst.port() == port)
                .unwrap_or_else(|e| panic!("{what}: {e}"));
            nothing_escaped(&wire, &what).unwrap();
        }
    }
    assert_eq!(on_node.count() + on_b.count(), 2, "those before enrolment");
}

/// Binding to a link-local address binds the socket to its interface, and takes no option that could be refused.
#[test]
fn a_link_local_source_with_scope() {
    let cage = Cage::shut("link-local-src", &[]).unwrap();
    let scope = cage.a.ifindex("eth0").unwrap();
    let own = cage.a.link_local("eth0").unwrap();
    let wire = cage.wire().unwrap();
    for who in WHO {
        let from = SocketAddrV6::new(own, 0, 0, scope).into();
        let tried = Connect::to(cage.server(Family::V6).addr())
            .from(from)
            .creds(who)
            .timeout(MOMENT)
            .run(&cage.a);
        if let Ok(stream) = tried {
            let _either = roundtrip(&stream, NEEDLE);
        }
        nothing_escaped(&wire, &format!("{who}")).unwrap();
    }
}

#[test]
fn a_rule_of_somebody_else_added_after_enrolment() {
    let cage = Cage::shut("rule", &[]).unwrap();
    for family in Family::BOTH {
        // As a VPN client does it: everything but its own mark by its own table, here straight out.
        let out = |table| Route {
            dev: Some("eth0".to_owned()),
            table,
            ..Route::default_via(cage.mesh.lab.node().ip(family).unwrap())
        };
        cage.a.add_route(&out(99)).unwrap();
        for rule in [
            Rule::fwmark(family, 0x42, 99),
            Rule::fwmark(family, 0x111, 99),
            Rule {
                fwmark: None,
                ..Rule::fwmark(family, 0, 99)
            },
            Rule {
                from: Some(family.loopback().into()),
                fwmark: None,
                action: RuleAction::Blackhole,
                ..Rule::fwmark(family, 0, 0)
            },
        ] {
            cage.a.add_rule(&rule).unwrap();
            let what = format!("{rule:?}\n{:#?}", cage.a.rules(family).unwrap());
            let wire = cage.wire().unwrap();
            let stream = connect(&cage.a, cage.server(family).addr(), LONG)
                .unwrap_or_else(|e| panic!("{what}: {e}"));
            cage.talk(&stream, family, &what).unwrap();
            for ip in [family.loopback(), cage.a.ip(family).unwrap()] {
                let home = Server::echo(&cage.a, SocketAddr::new(ip, PORT)).unwrap();
                let stream =
                    connect(&cage.a, home.addr(), LONG).unwrap_or_else(|e| panic!("{what}: {e}"));
                roundtrip(&stream, NEEDLE).unwrap_or_else(|e| panic!("{what}: {e}"));
            }
            nothing_escaped(&wire, &what).unwrap();
        }
    }
}

/// The last segments of a connection are answered without a socket, or by what is left of one.
#[test]
fn a_closed_connection_says_nothing_outside() {
    let cage = Cage::shut("closed", &[]).unwrap();
    let wire = cage.wire().unwrap();
    for family in Family::BOTH {
        for round in 0..20 {
            let server = cage.server(family);
            let stream = connect(&cage.a, server.addr(), LONG).unwrap();
            cage.talk(&stream, family, "open").unwrap();
            let what = format!("{family} round {round}");
            if round % 2 == 0 {
                // The client first, in good order.
                drop(stream);
            } else {
                // The client first, with bytes on the way that it will not read.
                io::Write::write_all(&mut &stream, NEEDLE).unwrap();
                drop(stream);
            }
            server
                .wait(|all| all.last().is_some_and(|last| last.closed), LONG)
                .unwrap_or_else(|e| panic!("{what}: {e}"));
        }
    }
    // What was closed last may still be on its way, and ztunnel's FIN is sent again when nobody acknowledges it.
    std::thread::sleep(Duration::from_secs(1));
    nothing_escaped(&wire, "closed").unwrap();
}

#[test]
fn without_routing() {
    let cage = Cage::shut("dontroute", &[]).unwrap();
    let wire = cage.wire().unwrap();
    for family in Family::BOTH {
        for who in WHO {
            let what = format!("{family} {who}");
            let tried = Connect::to(cage.server(family).addr())
                .creds(who)
                .before(|s| sockopt::set_int(s.as_fd(), libc::SOL_SOCKET, libc::SO_DONTROUTE, 1))
                .run(&cage.a);
            let stream = tried.unwrap_or_else(|e| panic!("{what}: {e}"));
            cage.talk(&stream, family, &what).unwrap();
            nothing_escaped(&wire, &what).unwrap();
        }
    }
}

#[test]
fn strict_reverse_path_filter() {
    let cage = Cage::open("rp-filter").unwrap();
    for scope in ["all", "default", "eth0", "lo"] {
        let key = format!("net/ipv4/conf/{scope}/rp_filter");
        cage.a.set_sysctl(&key, "1").unwrap();
        cage.b.set_sysctl(&key, "1").unwrap();
    }
    cage.enrol(&["--probe-source", "none"]).unwrap();
    let outside = cage.mesh.lab.outside().unwrap();
    let far = Server::echo(&outside, outside.at(Family::V4, 80).unwrap()).unwrap();
    let wire = cage.wire().unwrap();
    // Out and in by HBONE.
    let stream = connect(&cage.a, cage.server(Family::V4).addr(), LONG).unwrap();
    cage.talk(&stream, Family::V4, "HBONE").unwrap();
    nothing_escaped(&wire, "HBONE").unwrap();
    // Out in plaintext.
    let stream = connect(&cage.a, far.addr(), LONG).unwrap();
    roundtrip(&stream, b"plain").unwrap();
    assert_eq!(far.peers()[0].ip(), cage.a.ip(Family::V4).unwrap());
    // In, in plaintext.
    let before = cage.mesh.stat(&cage.b, "inbound_accepts").unwrap();
    let stream = connect(&outside, cage.server(Family::V4).addr(), LONG).unwrap();
    roundtrip(&stream, b"plain").unwrap();
    let last = *cage.server(Family::V4).peers().last().unwrap();
    assert_eq!(last.ip(), outside.ip(Family::V4).unwrap());
    assert_eq!(
        cage.mesh.stat(&cage.b, "inbound_accepts").unwrap(),
        before + 1
    );
    // To itself.
    for ip in [
        IpAddr::from(Ipv4Addr::LOCALHOST),
        cage.a.ip(Family::V4).unwrap(),
    ] {
        let home = Server::echo(&cage.a, SocketAddr::new(ip, 81)).unwrap();
        roundtrip(&connect(&cage.a, home.addr(), LONG).unwrap(), b"home").unwrap();
    }
}

#[test]
fn a_foreign_source_address() {
    let cage = Cage::shut("foreign-src", &[]).unwrap();
    let wire = cage.wire().unwrap();
    for family in Family::BOTH {
        let foreign: IpAddr = match family {
            Family::V4 => "203.0.113.7".parse().unwrap(),
            Family::V6 => "2001:db8::7".parse().unwrap(),
        };
        let ways = match family {
            Family::V4 => [
                (libc::IPPROTO_IP, libc::IP_FREEBIND),
                (libc::IPPROTO_IP, libc::IP_TRANSPARENT),
            ],
            Family::V6 => [
                (libc::IPPROTO_IPV6, libc::IPV6_FREEBIND),
                (libc::IPPROTO_IPV6, libc::IPV6_TRANSPARENT),
            ],
        };
        for (level, option) in ways {
            for who in WHO {
                let what = format!("{family} {who} option {option}");
                let socket = cage.a.run_as(who, || {
                    let socket = tcp(family).unwrap();
                    sockopt::set_int(socket.as_fd(), level, option, 1)?;
                    socket.bind(&SocketAddr::new(foreign, 0).into())?;
                    io::Result::Ok(socket)
                });
                let Ok(socket) = socket else {
                    assert_eq!(who, Creds::Nobody, "{what}: root may");
                    continue;
                };
                if connect_socket(&socket, cage.server(family).addr(), MOMENT).is_ok() {
                    let _either = roundtrip(&socket.into(), NEEDLE);
                }
                // ztunnel's answer to the SYN goes to whom the address belongs: it is empty, and that is all.
                wire.none(|p| p.is_tcp() && p.src.ip() == foreign)
                    .unwrap_or_else(|e| panic!("{what}: {e}"));
                wire.none(|p| p.dst.ip() == foreign && !p.payload.is_empty())
                    .unwrap_or_else(|e| panic!("{what}: {e}"));
                assert!(!wire.contains(NEEDLE).unwrap(), "{what}");
            }
        }
    }
}
