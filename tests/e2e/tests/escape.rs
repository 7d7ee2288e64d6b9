//! Attempts of a pod's own processes to get one plaintext byte past ztunnel, with what any process may do to its sockets
//! and with what root of the pod may.
//!
//! The destination is a pod that ztunnel reaches through HBONE, so that neither its port nor the needle may ever be seen
//! on the node's end of the pod's interface. What CAP_NET_RAW allows is in `impostor`.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::AsFd;
use std::time::Duration;

use culvert_e2e::{LONG, Mesh, eventually};
use culvert_lab::{
    Capture, Connect, Creds, Family, Lab, Ns, Packet, Route, Rule, RuleAction, Server, Zds,
    Ztunnel, ZtunnelOptions, connect, roundtrip, sockopt,
};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

const NEEDLE: &[u8] = b"not for anybody on the way";
const PORT: u16 = 8080;
/// A SYN that waits is sent again after 1, 3 and 7 seconds; a new ztunnel must be found by then.
const RETRIES: Duration = Duration::from_secs(20);
/// How long a call that may fail or hang is given. What it sends, it sends at once.
const MOMENT: Duration = Duration::from_millis(300);
const WHO: [Creds; 2] = [Creds::Nobody, Creds::Root];

/// A pod that tries to escape, and one it talks to.
struct Cage {
    servers: [Server; 2],
    mesh: Mesh,
    options: ZtunnelOptions,
    a: Ns,
    b: Ns,
}

impl Cage {
    /// Nothing is enrolled yet.
    fn open(name: &str) -> Self {
        let lab = Lab::new(name).unwrap();
        let (a, b) = (lab.pod("a").unwrap(), lab.pod("b").unwrap());
        let zds = Zds::start(&lab).unwrap();
        let options = ZtunnelOptions::new().hbone(&a).hbone(&b);
        let ztunnel = Ztunnel::start(&lab, &zds, &options).unwrap();
        let servers =
            Family::BOTH.map(|family| Server::echo(&b, b.at(family, PORT).unwrap()).unwrap());
        Self {
            servers,
            mesh: Mesh { zds, ztunnel, lab },
            options,
            a,
            b,
        }
    }

    fn shut(name: &str, args: &[&str]) -> Self {
        let cage = Self::open(name);
        cage.enrol(args);
        cage
    }

    fn enrol(&self, args: &[&str]) {
        self.mesh.enrol(&self.a, args).unwrap();
        self.mesh.enrol(&self.b, args).unwrap();
    }

    /// A new ztunnel in the place of one that is gone.
    fn new_ztunnel(&mut self, args: &[&str]) {
        for pod in [&self.a, &self.b] {
            self.mesh.zds.del(pod.name()).unwrap();
        }
        self.mesh.ztunnel = Ztunnel::start(&self.mesh.lab, &self.mesh.zds, &self.options).unwrap();
        self.enrol(args);
    }

    fn server(&self, family: Family) -> &Server {
        match family {
            Family::V4 => &self.servers[0],
            Family::V6 => &self.servers[1],
        }
    }

    fn wire(&self) -> Capture {
        Capture::outside(self.mesh.lab.node(), &self.a).unwrap()
    }

    /// Talks, and makes sure that the other end heard it from the pod's own address.
    fn talk(&self, stream: &std::net::TcpStream, family: Family, what: &str) {
        let answer = roundtrip(stream, NEEDLE).unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_eq!(answer, NEEDLE, "{what}");
        let peer = *self.server(family).peers().last().unwrap();
        assert_eq!(peer.ip(), self.a.ip(family).unwrap(), "{what}");
    }
}

/// What must never be seen, whatever became of the call.
fn nothing_escaped(wire: &Capture, what: &str) {
    wire.none(|p| p.routing_header || p.is_tcp() && (p.src.port() == PORT || p.dst.port() == PORT))
        .unwrap_or_else(|e| panic!("{what}: {e}"));
    assert!(
        !wire.contains(NEEDLE).unwrap(),
        "{what}: the secret is on the wire:\n{}",
        wire.describe()
    );
}

