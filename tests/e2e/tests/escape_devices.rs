//! Sockets bound to a device, which is how a process without any capability chooses where its packets go: before enrolment
//! and after, before `connect()`, after it and while it waits, and to interfaces that were not there at enrolment.

use std::io;
use std::net::{SocketAddr, SocketAddrV6};
use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use culvert_e2e::cage::{Cage, MOMENT, NEEDLE, PORT, connect_socket, nothing_escaped, tcp};
use culvert_e2e::{LONG, eventually};
use culvert_lab::{Capture, Connect, Creds, Family, Packet, Route, Server, roundtrip, sockopt};
use ipnet::IpNet;
use socket2::{Protocol, Socket, Type};

/// A SYN that waits is sent again after 1, 3 and 7 seconds; a new ztunnel must be found by then.
const RETRIES: Duration = Duration::from_secs(20);
const WHO: [Creds; 2] = [Creds::Nobody, Creds::Root];

#[derive(Clone, Copy, Debug)]
enum Bind {
    Name,
    Index,
}

impl Bind {
    const BOTH: [Self; 2] = [Self::Name, Self::Index];

    fn apply(self, socket: &impl AsFd, ifname: &str, ifindex: u32) -> io::Result<()> {
        let index = i32::try_from(ifindex).map_err(io::Error::other)?;
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

#[test]
fn a_device_before_connect() {
    let cage = Cage::shut("dev-before", &[]).unwrap();
    let index = cage.a.ifindex("eth0").unwrap();
    let wire = cage.wire().unwrap();
    for family in Family::BOTH {
        for who in WHO {
            for (bind, mptcp) in Bind::BOTH.iter().flat_map(|b| [(*b, false), (*b, true)]) {
                let what = format!("{family} {who} {bind:?} MPTCP {mptcp}");
                let mut attempt = Connect::to(cage.server(family).addr()).creds(who);
                if mptcp {
                    attempt = attempt.mptcp();
                }
                let stream = attempt
                    .before(|socket| bind.apply(socket, "eth0", index))
                    .run(&cage.a)
                    .unwrap_or_else(|e| panic!("{what}: {e}"));
                cage.talk(&stream, family, &what).unwrap();
                nothing_escaped(&wire, &what).unwrap();
            }
        }
    }
    assert!(wire.ports().unwrap().contains(&15008));
}

#[test]
fn a_device_after_connect() {
    let cage = Cage::shut("dev-after", &[]).unwrap();
    let index = cage.a.ifindex("eth0").unwrap();
    let wire = cage.wire().unwrap();
    for family in Family::BOTH {
        for who in WHO {
            for bind in Bind::BOTH {
                let what = format!("{family} {who} {bind:?}");
                let stream = Connect::to(cage.server(family).addr())
                    .creds(who)
                    .run(&cage.a)
                    .unwrap_or_else(|e| panic!("{what}: {e}"));
                cage.talk(&stream, family, &what).unwrap();
                // Refusing is as good as ignoring.
                let _either = cage.a.run_as(who, || bind.apply(&stream, "eth0", index));
                cage.talk(&stream, family, &what).unwrap();
                nothing_escaped(&wire, &what).unwrap();
            }
        }
    }
}

#[test]
fn a_device_while_the_syn_waits() {
    let hold = ["--hold", "forever"];
    let mut cage = Cage::shut("dev-syn", &hold).unwrap();
    let index = cage.a.ifindex("eth0").unwrap();
    cage.mesh.ztunnel.kill().unwrap();
    let wire = cage.wire().unwrap();
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
    nothing_escaped(&wire, "while ztunnel is away").unwrap();
    cage.new_ztunnel(&hold).unwrap();
    for (family, what, connecting) in waiting {
        let stream = connecting
            .wait(RETRIES)
            .unwrap_or_else(|e| panic!("{what}: {e}"));
        cage.talk(&stream, family, &what).unwrap();
        nothing_escaped(&wire, &what).unwrap();
    }
}

#[test]
fn a_device_from_before_enrolment() {
    let cage = Cage::open("dev-early").unwrap();
    let index = cage.a.ifindex("eth0").unwrap();
    let mut sockets = Vec::new();
    for family in Family::BOTH {
        for who in WHO {
            for (bind, protocol) in [
                (Bind::Name, Protocol::TCP),
                (Bind::Index, Protocol::TCP),
                (Bind::Name, Protocol::MPTCP),
            ] {
                let socket = cage.a.run_as(who, || {
                    let domain = tcp(family)?.domain()?;
                    let socket = Socket::new(domain, Type::STREAM, Some(protocol))?;
                    bind.apply(&socket, "eth0", index)?;
                    io::Result::Ok(socket)
                });
                let what = format!("{family} {who} {bind:?} {protocol:?}");
                sockets.push((family, what, socket.unwrap()));
            }
        }
    }
    cage.enrol(&[]).unwrap();
    let wire = cage.wire().unwrap();
    for (family, what, socket) in sockets {
        connect_socket(&socket, cage.server(family).addr(), LONG)
            .unwrap_or_else(|e| panic!("{what}: {e}"));
        cage.talk(&socket.into(), family, &what).unwrap();
        nothing_escaped(&wire, &what).unwrap();
    }
}

/// With data in the SYN, too: fast open that asks for no cookie.
#[test]
fn a_device_from_before_enrolment_while_ztunnel_is_away() {
    for hold in ["forever", "0"] {
        let cage = Cage::open("dev-early-away").unwrap();
        let index = cage.a.ifindex("eth0").unwrap();
        cage.a.set_sysctl("net/ipv4/tcp_fastopen", "5").unwrap();
        let sockets = Family::BOTH.map(|family| {
            [false, true].map(|fast| {
                cage.a.run_as(Creds::Nobody, || {
                    let socket = tcp(family).unwrap();
                    Bind::Name.apply(&socket, "eth0", index).unwrap();
                    (family, fast, socket)
                })
            })
        });
        cage.enrol(&["--hold", hold]).unwrap();
        cage.mesh.ztunnel.kill().unwrap();
        let wire = cage.wire().unwrap();
        for (family, fast, socket) in sockets.into_iter().flatten() {
            let what = format!("{family} hold {hold} fast open {fast}");
            let to = cage.server(family).addr();
            if fast {
                socket.set_nonblocking(true).unwrap();
                let _sent = socket.send_to_with_flags(NEEDLE, &to.into(), libc::MSG_FASTOPEN);
                std::thread::sleep(MOMENT);
            } else {
                let tried = connect_socket(&socket, to, MOMENT);
                assert!(tried.is_err(), "{what}: connected without ztunnel");
            }
            assert!(socket.peer_addr().is_err(), "{what}: connected");
            nothing_escaped(&wire, &what).unwrap();
        }
    }
}

/// What leaves by an interface that came after enrolment, with and without somebody who watches for it.
fn interface_added_later(name: &str, watching: bool) -> Result<()> {
    let cage = Cage::open(name)?;
    let node = cage.mesh.lab.node();
    let mut on_node = Vec::new();
    for family in Family::BOTH {
        on_node.push(Server::echo(
            node,
            SocketAddr::new(family.unspecified(), PORT),
        )?);
    }
    // Sockets from before enrolment, bound to the number that the interface will have.
    let mut next = 0;
    for ifname in cage.a.interfaces()? {
        next = next.max(cage.a.ifindex(&ifname)? + 1);
    }
    let mut early = Vec::new();
    for family in Family::BOTH {
        for to in [node.at(family, PORT)?, cage.server(family).addr()] {
            let socket = cage.a.run_as(Creds::Nobody, || tcp(family))?;
            Bind::Index.apply(&socket, "", next)?;
            early.push((to, socket));
        }
    }
    cage.enrol(&[])?;
    let mut watcher = None;
    if watching {
        let child = cage.mesh.lab.culvert_spawn(&["netns", "watch"])?;
        child.wait_for_output("watching 2", LONG)?;
        watcher = Some(child);
    }
    let host_end = cage.mesh.lab.add_interface(&cage.a, "net1")?;
    let index = cage.a.ifindex("net1")?;
    assert_eq!(index, next);
    for (here, there) in [
        ("10.99.0.2/24", "10.99.0.1/24"),
        ("fd99::2/64", "fd99::1/64"),
    ] {
        cage.a.add_addr("net1", here.parse()?)?;
        node.add_addr(&host_end, there.parse()?)?;
    }
    // IPv6 asks for a route by that interface before it sends anything.
    let by_net1 = Route {
        dev: Some("net1".to_owned()),
        metric: Some(4000),
        ..Route::default_via("fd99::1".parse()?)
    };
    cage.a.add_route(&by_net1)?;
    if watcher.is_some() {
        for family in Family::BOTH {
            eventually("the watcher turns the new interface round", || {
                let routes = cage.a.routes(family)?;
                Ok(routes
                    .iter()
                    .any(|r| r.contains("Table(15001)") && r.contains(&format!("Oif({index})"))))
            })
            .with_context(|| format!("{:#?}", cage.a.routes(family)))?;
        }
        eventually("the watcher learns the new addresses", || {
            let shown = cage.mesh.show(&cage.a)?.to_string();
            Ok(shown.contains("10.99.0.2") && shown.contains("fd99::2"))
        })?;
    }
    let wire = Capture::start(node, &host_end)?;
    let eth0 = cage.wire()?;
    // Link-local addresses bind by themselves, as source and as destination.
    let own = SocketAddrV6::new(cage.a.link_local("net1")?, 0, 0, index);
    let peer = SocketAddrV6::new(node.link_local(&host_end)?, PORT, 0, index);
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
        nothing_escaped(&wire, &format!("{to} from {from:?}"))?;
    }
    // Bound after enrolment: taken, and nothing done.
    for family in Family::BOTH {
        for bind in Bind::BOTH {
            let stream = Connect::to(cage.server(family).addr())
                .creds(Creds::Nobody)
                .before(|socket| bind.apply(socket, "net1", index))
                .run(&cage.a)?;
            cage.talk(&stream, family, "bound after enrolment")?;
        }
    }
    for (to, socket) in early {
        let connected = connect_socket(&socket, to, if watching { LONG } else { MOMENT });
        if watching {
            // As any other: through ztunnel, which passes on in plaintext what is for the node.
            connected.with_context(|| to.to_string())?;
            assert_eq!(roundtrip(&socket.into(), b"sent late")?, b"sent late");
        } else if to.is_ipv6() {
            assert!(connected.is_err(), "{to}: connected");
        } else {
            // The one way out, known and closed by `netns watch`: IPv4 takes a failed look-up with a device for "on link",
            // and a route for a device that is not there yet cannot be made. Only the node answers for its address there.
            let neighbour = to == node.at(Family::V4, PORT)?;
            ensure!(
                wire.any(Packet::is_syn)? == neighbour,
                "{to}: {connected:?}"
            );
            wire.clear();
        }
    }
    // What ztunnel has asked of the node in the pod's name may be answered by this way.
    wire.none(|p| !p.outgoing && p.is_tcp() && p.dst.port() == PORT)?;
    assert!(!wire.contains(NEEDLE)?);
    eth0.none(|p| p.is_tcp() && p.dst == cage.server(Family::of(p.dst.ip())).addr())?;
    Ok(())
}

#[test]
fn an_interface_added_later_is_watched() {
    interface_added_later("later-watched", true).unwrap();
}

#[test]
fn an_interface_added_later_while_nothing_watches() {
    interface_added_later("later", false).unwrap();
}

/// Routes go with an interface that is set down; what watches puts them back.
#[test]
fn an_interface_set_down_and_up() {
    let cage = Cage::open("flap").unwrap();
    let index = cage.a.ifindex("eth0").unwrap();
    let early = Family::BOTH.map(|family| {
        cage.a.run_as(Creds::Nobody, || {
            let socket = tcp(family).unwrap();
            Bind::Name.apply(&socket, "eth0", index).unwrap();
            (family, socket)
        })
    });
    cage.enrol(&[]).unwrap();
    let watcher = cage.mesh.lab.culvert_spawn(&["netns", "watch"]).unwrap();
    watcher.wait_for_output("watching 2", LONG).unwrap();
    let before = Family::BOTH.map(|family| turned_round(&cage, family, index).unwrap());
    assert_eq!(before, [true, true]);
    cage.a.set_down("eth0").unwrap();
    for family in Family::BOTH {
        eventually("the kernel takes the routes away", || {
            Ok(!turned_round(&cage, family, index)?)
        })
        .unwrap();
    }
    cage.a.set_up("eth0").unwrap();
    for (family, socket) in early {
        eventually("the watcher puts them back", || {
            turned_round(&cage, family, index)
        })
        .unwrap();
        let gateway = cage.mesh.lab.node().ip(family).unwrap();
        // Both families lose their default route, IPv6 its addresses as well.
        if family == Family::V6 {
            let own = IpNet::new(cage.a.ip(family).unwrap(), 64).unwrap();
            let _kept = cage.a.add_addr("eth0", own);
            eventually("the watcher knows the address again", || {
                let shown = cage.mesh.show(&cage.a)?["addresses"].to_string();
                Ok(shown.contains(&own.addr().to_string()))
            })
            .unwrap();
        }
        let _kept = cage.a.add_route(&Route::default_via(gateway));
        let wire = cage.wire().unwrap();
        connect_socket(&socket, cage.server(family).addr(), LONG)
            .unwrap_or_else(|e| panic!("{family}: {e}"));
        cage.talk(&socket.into(), family, "set down and up")
            .unwrap();
        nothing_escaped(&wire, "set down and up").unwrap();
    }
}

/// Whether the pod has our route for what is bound to that interface.
fn turned_round(cage: &Cage, family: Family, ifindex: u32) -> Result<bool> {
    let oif = format!("Oif({ifindex})");
    let routes = cage.a.routes(family)?;
    Ok(routes
        .iter()
        .any(|r| r.contains("Table(15001)") && r.contains(&oif)))
}
