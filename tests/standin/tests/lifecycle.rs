//! The stand-in as a process: which pods it serves, and how it starts and ends. Needs root.
#![expect(
    clippy::unwrap_used,
    reason = "what tests share fails as loudly as a test"
)]

use std::io::Read as _;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use culvert_lab::{Family, Lab, Ns, Zds, Ztunnel, ZtunnelOptions};

const PORTS: [u16; 3] = [15001, 15006, 15008];
const SOON: Duration = Duration::from_secs(5);

/// Whether something accepts connections there.
fn listens(ns: &Ns, addr: SocketAddr) -> bool {
    ns.run(|| TcpStream::connect(addr)).is_ok()
}

fn loopback(family: Family, port: u16) -> SocketAddr {
    SocketAddr::new(family.loopback(), port)
}

/// Waits until the pod is served, or until it is not.
fn wait_served(ns: &Ns, served: bool, patience: Duration) {
    let started = Instant::now();
    while listens(ns, loopback(Family::V4, 15053)) != served {
        assert!(
            started.elapsed() < patience,
            "after {patience:?}, served is still {}",
            !served
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A connection is established before it is accepted, so counters come a moment later.
fn wait_counted(ztunnel: &Ztunnel, uid: &str, counter: &str, expected: u64) {
    let started = Instant::now();
    loop {
        let counted = ztunnel.pod_stats(uid).unwrap()[counter].as_u64();
        if counted == Some(expected) {
            return;
        }
        assert!(
            started.elapsed() < SOON,
            "{counter} is {counted:?}, not {expected}"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_pod_gets_all_listeners_in_both_families() {
    let lab = Lab::new("standin-listeners").unwrap();
    let zds = Zds::start(&lab).unwrap();
    let (both, only4) = (
        lab.pod("both").unwrap(),
        lab.pod_builder("only4").ipv4_only().build().unwrap(),
    );
    for key in [
        "net/ipv6/conf/all/disable_ipv6",
        "net/ipv6/conf/lo/disable_ipv6",
    ] {
        only4.set_sysctl(key, "1").unwrap();
    }
    for pod in [&both, &only4] {
        zds.add_pod(pod).unwrap();
    }
    let ztunnel = Ztunnel::start(&lab, &zds, &ZtunnelOptions::new()).unwrap();
    assert!(zds.troubles().is_empty(), "{:?}", zds.troubles());

    for port in PORTS.into_iter().chain([15053]) {
        assert!(listens(&both, loopback(Family::V4, port)), "{port}");
        assert!(listens(&both, loopback(Family::V6, port)), "{port}");
        assert!(listens(&only4, loopback(Family::V4, port)), "{port}");
    }
    // DNS is for the pod's own processes.
    assert!(!listens(lab.node(), both.at(Family::V4, 15053).unwrap()));
    let inode = both.inode().unwrap();
    assert_eq!(ztunnel.pod_stats("both").unwrap()["netns_inode"], inode);
    for counter in ["outbound_accepts", "inbound_accepts", "hbone_accepts"] {
        wait_counted(&ztunnel, "both", counter, 2);
    }
}

#[test]
fn its_own_ports_are_no_destination() {
    let lab = Lab::new("standin-illegal").unwrap();
    let zds = Zds::start(&lab).unwrap();
    let pod = lab.pod("pod").unwrap();
    zds.add_pod(&pod).unwrap();
    let ztunnel = Ztunnel::start(&lab, &zds, &ZtunnelOptions::new()).unwrap();
    for (served, port) in [15001, 15006].into_iter().enumerate() {
        let mut stream = lab
            .node()
            .run(|| TcpStream::connect(pod.at(Family::V4, port).unwrap()))
            .unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        assert_eq!(
            stream.read(&mut [0]).unwrap(),
            0,
            "the connection is closed, not forwarded in a circle"
        );
        assert_eq!(ztunnel.pod_stats("pod").unwrap()["refused"], served + 1);
    }
}

#[test]
fn what_cannot_start_is_nacked_and_tried_again() {
    let lab = Lab::new("standin-nack").unwrap();
    let zds = Zds::start(&lab).unwrap();
    let pod = lab.pod("pod").unwrap();
    let taken = pod.run(|| TcpListener::bind("0.0.0.0:15006")).unwrap();
    let ztunnel = Ztunnel::start(&lab, &zds, &ZtunnelOptions::new()).unwrap();
    let nack = format!("{:#}", zds.add_pod(&pod).unwrap_err());
    assert!(nack.contains("15006") && nack.contains("in use"), "{nack}");
    assert!(
        !listens(&pod, loopback(Family::V4, 15001)),
        "all listeners or none"
    );

    drop(taken);
    wait_served(&pod, true, Duration::from_secs(10));
    assert_eq!(
        zds.ztunnels(),
        [ztunnel.pid()],
        "a nack is no reason to hang up"
    );
}

#[test]
fn pods_outlive_the_agent_until_a_snapshot_leaves_them_out() {
    let lab = Lab::new("standin-reconnect").unwrap();
    let (kept, dropped) = (lab.pod("kept").unwrap(), lab.pod("dropped").unwrap());
    let zds = Zds::start(&lab).unwrap();
    for pod in [&kept, &dropped] {
        zds.add_pod(pod).unwrap();
    }
    let ztunnel = Ztunnel::start(&lab, &zds, &ZtunnelOptions::new()).unwrap();
    let path = zds.path().to_path_buf();
    drop(zds);
    std::thread::sleep(Duration::from_millis(300));
    for pod in [&kept, &dropped] {
        assert!(
            listens(pod, loopback(Family::V4, 15053)),
            "no agent, no change"
        );
    }
    let before = ztunnel.pod_stats("kept").unwrap()["outbound_accepts"].clone();
    assert!(listens(&kept, loopback(Family::V4, 15001)));

    let zds = Zds::listen_at(&path).unwrap();
    zds.add_pod(&kept).unwrap();
    zds.wait_for(ztunnel.pid(), Duration::from_secs(20))
        .unwrap();
    wait_served(&dropped, false, SOON);
    assert!(listens(&kept, loopback(Family::V4, 15053)));
    let after = ztunnel.pod_stats("kept").unwrap()["outbound_accepts"].clone();
    assert!(
        after.as_u64() > before.as_u64(),
        "the pod named again was not started anew: {before} then {after}"
    );
}

#[test]
fn a_pod_in_another_namespace_replaces_the_old_one() {
    let lab = Lab::new("standin-replace").unwrap();
    let (old, new) = (lab.pod("old").unwrap(), lab.pod("new").unwrap());
    let zds = Zds::start(&lab).unwrap();
    let ztunnel = Ztunnel::start(&lab, &zds, &ZtunnelOptions::new()).unwrap();
    for _ in 0..2 {
        // The second time it is the same pod: nothing happens.
        zds.add("uid", &old, "pod", "default", "sa").unwrap();
        assert!(listens(&old, loopback(Family::V4, 15001)));
    }
    wait_counted(&ztunnel, "uid", "outbound_accepts", 2);
    zds.add("uid", &new, "pod", "default", "sa").unwrap();
    wait_served(&old, false, SOON);
    wait_served(&new, true, SOON);
    zds.del("uid").unwrap();
    wait_served(&new, false, SOON);
}

#[test]
fn del_cuts_connections() {
    let lab = Lab::new("standin-del").unwrap();
    let zds = Zds::start(&lab).unwrap();
    let pod = lab.pod("pod").unwrap();
    zds.add_pod(&pod).unwrap();
    let _ztunnel = Ztunnel::start(&lab, &zds, &ZtunnelOptions::new()).unwrap();
    // Both are open for as long as the client likes: TLS that is never begun, DNS that is never asked.
    for port in [15008, 15053] {
        let mut stream = pod
            .run(|| TcpStream::connect(loopback(Family::V4, port)))
            .unwrap();
        stream
            .set_read_timeout(Some(Duration::from_millis(200)))
            .unwrap();
        assert!(
            stream.read(&mut [0]).is_err(),
            "{port}: nothing to read, and no end either"
        );
        zds.del("pod").unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap(), 0, "{port}");
        wait_served(&pod, false, SOON);
        zds.add_pod(&pod).unwrap();
    }
}