#[derive(Clone, Copy, Debug)]
enum Bind {
    Name,
    Index,
}

impl Bind {
    const BOTH: [Self; 2] = [Self::Name, Self::Index];

    fn apply(self, socket: &impl AsFd, ifname: &str, ifindex: u32) -> io::Result<()> {
        let index = i32::try_from(ifindex).unwrap();
        let fd = socket.as_fd();
        match self {
            Self::Name => sockopt::set_bytes(
                fd,
                libc::SOL_SOCKET,
                libc::SO_BINDTODEVICE,
                ifname.as_bytes(),
            ),
            Self::Index => sockopt::set_int(fd, libc::SOL_SOCKET, libc::SO_BINDTOIFINDEX, index),
        }
    }
}

fn tcp(family: Family) -> Socket {
    let domain = match family {
        Family::V4 => Domain::IPV4,
        Family::V6 => Domain::IPV6,
    };
    Socket::new(domain, Type::STREAM, Some(Protocol::TCP)).unwrap()
}

/// Connects a socket that is there already, gives up after a while, and says what came of it.
fn connect_socket(socket: &Socket, to: SocketAddr, timeout: Duration) -> io::Result<()> {
    // Blocking: after a non-blocking one that failed, the next call on the same socket only tells of that.
    socket.set_write_timeout(Some(timeout))?;
    socket.connect(&to.into())
}

#[test]
fn the_wire_shows_what_is_not_captured() {
    let cage = Cage::open("control");
    for family in Family::BOTH {
        let wire = cage.wire();
        let stream = connect(&cage.a, cage.server(family).addr(), LONG).unwrap();
        cage.talk(&stream, family, "not enrolled");
        assert!(wire.contains(NEEDLE).unwrap());
        assert!(wire.ports().unwrap().contains(&PORT));
    }
}

#[test]
fn a_device_before_connect() {
    let cage = Cage::shut("dev-before", &[]);
    let index = cage.a.ifindex("eth0").unwrap();
    let wire = cage.wire();
    for family in Family::BOTH {
        for who in WHO {
            for bind in Bind::BOTH {
                let what = format!("{family} {who} {bind:?}");
                let stream = Connect::to(cage.server(family).addr())
                    .creds(who)
                    .before(|socket| bind.apply(socket, "eth0", index))
                    .run(&cage.a)
                    .unwrap_or_else(|e| panic!("{what}: {e}"));
                cage.talk(&stream, family, &what);
                nothing_escaped(&wire, &what);
            }
        }
    }
    assert!(wire.ports().unwrap().contains(&15008));
}

#[test]
fn a_device_after_connect() {
    let cage = Cage::shut("dev-after", &[]);
    let index = cage.a.ifindex("eth0").unwrap();
    let wire = cage.wire();
    for family in Family::BOTH {
        for who in WHO {
            for bind in Bind::BOTH {
                let what = format!("{family} {who} {bind:?}");
                let stream = Connect::to(cage.server(family).addr())
                    .creds(who)
                    .run(&cage.a)
                    .unwrap_or_else(|e| panic!("{what}: {e}"));
                cage.talk(&stream, family, &what);
                // Refusing is as good as ignoring.
                let _either = cage.a.run_as(who, || bind.apply(&stream, "eth0", index));
                cage.talk(&stream, family, &what);
                nothing_escaped(&wire, &what);
            }
        }
    }
}

