//! Packets with a destination of their own: IPv6 routing headers, which any process may set on its sockets, and IPv4 source
//! routes, which take CAP_NET_RAW, send them somewhere else than `connect()` was told.

use std::io::{self, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;

use culvert_e2e::cage::{Cage, MOMENT, NEEDLE, PORT, nothing_escaped, tcp};
use culvert_lab::{Creds, Family, sockopt};

/// A socket option: level, name, value.
type Detour = (i32, i32, Vec<u8>);

/// Mobile IPv6's header (type 2) and segment routing's (type 4), with one segment and with two.
fn routing_headers(via: Ipv6Addr, end: Ipv6Addr) -> Vec<Detour> {
    let type2 = [vec![0, 2, 2, 1, 0, 0, 0, 0], via.octets().to_vec()].concat();
    let one = [vec![0, 2, 4, 0, 0, 0, 0, 0], via.octets().to_vec()].concat();
    let segments = [end.octets(), via.octets()].concat();
    let two = [vec![0, 4, 4, 1, 1, 0, 0, 0], segments].concat();
    [type2, one, two]
        .map(|value| (libc::IPPROTO_IPV6, libc::IPV6_RTHDR, value))
        .into()
}

/// Loose and strict source routes by one hop, filled up to four bytes with "no operation".
fn source_routes(via: Ipv4Addr) -> Vec<Detour> {
    [131, 137]
        .map(|option| {
            let value = [vec![1, option, 7, 4], via.octets().to_vec()].concat();
            (libc::IPPROTO_IP, libc::IP_OPTIONS, value)
        })
        .into()
}

/// Connects with each detour the kernel accepts and sends what can be sent; how many it accepted.
fn send_all(cage: &Cage, who: Creds, attempts: &[(IpAddr, Detour)]) -> io::Result<usize> {
    let mut sockets = Vec::new();
    for (to, (level, option, value)) in attempts {
        let socket = cage.a.run_as(who, || tcp(Family::of(*to)))?;
        let set = cage.a.run_as(who, || {
            sockopt::set_bytes(socket.as_fd(), *level, *option, value)
        });
        if set.is_ok() {
            socket.set_nonblocking(true)?;
            // Under way, or refused at once.
            let _either = socket.connect(&SocketAddr::new(*to, PORT).into());
            sockets.push(socket);
        }
    }
    std::thread::sleep(MOMENT);
    for mut socket in &sockets {
        let _either = socket.write_all(NEEDLE);
    }
    std::thread::sleep(MOMENT);
    Ok(sockets.len())
}

#[test]
fn an_ipv6_routing_header() {
    let cage = Cage::open("rthdr").unwrap();
    let (own, via) = (cage.a.v6().unwrap(), cage.b.v6().unwrap());
    let outside = cage.mesh.lab.outside().unwrap().v6().unwrap();
    let attempts: Vec<_> = [Ipv6Addr::LOCALHOST, own, via, outside]
        .into_iter()
        .flat_map(|to| {
            routing_headers(via, to)
                .into_iter()
                .map(move |d| (to.into(), d))
        })
        .collect();
    let open = cage.wire().unwrap();
    let accepted = send_all(&cage, Creds::Nobody, &attempts).unwrap();
    assert!(accepted > 0, "this kernel accepts no routing header");
    assert!(
        open.any(|p| p.routing_header && !p.outgoing).unwrap(),
        "without us a routing header leads out of the pod:\n{}",
        open.describe()
    );
    cage.enrol(&[]).unwrap();
    for who in [Creds::Nobody, Creds::Root] {
        let wire = cage.wire().unwrap();
        assert!(send_all(&cage, who, &attempts).unwrap() >= accepted);
        nothing_escaped(&wire, &format!("{who}")).unwrap();
    }
}

#[test]
fn an_ipv4_source_route() {
    let cage = Cage::open("source-route").unwrap();
    let (own, via) = (cage.a.v4().unwrap(), cage.b.v4().unwrap());
    let outside = cage.mesh.lab.outside().unwrap().v4().unwrap();
    let detours = [source_routes(via), source_routes(outside)].concat();
    let attempts: Vec<_> = [Ipv4Addr::LOCALHOST, own, via, outside]
        .into_iter()
        .flat_map(|to| detours.iter().map(move |d| (to.into(), d.clone())))
        .collect();
    let open = cage.wire().unwrap();
    let accepted = send_all(&cage, Creds::NetRawOnly, &attempts).unwrap();
    assert_eq!(accepted, attempts.len());
    assert!(
        open.any(|p| p.is_syn() && p.dst.ip() == via && !p.outgoing)
            .unwrap(),
        "without us a source route leads out of the pod:\n{}",
        open.describe()
    );
    cage.enrol(&[]).unwrap();
    // Hosts that accept source routes send what arrives on `lo` on its way.
    for accepts in ["0", "1"] {
        for scope in ["all", "lo", "eth0"] {
            let key = format!("net/ipv4/conf/{scope}/accept_source_route");
            cage.a.set_sysctl(&key, accepts).unwrap();
        }
        for who in [Creds::NetRawOnly, Creds::Root] {
            let wire = cage.wire().unwrap();
            assert_eq!(send_all(&cage, who, &attempts).unwrap(), accepted);
            nothing_escaped(&wire, &format!("{who}, accepting {accepts}")).unwrap();
        }
    }
}
