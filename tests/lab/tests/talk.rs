//! The servers and clients that tests talk with.

use std::io::{ErrorKind, Read};
use std::net::{Ipv6Addr, SocketAddr};
use std::time::Duration;

use culvert_lab::{Capture, Connect, Creds, Family, Lab, Server, connect, roundtrip};

const LONG: Duration = Duration::from_secs(5);

#[test]
fn servers_remember_who_came_and_what_they_said() {
    let lab = Lab::new("servers").unwrap();
    let (a, b) = (lab.pod("a").unwrap(), lab.pod("b").unwrap());
    for family in Family::BOTH {
        let server = Server::echo(&a, a.at(family, 7000).unwrap()).unwrap();
        let from = b.at(family, 4321).unwrap();
        let stream = Connect::to(server.addr())
            .from(from)
            .creds(Creds::Nobody)
            .run(&b)
            .unwrap();
        let long: Vec<u8> = (0..300_000u32).map(|n| n.to_le_bytes()[0]).collect();
        assert_eq!(roundtrip(&stream, &long).unwrap(), long);
        drop(stream);
        let seen = server
            .wait(|all| all.first().is_some_and(|c| c.closed), LONG)
            .unwrap();
        assert_eq!(
            (seen[0].peer, seen[0].local, seen[0].bytes),
            (from, server.addr(), 300_000)
        );
        assert_eq!(seen[0].received, long[..65536]);
        assert_eq!((server.count(), server.peers()), (1, vec![from]));
        assert!(
            server
                .wait(|all| all.len() > 1, Duration::from_millis(20))
                .is_err()
        );
        let addr = server.addr();
        drop(server);
        assert_eq!(
            connect(&b, addr, LONG).unwrap_err().kind(),
            ErrorKind::ConnectionRefused
        );
    }
}

#[test]
fn the_kinds_of_servers() {
    let lab = Lab::new("kinds").unwrap();
    let (a, b) = (lab.pod("a").unwrap(), lab.pod("b").unwrap());
    let any = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 0);
    let greeter = Server::builder(&a, any)
        .v6only(false)
        .mark(7)
        .greet(b"hello")
        .start()
        .unwrap();
    assert_eq!(greeter.socket().mark().unwrap(), 7);
    for family in Family::BOTH {
        let mut stream = connect(&b, a.at(family, greeter.addr().port()).unwrap(), LONG).unwrap();
        stream.read_exact(&mut [0; 5]).unwrap();
    }
    let sink = Server::builder(&a, a.at(Family::V4, 7001).unwrap())
        .sink()
        .start()
        .unwrap();
    let stream = connect(&b, sink.addr(), LONG).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_millis(50)))
        .unwrap();
    assert_eq!(
        roundtrip(&stream, b"x").unwrap_err().kind(),
        ErrorKind::WouldBlock
    );
    assert_eq!(sink.wait_first(LONG).unwrap().received, b"x");

    let deaf = Server::builder(&a, a.at(Family::V4, 7002).unwrap())
        .deaf()
        .backlog(0)
        .start()
        .unwrap();
    let _first = connect(&b, deaf.addr(), LONG).unwrap();
    let waiting = Connect::to(deaf.addr()).start(&b).unwrap();
    assert!(!waiting.settled(Duration::from_millis(100)).unwrap());
    assert_eq!(
        waiting.wait(Duration::ZERO).unwrap_err().kind(),
        ErrorKind::TimedOut
    );

    let shared = a.at(Family::V4, 7003).unwrap();
    let _one = Server::builder(&a, shared).reuse_port().start().unwrap();
    let _two = Server::builder(&a, shared).reuse_port().start().unwrap();
    assert!(Server::echo(&a, shared).is_err());

    let bound = Server::builder(&a, a.at(Family::V4, 7004).unwrap())
        .device("eth0")
        .start()
        .unwrap();
    roundtrip(&connect(&b, bound.addr(), LONG).unwrap(), b"x").unwrap();
    let bound = Server::builder(&a, a.at(Family::V4, 7005).unwrap())
        .device("lo")
        .start()
        .unwrap();
    assert_eq!(
        connect(&b, bound.addr(), LONG).unwrap_err().kind(),
        ErrorKind::ConnectionRefused,
        "what comes by eth0 is not for it"
    );
}

#[test]
fn fast_open_carries_data_in_the_second_syn() {
    let lab = Lab::new("tfo").unwrap();
    let (a, b) = (lab.pod("a").unwrap(), lab.pod("b").unwrap());
    for pod in [&a, &b] {
        pod.set_sysctl("net/ipv4/tcp_fastopen", "3").unwrap();
    }
    for family in Family::BOTH {
        let capture = Capture::outside(lab.node(), &b).unwrap();
        let server = Server::builder(&a, a.at(family, 7000).unwrap())
            .fast_open()
            .start()
            .unwrap();
        for _ in 0..2 {
            let mut stream = Connect::to(server.addr()).fast_open(&b, b"early").unwrap();
            let mut answer = [0; 5];
            stream.read_exact(&mut answer).unwrap();
            assert_eq!(&answer, b"early");
        }
        assert_eq!(capture.count(|p| p.is_syn()).unwrap(), 2);
        assert_eq!(
            capture
                .count(|p| p.is_syn() && p.payload == b"early")
                .unwrap(),
            1
        );
    }
}

#[test]
fn mptcp_is_spoken_when_asked_for() {
    let lab = Lab::new("mptcp").unwrap();
    let (a, b) = (lab.pod("a").unwrap(), lab.pod("b").unwrap());
    for pod in [&a, &b] {
        pod.set_sysctl("net/mptcp/enabled", "1").unwrap();
    }
    for family in Family::BOTH {
        let server = Server::builder(&a, a.at(family, 7000).unwrap())
            .mptcp()
            .start()
            .unwrap();
        let stream = Connect::to(server.addr()).mptcp().run(&b).unwrap();
        assert_eq!(roundtrip(&stream, b"many paths").unwrap(), b"many paths");
        assert_eq!(server.wait_first(LONG).unwrap().received, b"many paths");
    }
}