#[test]
fn a_device_while_the_syn_waits() {
    let hold = ["--hold", "forever"];
    let mut cage = Cage::shut("dev-syn", &hold);
    let index = cage.a.ifindex("eth0").unwrap();
    cage.mesh.ztunnel.kill().unwrap();
    let wire = cage.wire();
    let mut waiting = Vec::new();
    for family in Family::BOTH {
        for who in WHO {
            for bind in Bind::BOTH {
                let what = format!("{family} {who} {bind:?}");
                let connecting = Connect::to(cage.server(family).addr())
                    .creds(who)
                    .start(&cage.a)
                    .unwrap_or_else(|e| panic!("{what}: {e}"));
                let _either = cage
                    .a
                    .run_as(who, || bind.apply(connecting.socket(), "eth0", index));
                waiting.push((family, what, connecting));
            }
        }
    }
    let unanswered = || cage.mesh.counter(&cage.a, "no_outbound_listener");
    let first = unanswered().unwrap();
    eventually("every SYN is sent again", || {
        Ok(unanswered()? >= first + waiting.len() as u64)
    })
    .unwrap();
    nothing_escaped(&wire, "while ztunnel is away");
    cage.new_ztunnel(&hold);
    for (family, what, connecting) in waiting {
        let stream = connecting
            .wait(RETRIES)
            .unwrap_or_else(|e| panic!("{what}: {e}"));
        cage.talk(&stream, family, &what);
        nothing_escaped(&wire, &what);
    }
}

#[test]
fn a_device_from_before_enrolment() {
    let cage = Cage::open("dev-early");
    let index = cage.a.ifindex("eth0").unwrap();
    let mut sockets = Vec::new();
    for family in Family::BOTH {
        for who in WHO {
            for bind in Bind::BOTH {
                let socket = cage.a.run_as(who, || {
                    let socket = tcp(family);
                    bind.apply(&socket, "eth0", index).unwrap();
                    socket
                });
                sockets.push((family, format!("{family} {who} {bind:?}"), socket));
            }
        }
    }
    cage.enrol(&[]);
    let wire = cage.wire();
    for (family, what, socket) in sockets {
        connect_socket(&socket, cage.server(family).addr(), LONG)
            .unwrap_or_else(|e| panic!("{what}: {e}"));
        cage.talk(&socket.into(), family, &what);
        nothing_escaped(&wire, &what);
    }
}

#[test]
fn a_device_from_before_enrolment_while_ztunnel_is_away() {
    for hold in ["forever", "0"] {
        let cage = Cage::open("dev-early-away");
        let index = cage.a.ifindex("eth0").unwrap();
        let sockets = Family::BOTH.map(|family| {
            cage.a.run_as(Creds::Nobody, || {
                let socket = tcp(family);
                Bind::Name.apply(&socket, "eth0", index).unwrap();
                (family, socket)
            })
        });
        cage.enrol(&["--hold", hold]);
        cage.mesh.ztunnel.kill().unwrap();
        let wire = cage.wire();
        for (family, socket) in sockets {
            let to = cage.server(family).addr();
            let refused = connect_socket(&socket, to, MOMENT);
            assert!(refused.is_err(), "{family}: connected without ztunnel");
            nothing_escaped(&wire, &format!("{family} hold {hold}"));
        }
    }
}

#[test]
fn a_link_local_destination_with_scope() {
    let cage = Cage::open("link-local");
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
    cage.enrol(&[]);
    let wire = cage.wire();
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
            nothing_escaped(&wire, &what);
        }
    }
    assert_eq!(on_node.count() + on_b.count(), 2, "those before enrolment");
}

/// Binding to a link-local address binds the socket to its interface, and takes no option that could be refused.
#[test]
fn a_link_local_source_with_scope() {
    let cage = Cage::shut("link-local-src", &[]);
    let scope = cage.a.ifindex("eth0").unwrap();
    let own = cage.a.link_local("eth0").unwrap();
    let wire = cage.wire();
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
        nothing_escaped(&wire, &format!("{who}"));
    }
}

