//! Attempts to pass for ztunnel with CAP_NET_RAW alone, which containers have by default: marks on sockets, and listeners
//! beside ztunnel's. What needs no capability is in `escape`.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use culvert_e2e::cage::{Cage, MOMENT, NEEDLE, PORT, connect_socket, nothing_escaped, tcp};
use culvert_e2e::{LONG, Mesh, eventually};
use culvert_lab::{Capture, Connect, Creds, Family, Ns, Server, connect, roundtrip, sockopt};
use socket2::{SockRef, Socket};

/// ztunnel's, all of ours, none, somebody else's, and ztunnel's with bits above those that are compared.
const MARKS: [u32; 7] = [0x539, 0x111, 0x112, 0x113, 0, 0x42, 0x1_0539];
/// A SYN that waits is sent again after 1, 3 and 7 seconds; a new ztunnel must be found by then.
const RETRIES: Duration = Duration::from_secs(20);
const ZTUNNELS_PORTS: [u16; 3] = [15001, 15006, 15008];

/// Whether a mark is one that nobody but ztunnel and the kernel side may set.
fn is_taken(mark: u32) -> bool {
    [0x539, 0x111, 0x112, 0x113].contains(&(mark & 0xfff))
}

#[test]
fn a_mark_before_connect() {
    let cage = Cage::shut("mark-before", &[]).unwrap();
    let wire = cage.wire().unwrap();
    for family in Family::BOTH {
        for mptcp in [false, true] {
            for mark in MARKS {
                let what = format!("{family} mark {mark:#x} mptcp {mptcp}");
                let mut attempt = Connect::to(cage.server(family).addr()).creds(Creds::NetRawOnly);
                if mptcp {
                    attempt = attempt.mptcp();
                }
                let attempt = attempt.before(|socket| {
                    let set = socket.set_mark(mark);
                    assert_eq!(set.is_err(), is_taken(mark), "{what}: {set:?}");
                    Ok(())
                });
                let stream = attempt
                    .run(&cage.a)
                    .unwrap_or_else(|e| panic!("{what}: {e}"));
                cage.talk(&stream, family, &what).unwrap();
                nothing_escaped(&wire, &what).unwrap();
            }
        }
    }
    assert!(cage.mesh.counter(&cage.a, "impostor").unwrap() > 0);
}

#[test]
fn a_mark_after_connect() {
    let cage = Cage::shut("mark-after", &[]).unwrap();
    let wire = cage.wire().unwrap();
    for family in Family::BOTH {
        for mptcp in [false, true] {
            let mut attempt = Connect::to(cage.server(family).addr()).creds(Creds::NetRawOnly);
            if mptcp {
                attempt = attempt.mptcp();
            }
            let stream = attempt.run(&cage.a).unwrap();
            for mark in MARKS {
                let what = format!("{family} mark {mark:#x} mptcp {mptcp}");
                let set = cage
                    .a
                    .run_as(Creds::NetRawOnly, || SockRef::from(&stream).set_mark(mark));
                assert_eq!(set.is_err(), is_taken(mark), "{what}: {set:?}");
                cage.talk(&stream, family, &what).unwrap();
                nothing_escaped(&wire, &what).unwrap();
            }
        }
    }
}

