//! ztunnel gone or late: nothing leaves in plaintext, and connections wait or are refused as asked.

use std::io;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use culvert_e2e::{
    LONG, Mesh, eventually,
    traffic::{Via, servers as outside_servers, talk},
};
use culvert_lab::{
    Capture, Connect, Connecting, Family, Ns, Server, Ztunnel, ZtunnelOptions, connect, roundtrip,
};

/// A first retry of a SYN comes after one second: nothing may have happened long before, or well after.
const A_WHILE: Duration = Duration::from_millis(1500);
/// SYN retries back off, so completing may take this much longer than ztunnel itself.
const RETRIES: Duration = Duration::from_secs(30);
/// What "at once" means on a machine that does much else: before a SYN would be sent a second time.
const AT_ONCE: Duration = Duration::from_millis(900);

/// No connection to these servers began on the pod's interface, and none carried a byte. The last segments of connections
/// that a killed ztunnel had are still passing, so a segment alone says nothing.
fn nothing_left(wire: &Capture, servers: &[(Family, Server)]) -> Result<()> {
    wire.none(|p| {
        p.is_tcp()
            && (p.is_syn() || !p.payload.is_empty())
            && servers.iter().any(|(_, s)| p.has_port(s.addr().port()))
    })
}

fn fails_with(result: io::Result<std::net::TcpStream>, errno: i32) -> Result<()> {
    match result {
        Ok(stream) => anyhow::bail!("it connected: {stream:?}"),
        Err(error) => ensure!(
            error.raw_os_error() == Some(errno),
            "not error {errno}: {error}"
        ),
    }
    Ok(())
}

#[test]
fn while_ztunnel_is_away_nothing_leaves_and_a_waiting_connection_completes_when_it_is_back() {
    let mesh = Mesh::new("awayhold").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    // By mark alone: a second ztunnel is another process, and naming it is another test.
    mesh.enrol(&pod, &["--hold", "forever"]).unwrap();
    let servers = outside_servers(&outside, 8080).unwrap();
    for (_, server) in &servers {
        talk(&pod, server.addr()).unwrap();
    }
    mesh.ztunnel.kill().unwrap();
    let wire = Capture::outside(mesh.lab.node(), &pod).unwrap();
    let seen: Vec<usize> = servers.iter().map(|(_, s)| s.count()).collect();
    let waiting: Vec<Connecting> = servers
        .iter()
        .map(|(_, s)| Connect::to(s.addr()).start(&pod).unwrap())
        .collect();
    for (connecting, (family, _)) in waiting.iter().zip(&servers) {
        assert!(
            !connecting.settled(A_WHILE).unwrap(),
            "{family:?}: it does not wait"
        );
    }
    nothing_left(&wire, &servers).unwrap();
    for ((_, server), seen) in servers.iter().zip(seen) {
        assert_eq!(server.count(), seen);
    }
    assert!(mesh.counter(&pod, "no_outbound_listener").unwrap() >= 2);
    let back = again(&mesh, &pod).unwrap();
    for (connecting, (family, server)) in waiting.into_iter().zip(&servers) {
        let stream = connecting
            .wait(RETRIES)
            .with_context(|| format!("{family:?}"))
            .unwrap();
        roundtrip(&stream, b"waited").unwrap();
        assert_eq!(
            server.peers().last().unwrap().ip(),
            pod.ip(*family).unwrap()
        );
    }
    let stats = back.pod_stats(pod.name()).unwrap();
    assert_eq!(stats["outbound_accepts"], 2, "both by way of ztunnel");
}

/// Starts another ztunnel as an agent does that knows it before it listens: the pod is attached with its number, and only
/// then does it get its pods.
fn again(mesh: &Mesh, pod: &Ns) -> Result<Ztunnel> {
    let ztunnel = Ztunnel::start(&mesh.lab, &mesh.zds, &ZtunnelOptions::new())?;
    let pid = ztunnel.pid().to_string();
    // Its listeners are there from the snapshot on; attaching fetches what the kernel side did not take for ztunnel's.
    mesh.lab
        .attach(pod, &["--hold", "forever", "--ztunnel", &pid])?;
    Ok(ztunnel)
}