/// Mobile IPv6's header (type 2) and segment routing's (type 4), with one segment and with two.
fn routing_headers(via: Ipv6Addr, end: Ipv6Addr) -> [(&'static str, Vec<u8>); 3] {
    let type2 = [vec![0, 2, 2, 1, 0, 0, 0, 0], via.octets().to_vec()].concat();
    let one = [vec![0, 2, 4, 0, 0, 0, 0, 0], via.octets().to_vec()].concat();
    let two = [
        vec![0, 4, 4, 1, 1, 0, 0, 0],
        end.octets().to_vec(),
        via.octets().to_vec(),
    ]
    .concat();
    [
        ("type 2", type2),
        ("one segment", one),
        ("two segments", two),
    ]
}

#[test]
fn an_ipv6_routing_header() {
    let cage = Cage::open("rthdr");
    let (own, via) = (cage.a.v6().unwrap(), cage.b.v6().unwrap());
    let outside = cage.mesh.lab.outside().unwrap().v6().unwrap();
    // Each kind this kernel accepts, towards each destination; how many it accepted.
    let attempt = |who: Creds, after: &dyn Fn(&str)| {
        let mut accepted = 0;
        for to in [Ipv6Addr::LOCALHOST, own, via, outside] {
            for (kind, header) in routing_headers(via, to) {
                let what = format!("{who} to {to} by {kind}");
                let option = cage.a.run_as(who, || {
                    let socket = tcp(Family::V6);
                    let fd = socket.as_fd();
                    sockopt::set_bytes(fd, libc::IPPROTO_IPV6, libc::IPV6_RTHDR, &header)
                        .map(|()| socket)
                });
                let Ok(socket) = option else { continue };
                accepted += 1;
                let to = SocketAddr::new(to.into(), PORT);
                if connect_socket(&socket, to, MOMENT).is_ok() {
                    let _either = io::Write::write_all(&mut &socket, NEEDLE);
                }
                after(&what);
            }
        }
        accepted
    };
    let open = cage.wire();
    attempt(Creds::Nobody, &|_| ());
    assert!(
        open.any(|p| p.routing_header).unwrap(),
        "without us a routing header leads out of the pod:\n{}",
        open.describe()
    );
    cage.enrol(&[]);
    let wire = cage.wire();
    for who in WHO {
        let accepted = attempt(who, &|what| nothing_escaped(&wire, what));
        assert!(accepted > 0, "this kernel accepts no routing header");
    }
}

/// What leaves by an interface that came after enrolment, with and without somebody who watches for it.
fn interface_added_later(name: &str, watching: bool) {
    let cage = Cage::open(name);
    let node = cage.mesh.lab.node();
    let _on_node = Family::BOTH.map(|family| {
        Server::builder(node, SocketAddr::new(family.unspecified(), PORT))
            .start()
            .unwrap()
    });
    // Sockets from before enrolment, bound to the number that the interface will have.
    let next = 1 + cage
        .a
        .interfaces()
        .unwrap()
        .iter()
        .map(|i| cage.a.ifindex(i).unwrap())
        .max()
        .unwrap();
    let mut early = Vec::new();
    for family in Family::BOTH {
        for to in [node.at(family, PORT).unwrap(), cage.server(family).addr()] {
            let socket = cage.a.run_as(Creds::Nobody, || tcp(family));
            Bind::Index.apply(&socket, "", next).unwrap();
            early.push((to, socket));
        }
    }
    cage.enrol(&[]);
    let mut watcher = None;
    if watching {
        let child = cage.mesh.lab.culvert_spawn(&["netns", "watch"]).unwrap();
        child.wait_for_output("watching 2", LONG).unwrap();
        watcher = Some(child);
    }
    let host_end = cage.mesh.lab.add_interface(&cage.a, "net1").unwrap();
    let index = cage.a.ifindex("net1").unwrap();
    assert_eq!(index, next);
    for (here, there) in [
        ("10.99.0.2/24", "10.99.0.1/24"),
        ("fd99::2/64", "fd99::1/64"),
    ] {
        cage.a.add_addr("net1", here.parse().unwrap()).unwrap();
        node.add_addr(&host_end, there.parse().unwrap()).unwrap();
    }
    // IPv6 asks for a route by that interface before it sends anything.
    let by_net1 = Route {
        dev: Some("net1".to_owned()),
        metric: Some(4000),
        ..Route::default_via("fd99::1".parse().unwrap())
    };
    cage.a.add_route(&by_net1).unwrap();
    if watcher.is_some() {
        for family in Family::BOTH {
            eventually("the watcher turns the new interface round", || {
                let routes = cage.a.routes(family)?;
                Ok(routes
                    .iter()
                    .any(|r| r.contains("Table(15001)") && r.contains(&format!("Oif({index})"))))
            })
            .unwrap_or_else(|e| panic!("{e}: {:#?}", cage.a.routes(family)));
        }
        eventually("the watcher learns the new addresses", || {
            let shown = cage.mesh.show(&cage.a)?.to_string();
            Ok(shown.contains("10.99.0.2") && shown.contains("fd99::2"))
        })
        .unwrap_or_else(|e| panic!("{e}: {:#}", cage.mesh.show(&cage.a).unwrap()));
    }
    let wire = Capture::start(node, &host_end).unwrap();
    let eth0 = cage.wire();
    // Link-local addresses bind by themselves, as source and as destination.
    let own = SocketAddrV6::new(cage.a.link_local("net1").unwrap(), 0, 0, index);
    let peer = SocketAddrV6::new(node.link_local(&host_end).unwrap(), PORT, 0, index);
    let far = cage.server(Family::V6).addr();
    for (to, from) in [
        (peer.into(), None),
        (peer.into(), Some(own.into())),
        (far, Some(own.into())),
    ] {
        let mut attempt = Connect::to(to).creds(Creds::Nobody).timeout(MOMENT);
        if let Some(from) = from {
            attempt = attempt.from(from);
        }
        if let Ok(stream) = attempt.run(&cage.a) {
            let _either = roundtrip(&stream, NEEDLE);
        }
        nothing_escaped(&wire, &format!("{to} from {from:?}"));
    }
    // Bound after enrolment: taken, and nothing done.
    for family in Family::BOTH {
        for bind in Bind::BOTH {
            let stream = Connect::to(cage.server(family).addr())
                .creds(Creds::Nobody)
                .before(|socket| bind.apply(socket, "net1", index))
                .run(&cage.a)
                .unwrap();
            cage.talk(&stream, family, "bound after enrolment");
        }
    }
    for (to, socket) in early {
        let connected = connect_socket(&socket, to, if watching { LONG } else { MOMENT });
        if watching {
            // As any other: through ztunnel, which passes on in plaintext what is for the node.
            connected.unwrap_or_else(|e| panic!("{to}: {e}"));
            assert_eq!(
                roundtrip(&socket.into(), b"sent late").unwrap(),
                b"sent late"
            );
        } else if to.is_ipv6() {
            assert!(connected.is_err(), "{to}: connected");
        } else {
            // The one way out, which `netns watch` closes: IPv4 takes a failed look-up with a device for "on link", and
            // a route for a device that is not there yet cannot be made.
            assert!(
                wire.any(Packet::is_syn).unwrap() || connected.is_err(),
                "{to}"
            );
            wire.clear();
        }
    }
    // What ztunnel has asked of the node in the pod's name may be answered by this way.
    wire.none(|p| !p.outgoing && p.is_tcp() && p.dst.port() == PORT)
        .unwrap();
    assert!(!wire.contains(NEEDLE).unwrap());
    eth0.none(|p| p.is_tcp() && p.dst == cage.server(Family::of(p.dst.ip())).addr())
        .unwrap();
}

#[test]
fn an_interface_added_later_is_watched() {
    interface_added_later("later-watched", true);
}

#[test]
fn an_interface_added_later_while_nothing_watches() {
    interface_added_later("later", false);
}

#[test]
fn a_rule_of_somebody_else_added_after_enrolment() {
    let cage = Cage::shut("rule", &[]);
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
            let wire = cage.wire();
            let stream = connect(&cage.a, cage.server(family).addr(), LONG)
                .unwrap_or_else(|e| panic!("{what}: {e}"));
            cage.talk(&stream, family, &what);
            for ip in [family.loopback(), cage.a.ip(family).unwrap()] {
                let home = Server::echo(&cage.a, SocketAddr::new(ip, PORT)).unwrap();
                let stream =
                    connect(&cage.a, home.addr(), LONG).unwrap_or_else(|e| panic!("{what}: {e}"));
                roundtrip(&stream, NEEDLE).unwrap_or_else(|e| panic!("{what}: {e}"));
            }
            nothing_escaped(&wire, &what);
        }
    }
}

