//! Sockets that connect more than once: what the first connection left on them, marks and addresses and devices, must not
//! let the second one out.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;

use culvert_e2e::LONG;
use culvert_e2e::cage::{Cage, MOMENT, NEEDLE, PORT, connect_socket, nothing_escaped, tcp};
use culvert_lab::{Creds, Family, Server, connect, roundtrip};
use socket2::Socket;

#[test]
fn after_a_refusal_and_after_a_connection() {
    let cage = Cage::shut("again", &[]).unwrap();
    let wire = cage.wire().unwrap();
    for family in Family::BOTH {
        // After a refusal.
        for ip in [family.loopback(), cage.a.ip(family).unwrap()] {
            let what = format!("{family}, refused by {ip} before");
            let socket = cage.a.run_as(Creds::Nobody, || tcp(family).unwrap());
            let refused = connect_socket(&socket, SocketAddr::new(ip, 9), LONG);
            assert_eq!(
                refused.unwrap_err().kind(),
                io::ErrorKind::ConnectionRefused,
                "{what}"
            );
            connect_socket(&socket, cage.server(family).addr(), LONG)
                .unwrap_or_else(|e| panic!("{what}: {e}"));
            cage.talk(&socket.into(), family, &what).unwrap();
            nothing_escaped(&wire, &what).unwrap();
        }
        // After being taken apart, whatever it was connected to.
        let home = Server::echo(&cage.a, SocketAddr::new(family.loopback(), PORT)).unwrap();
        for first in [home.addr(), cage.server(family).addr()] {
            let what = format!("{family}, connected to {first} before");
            let socket = cage.a.run_as(Creds::Nobody, || tcp(family).unwrap());
            connect_socket(&socket, first, LONG).unwrap();
            disconnect(&socket).unwrap();
            connect_socket(&socket, cage.server(family).addr(), LONG)
                .unwrap_or_else(|e| panic!("{what}: {e}"));
            cage.talk(&socket.into(), family, &what).unwrap();
            nothing_escaped(&wire, &what).unwrap();
        }
    }
}

/// `connect()` to AF_UNSPEC: the socket is as new, but for its options.
#[expect(unsafe_code, reason = "no safe wrapper makes an address of no family")]
fn disconnect(socket: &Socket) -> io::Result<()> {
    let nowhere = [0u8; 16];
    // SAFETY: the address is as long as said; the kernel reads its family, AF_UNSPEC, and no more.
    let code = unsafe { libc::connect(socket.as_raw_fd(), nowhere.as_ptr().cast(), 16) };
    if code == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The application's accepted socket is bound to `lo` and has a mark of ours.
#[test]
fn after_being_accepted() {
    let cage = Cage::shut("again-accepted", &["--probe-source", "none"]).unwrap();
    let outside = cage.mesh.lab.outside().unwrap();
    let wire = cage.wire().unwrap();
    for family in Family::BOTH {
        let at = cage.a.at(family, 80).unwrap();
        let listener = cage
            .a
            .run_as(Creds::Nobody, || {
                tcp(family).and_then(|s| {
                    s.bind(&SocketAddr::new(at.ip(), 0).into())?;
                    s.listen(16)?;
                    Ok(s)
                })
            })
            .unwrap();
        let at = listener.local_addr().unwrap().as_socket().unwrap();
        for client in [&outside, &cage.a] {
            let what = format!("{family}, accepted from {}", client.name());
            let first = connect(client, at, LONG).unwrap();
            let (socket, _) = listener.accept().unwrap();
            disconnect(&socket).unwrap();
            drop(first);
            // Whether it can be connected again while bound to `lo` is not promised.
            if connect_socket(&socket, cage.server(family).addr(), MOMENT).is_ok() {
                let _either = roundtrip(&socket.into(), NEEDLE);
            }
            // The kernel's refusal of ztunnel's answer may be seen, which has gone to `eth0` and found nobody.
            wire.none(|p| p.dst.port() == PORT && (p.flags.syn() || !p.payload.is_empty()))
                .unwrap_or_else(|e| panic!("{what}: {e}"));
            assert!(!wire.contains(NEEDLE).unwrap(), "{what}");
        }
    }
}

/// A socket that ended up at an excluded destination first, and the other way round.
#[test]
fn after_an_excluded_destination() {
    let cage = Cage::open("again-excluded").unwrap();
    cage.enrol(&["--exclude-outbound-port", "8082"]).unwrap();
    for family in Family::BOTH {
        let direct = Server::echo(&cage.b, cage.b.at(family, 8082).unwrap()).unwrap();
        for order in [[PORT, 8082, PORT], [8082, PORT, 8082]] {
            let socket = cage.a.run_as(Creds::Nobody, || tcp(family)).unwrap();
            for port in order {
                let what = format!("{family}, port {port} of {order:?}");
                let wire = cage.wire().unwrap();
                let to = cage.b.at(family, port).unwrap();
                connect_socket(&socket, to, LONG).unwrap_or_else(|e| panic!("{what}: {e}"));
                let stream = socket.try_clone().unwrap().into();
                if port == PORT {
                    cage.talk(&stream, family, &what).unwrap();
                    nothing_escaped(&wire, &what).unwrap();
                } else {
                    roundtrip(&stream, b"plain").unwrap();
                    assert!(wire.ports().unwrap().contains(&port), "{what}");
                    assert!(!direct.peers().is_empty());
                }
                disconnect(&socket).unwrap();
            }
        }
    }
}