#[test]
fn after_the_grace_new_connections_are_refused_at_once_and_again_served_when_it_is_back() {
    let mesh = Mesh::new("awayrefuse").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    let hold = Duration::from_secs(4);
    mesh.lab.attach(&pod, &["--hold", "4"]).unwrap();
    mesh.zds.add_pod(&pod).unwrap();
    mesh.expect_listeners(&pod, 3).unwrap();
    let servers = outside_servers(&outside, 8080).unwrap();
    let wire = Capture::outside(mesh.lab.node(), &pod).unwrap();
    mesh.ztunnel.kill().unwrap();
    let gone = Instant::now();
    let waiting: Vec<Connecting> = servers
        .iter()
        .map(|(_, s)| Connect::to(s.addr()).start(&pod).unwrap())
        .collect();
    for connecting in &waiting {
        assert!(!connecting.settled(Duration::from_millis(300)).unwrap());
    }
    std::thread::sleep(hold.saturating_sub(gone.elapsed()) + Duration::from_millis(100));
    for (family, server) in &servers {
        let asked = Instant::now();
        let result = connect(&pod, server.addr(), LONG);
        let took = asked.elapsed();
        fails_with(result, libc::EHOSTUNREACH)
            .with_context(|| format!("{family:?}"))
            .unwrap();
        assert!(took < AT_ONCE, "{family:?}: refused after {took:?}");
    }
    // Bound to a device it cannot be refused that way, but must not get out either.
    for (family, server) in &servers {
        let ifname = pod.ifname().to_owned();
        let bound = Connect::to(server.addr())
            .device(&ifname)
            .timeout(A_WHILE)
            .run(&pod);
        assert!(bound.is_err(), "{family:?}: it connected without ztunnel");
    }
    assert!(mesh.counter(&pod, "refused").unwrap() >= 2);
    nothing_left(&wire, &servers).unwrap();
    for (_, server) in &servers {
        assert_eq!(server.count(), 0);
    }
    // The pod still reaches itself.
    culvert_e2e::traffic::local_delivery_works(&pod).unwrap();
    // Back: refused no longer, and those from before the end of the grace may still complete.
    let _back = Ztunnel::start(&mesh.lab, &mesh.zds, &ZtunnelOptions::new()).unwrap();
    for (family, server) in &servers {
        eventually("connections are served again", || {
            Ok(talk(&pod, server.addr()).is_ok())
        })
        .with_context(|| format!("{family:?}"))
        .unwrap();
    }
    for connecting in waiting {
        roundtrip(&connecting.wait(RETRIES).unwrap(), b"from before").unwrap();
    }
}

#[test]
fn with_hold_0_connections_are_refused_from_the_first_moment() {
    let mesh = Mesh::new("hold0").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    let servers = outside_servers(&outside, 8080).unwrap();
    let wire = Capture::outside(mesh.lab.node(), &pod).unwrap();
    // Before any ztunnel was there, and after it has gone.
    mesh.lab.attach(&pod, &["--hold", "0"]).unwrap();
    for round in ["not there yet", "gone"] {
        for (family, server) in &servers {
            let asked = Instant::now();
            let result = connect(&pod, server.addr(), LONG);
            fails_with(result, libc::EHOSTUNREACH)
                .with_context(|| format!("{round}, {family:?}"))
                .unwrap();
            assert!(asked.elapsed() < AT_ONCE, "{round}, {family:?}");
        }
        nothing_left(&wire, &servers).unwrap();
        if round == "not there yet" {
            mesh.zds.add_pod(&pod).unwrap();
            mesh.expect_listeners(&pod, 3).unwrap();
            for (_, server) in &servers {
                assert_eq!(mesh.via(&pod, &pod, server).unwrap().0, Via::Outbound);
            }
            mesh.ztunnel.kill().unwrap();
            // What ztunnel itself had sent out is not the pod's.
            wire.clear();
        }
    }
}

#[test]
fn with_hold_forever_connections_wait_however_long_it_was_away() {
    let mesh = Mesh::new("holdforever").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    let servers = outside_servers(&outside, 8080).unwrap();
    mesh.lab.attach(&pod, &["--hold", "1"]).unwrap();
    // The grace of one second is over ...
    for (family, server) in &servers {
        eventually("connections are refused", || {
            Ok(connect(&pod, server.addr(), Duration::from_millis(100))
                .is_err_and(|e| e.raw_os_error() == Some(libc::EHOSTUNREACH)))
        })
        .with_context(|| format!("{family:?}"))
        .unwrap();
    }
    // ... and for ever is longer.
    mesh.lab.attach(&pod, &["--hold", "forever"]).unwrap();
    let waiting: Vec<Connecting> = servers
        .iter()
        .map(|(_, s)| Connect::to(s.addr()).start(&pod).unwrap())
        .collect();
    for connecting in &waiting {
        assert!(!connecting.settled(A_WHILE).unwrap());
    }
    mesh.zds.add_pod(&pod).unwrap();
    for connecting in waiting {
        roundtrip(&connecting.wait(RETRIES).unwrap(), b"at last").unwrap();
    }
}

#[test]
fn inbound_is_refused_at_once_while_ztunnel_is_away() {
    let mesh = Mesh::new("awayinbound").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    mesh.enrol(&pod, &["--hold", "forever", "--probe-source", "none"])
        .unwrap();
    let servers: Vec<(Family, Server)> = Family::BOTH
        .into_iter()
        .map(|family| {
            let server = Server::echo(&pod, pod.at(family, 8080).unwrap()).unwrap();
            assert_eq!(mesh.via(&pod, &outside, &server).unwrap().0, Via::Inbound);
            (family, server)
        })
        .collect();
    mesh.ztunnel.kill().unwrap();
    for (family, server) in &servers {
        let seen = server.count();
        let asked = Instant::now();
        let result = connect(&outside, server.addr(), LONG);
        let took = asked.elapsed();
        fails_with(result, libc::ECONNREFUSED)
            .with_context(|| format!("{family:?}"))
            .unwrap();
        assert!(took < AT_ONCE, "{family:?}: refused after {took:?}");
        assert_eq!(server.count(), seen, "{family:?}: it arrived all the same");
    }
    assert!(mesh.counter(&pod, "no_inbound_listener").unwrap() >= 2);
}