/// The last segments of a connection are answered without a socket, or by what is left of one.
#[test]
fn a_closed_connection_says_nothing_outside() {
    let cage = Cage::shut("closed", &[]);
    let wire = cage.wire();
    for family in Family::BOTH {
        for round in 0..20 {
            let server = cage.server(family);
            let stream = connect(&cage.a, server.addr(), LONG).unwrap();
            cage.talk(&stream, family, "open");
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
    nothing_escaped(&wire, "closed");
}

#[test]
fn without_routing() {
    let cage = Cage::shut("dontroute", &[]);
    let wire = cage.wire();
    for family in Family::BOTH {
        for who in WHO {
            let what = format!("{family} {who}");
            let tried = Connect::to(cage.server(family).addr())
                .creds(who)
                .before(|s| sockopt::set_int(s.as_fd(), libc::SOL_SOCKET, libc::SO_DONTROUTE, 1))
                .run(&cage.a);
            let stream = tried.unwrap_or_else(|e| panic!("{what}: {e}"));
            cage.talk(&stream, family, &what);
            nothing_escaped(&wire, &what);
        }
    }
}

#[test]
fn a_socket_that_connects_again() {
    let cage = Cage::shut("again", &[]);
    let wire = cage.wire();
    for family in Family::BOTH {
        // After a refusal.
        for ip in [family.loopback(), cage.a.ip(family).unwrap()] {
            let what = format!("{family}, refused by {ip} before");
            let socket = cage.a.run_as(Creds::Nobody, || tcp(family));
            let refused = connect_socket(&socket, SocketAddr::new(ip, 9), LONG);
            assert_eq!(
                refused.unwrap_err().kind(),
                io::ErrorKind::ConnectionRefused,
                "{what}"
            );
            connect_socket(&socket, cage.server(family).addr(), LONG)
                .unwrap_or_else(|e| panic!("{what}: {e}"));
            cage.talk(&socket.into(), family, &what);
            nothing_escaped(&wire, &what);
        }
        // After being taken apart, whatever it was connected to.
        let home = Server::echo(&cage.a, SocketAddr::new(family.loopback(), PORT)).unwrap();
        for first in [home.addr(), cage.server(family).addr()] {
            let what = format!("{family}, connected to {first} before");
            let socket = cage.a.run_as(Creds::Nobody, || tcp(family));
            connect_socket(&socket, first, LONG).unwrap();
            disconnect(&socket).unwrap();
            connect_socket(&socket, cage.server(family).addr(), LONG)
                .unwrap_or_else(|e| panic!("{what}: {e}"));
            cage.talk(&socket.into(), family, &what);
            nothing_escaped(&wire, &what);
        }
    }
}

/// `connect()` to AF_UNSPEC: the socket is as new, but for its options.
#[expect(unsafe_code, reason = "no safe wrapper makes an address of no family")]
fn disconnect(socket: &Socket) -> io::Result<()> {
    // SAFETY: an address of zeroes is a valid one, of family AF_UNSPEC.
    let (_, nowhere) = unsafe {
        SockAddr::try_init(|storage, length| {
            storage.write_bytes(0, 1);
            length.write(16);
            Ok(())
        })
    }?;
    socket.connect(&nowhere)
}

#[test]
fn strict_reverse_path_filter() {
    let cage = Cage::open("rp-filter");
    for scope in ["all", "default", "eth0", "lo"] {
        let key = format!("net/ipv4/conf/{scope}/rp_filter");
        cage.a.set_sysctl(&key, "1").unwrap();
        cage.b.set_sysctl(&key, "1").unwrap();
    }
    cage.enrol(&["--probe-source", "none"]);
    let outside = cage.mesh.lab.outside().unwrap();
    let far = Server::echo(&outside, outside.at(Family::V4, 80).unwrap()).unwrap();
    let wire = cage.wire();
    // Out and in by HBONE.
    let stream = connect(&cage.a, cage.server(Family::V4).addr(), LONG).unwrap();
    cage.talk(&stream, Family::V4, "HBONE");
    nothing_escaped(&wire, "HBONE");
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
    let cage = Cage::shut("foreign-src", &[]);
    let wire = cage.wire();
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
                    let socket = tcp(family);
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