#[test]
fn a_mark_while_the_syn_waits() {
    let hold = ["--hold", "forever"];
    let mut cage = Cage::shut("mark-syn", &hold).unwrap();
    cage.mesh.ztunnel.kill().unwrap();
    let wire = cage.wire().unwrap();
    let mut waiting = Vec::new();
    for family in Family::BOTH {
        for mark in MARKS {
            let connecting = Connect::to(cage.server(family).addr())
                .creds(Creds::NetRawOnly)
                .start(&cage.a)
                .unwrap();
            let set = cage
                .a
                .run_as(Creds::NetRawOnly, || connecting.socket().set_mark(mark));
            assert_eq!(set.is_err(), is_taken(mark), "{mark:#x}: {set:?}");
            waiting.push((family, mark, connecting));
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
    for (family, mark, connecting) in waiting {
        let what = format!("{family} mark {mark:#x}");
        let stream = connecting
            .wait(RETRIES)
            .unwrap_or_else(|e| panic!("{what}: {e}"));
        cage.talk(&stream, family, &what).unwrap();
        nothing_escaped(&wire, &what).unwrap();
    }
}

#[test]
fn a_mark_from_before_enrolment() {
    let cage = Cage::open("mark-early").unwrap();
    let mut early = Vec::new();
    for family in Family::BOTH {
        for mark in MARKS {
            let socket = cage.a.run_as(Creds::NetRawOnly, || {
                let socket = tcp(family)?;
                socket.set_mark(mark)?;
                io::Result::Ok(socket)
            });
            early.push((family, mark, socket.unwrap()));
        }
    }
    cage.enrol(&[]).unwrap();
    let wire = cage.wire().unwrap();
    for (family, mark, socket) in early {
        let what = format!("{family} mark {mark:#x}");
        // `connect()` looks up its route before anybody can change the mark: ours may end it there.
        match connect_socket(&socket, cage.server(family).addr(), LONG) {
            Ok(()) => cage.talk(&socket.into(), family, &what).unwrap(),
            Err(error) => assert!([0x111, 0x112, 0x113].contains(&mark), "{what}: {error}"),
        }
        nothing_escaped(&wire, &what).unwrap();
    }
    assert!(
        cage.mesh.counter(&cage.a, "impostor").unwrap() >= 4,
        "two marks, two families"
    );
}

/// What the application answers is as secret as what it says, and its accepted socket is as well its own.
#[test]
fn a_mark_on_an_accepted_socket() {
    let cage = Cage::shut("mark-accepted", &[]).unwrap();
    let wire = cage.wire().unwrap();
    for family in Family::BOTH {
        let at = cage.a.at(family, PORT + 1).unwrap();
        let listener = cage
            .a
            .run_as(Creds::NetRawOnly, || std::net::TcpListener::bind(at))
            .unwrap();
        for mark in MARKS {
            let what = format!("{family} mark {mark:#x}");
            let mut client = connect(&cage.b, at, LONG).unwrap();
            let (mut app, _) = listener.accept().unwrap();
            let set = cage
                .a
                .run_as(Creds::NetRawOnly, || SockRef::from(&app).set_mark(mark));
            assert_eq!(set.is_err(), is_taken(mark), "{what}: {set:?}");
            app.write_all(NEEDLE).unwrap();
            let mut heard = vec![0; NEEDLE.len()];
            client
                .read_exact(&mut heard)
                .unwrap_or_else(|e| panic!("{what}: {e}"));
            assert_eq!(heard, NEEDLE);
            drop(app);
            wire.none(|p| p.src == at && (p.flags.syn() || !p.payload.is_empty()))
                .unwrap_or_else(|e| panic!("{what}: {e}"));
        }
    }
    assert!(!wire.contains(NEEDLE).unwrap());
}

/// A listener on a port of ztunnel's, sharing it.
fn beside(pod: &Ns, port: u16, mark: Option<u32>) -> Result<Server> {
    let mut server = Server::builder(pod, SocketAddr::new(Family::V6.unspecified(), port))
        .creds(Creds::RootNoCaps)
        .v6only(false)
        .reuse_port();
    if let Some(mark) = mark {
        server = server.creds(Creds::Root).before_bind(move |socket| {
            // Refused in an enrolled pod; it listens all the same.
            let _refused = socket.set_mark(mark);
            Ok(())
        });
    }
    server.start()
}

/// Connections of every kind that ztunnel's listeners are there for.
fn use_every_listener(cage: &Cage) -> Result<()> {
    let outside = cage.mesh.lab.outside()?;
    for family in Family::BOTH {
        let app = Server::echo(&cage.a, cage.a.at(family, PORT + 1)?)?;
        for _ in 0..20 {
            let stream = connect(&cage.a, cage.server(family).addr(), LONG)?;
            cage.talk(&stream, family, "outbound")?;
            for client in [&outside, &cage.b] {
                let stream = connect(client, app.addr(), LONG)?;
                let answer = roundtrip(&stream, NEEDLE).context("inbound")?;
                ensure!(answer == NEEDLE);
            }
        }
        ensure!(app.count() == 40);
    }
    Ok(())
}

#[test]
fn a_listener_joined_before_ztunnels() {
    let cage = Cage::open("join-before").unwrap();
    let strangers: Vec<_> = ZTUNNELS_PORTS
        .iter()
        .flat_map(|port| [None, Some(0x539)].map(|mark| beside(&cage.a, *port, mark).unwrap()))
        .collect();
    cage.enrol(&["--probe-source", "none"]).unwrap();
    use_every_listener(&cage).unwrap();
    for stranger in strangers {
        assert_eq!(stranger.count(), 0, "{}", stranger.addr());
    }
}

#[test]
fn a_listener_joined_after_ztunnels() {
    let cage = Cage::shut("join-after", &["--probe-source", "none"]).unwrap();
    let registered = cage.mesh.show(&cage.a).unwrap()["listeners"].clone();
    let strangers: Vec<_> = ZTUNNELS_PORTS
        .iter()
        .flat_map(|port| [None, Some(0x539)].map(|mark| beside(&cage.a, *port, mark).unwrap()))
        .collect();
    assert_eq!(cage.mesh.show(&cage.a).unwrap()["listeners"], registered);
    use_every_listener(&cage).unwrap();
    for stranger in strangers {
        assert_eq!(stranger.count(), 0, "{}", stranger.addr());
    }
}

/// Marked and bound while that was nobody's business; listening when it is.
#[test]
fn a_listener_marked_before_enrolment() {
    let cage = Cage::open("join-marked").unwrap();
    let early: Vec<Socket> = ZTUNNELS_PORTS
        .iter()
        .map(|port| {
            cage.a.run(|| {
                let socket = tcp(Family::V6).unwrap();
                socket.set_mark(0x539).unwrap();
                socket.set_only_v6(false).unwrap();
                socket.set_reuse_address(true).unwrap();
                socket.set_reuse_port(true).unwrap();
                let at = SocketAddr::new(Family::V6.unspecified(), *port);
                socket.bind(&at.into()).unwrap();
                socket
            })
        })
        .collect();
    cage.enrol(&["--probe-source", "none"]).unwrap();
    let registered = cage.mesh.show(&cage.a).unwrap()["listeners"].clone();
    for socket in &early {
        cage.a.run(|| socket.listen(16)).unwrap();
        socket.set_nonblocking(true).unwrap();
    }
    assert_eq!(cage.mesh.show(&cage.a).unwrap()["listeners"], registered);
    use_every_listener(&cage).unwrap();
    for socket in &early {
        let nobody = socket.accept().map(|(_, peer)| peer);
        assert_eq!(
            nobody.map_err(|e| e.kind()).unwrap_err(),
            io::ErrorKind::WouldBlock
        );
    }
}

/// While ztunnel is away its place is not taken by who listens there.
#[test]
fn a_listener_in_ztunnels_place() {
    let cage = Cage::shut("in-place", &["--hold", "forever"]).unwrap();
    cage.mesh.ztunnel.kill().unwrap();
    let strangers: Vec<_> = ZTUNNELS_PORTS
        .iter()
        .flat_map(|port| [None, Some(0x539)].map(|mark| beside(&cage.a, *port, mark).unwrap()))
        .collect();
    let outside = cage.mesh.lab.outside().unwrap();
    let wire = cage.wire().unwrap();
    for family in Family::BOTH {
        let tried = Connect::to(cage.server(family).addr())
            .timeout(MOMENT)
            .run(&cage.a);
        assert!(tried.is_err(), "{family}: connected to a stranger");
        nothing_escaped(&wire, "away").unwrap();
        let app = Server::echo(&cage.a, cage.a.at(family, PORT + 1).unwrap()).unwrap();
        for port in [app.addr().port(), 15008] {
            let tried = Connect::to(cage.a.at(family, port).unwrap())
                .timeout(MOMENT)
                .run(&outside);
            assert!(tried.is_err(), "{family} port {port}: connected");
        }
        assert_eq!(app.count(), 0);
    }
    for stranger in strangers {
        assert_eq!(stranger.count(), 0, "{}", stranger.addr());
    }
}

#[test]
fn without_a_named_ztunnel_the_mark_alone_decides_and_it_is_said() {
    let mesh = Mesh::new("unnamed").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    mesh.lab.attach(&pod, &[]).unwrap();
    mesh.zds.add_pod(&pod).unwrap();
    mesh.expect_listeners(&pod, 3).unwrap();
    let notes = mesh.show(&pod).unwrap()["notes"].to_string();
    assert!(
        notes.contains("mark alone") && notes.contains("--ztunnel"),
        "{notes}"
    );
    for family in Family::BOTH {
        let server = Server::echo(&outside, outside.at(family, PORT).unwrap()).unwrap();
        let wire = Capture::outside(mesh.lab.node(), &pod).unwrap();
        let accepted = || mesh.stat(&pod, "outbound_accepts");
        let before = accepted().unwrap();
        let talk = |mark: u32| {
            let stream = Connect::to(server.addr())
                .creds(Creds::NetRawOnly)
                .mark(mark)
                .run(&pod)?;
            roundtrip(&stream, NEEDLE)
        };
        // Our own marks are nobody's in either case.
        for mark in [0x111, 0x112, 0x113] {
            assert!(talk(mark).is_err(), "{mark:#x}");
        }
        talk(0x42).unwrap();
        assert_eq!(accepted().unwrap(), before + 1);
        // This is what the note warns of.
        talk(0x539).unwrap();
        assert_eq!(accepted().unwrap(), before + 1);
        assert!(wire.contains(NEEDLE).unwrap());
    }
    // Named, it says so no more.
    let pid = mesh.ztunnel.pid().to_string();
    mesh.lab.attach(&pod, &["--ztunnel", &pid]).unwrap();
    let notes = mesh.show(&pod).unwrap()["notes"].to_string();
    assert!(!notes.contains("mark alone"), "{notes}");
}

/// A connection that the impostor has from before enrolment is not ours to cut, a new one on the same socket is.
#[test]
fn a_marked_socket_that_connects_again() {
    let cage = Cage::open("mark-again").unwrap();
    let mut early = Vec::new();
    for family in Family::BOTH {
        let stream: TcpStream = Connect::to(cage.server(family).addr())
            .creds(Creds::NetRawOnly)
            .mark(0x539)
            .run(&cage.a)
            .unwrap();
        cage.talk(&stream, family, "before enrolment").unwrap();
        early.push((family, stream));
    }
    cage.enrol(&[]).unwrap();
    for (family, stream) in early {
        cage.talk(&stream, family, "from before enrolment").unwrap();
        let socket = Socket::from(stream);
        socket.shutdown(std::net::Shutdown::Both).unwrap();
        sockopt::set_int(socket.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR, 1).unwrap();
        let wire = cage.wire().unwrap();
        // Whether a socket that was shut down connects again is the kernel's business; where to is ours.
        if connect_socket(&socket, cage.server(family).addr(), MOMENT).is_ok() {
            let _either = roundtrip(&socket.into(), NEEDLE);
            assert!(!wire.contains(NEEDLE).unwrap(), "{family}");
        }
        wire.none(|p| p.is_syn() && p.dst.port() == PORT).unwrap();
    }
}
