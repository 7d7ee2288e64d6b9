//! A ztunnel that is away: connections wait, then are refused, and nothing leaves meanwhile.

use std::time::{Duration, Instant};

use culvert_e2e::{LONG, Mesh};
use culvert_lab::{Capture, Connect, Family, Server, Ztunnel, ZtunnelOptions, connect, roundtrip};

use crate::AT_ONCE;

#[test]
fn outbound_waits_for_a_ztunnel_that_is_away_and_leaks_nothing() {
    let mut mesh = Mesh::new("vm-hold").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    mesh.enrol(&pod, &["--hold", "forever"]).unwrap();
    mesh.ztunnel.kill().unwrap();
    let wire = Capture::outside(mesh.lab.node(), &pod).unwrap();
    let mut waiting = Vec::new();
    for family in Family::BOTH {
        let server = Server::echo(&outside, outside.at(family, 8080).unwrap()).unwrap();
        waiting.push((Connect::to(server.addr()).start(&pod).unwrap(), server));
    }
    // Two SYNs of each go by: the first, and its repetition after a second.
    for (connecting, server) in &waiting {
        assert!(!connecting.settled(Duration::from_millis(1200)).unwrap());
        assert_eq!(server.count(), 0);
    }
    wire.none(culvert_lab::Packet::is_tcp).unwrap();

    mesh.ztunnel = Ztunnel::start(&mesh.lab, &mesh.zds, &ZtunnelOptions::new()).unwrap();
    let pid = mesh.ztunnel.pid().to_string();
    mesh.lab
        .attach(&pod, &["--hold", "forever", "--ztunnel", &pid])
        .unwrap();
    for (connecting, _) in waiting {
        let stream = connecting.wait(4 * LONG).unwrap();
        assert_eq!(roundtrip(&stream, b"hello").unwrap(), b"hello");
    }
    assert_eq!(mesh.stat(&pod, "outbound_accepts").unwrap(), 2);
}

#[test]
fn outbound_is_refused_once_the_hold_is_over() {
    let mesh = Mesh::new("vm-refuse").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    mesh.enrol(&pod, &["--hold", "0"]).unwrap();
    mesh.ztunnel.kill().unwrap();
    let wire = Capture::outside(mesh.lab.node(), &pod).unwrap();
    for family in Family::BOTH {
        let to = outside.at(family, 8080).unwrap();
        let started = Instant::now();
        let error = connect(&pod, to, LONG).unwrap_err();
        assert_eq!(
            error.raw_os_error(),
            Some(libc::EHOSTUNREACH),
            "{family}: {error}"
        );
        assert!(
            started.elapsed() < AT_ONCE,
            "{family}: {:?}",
            started.elapsed()
        );
    }
    wire.none(culvert_lab::Packet::is_tcp).unwrap();
}
