//! What tests see with: captures, credentials, programs.
#![expect(clippy::disallowed_methods, reason = "these tests run programs")]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::time::Duration;

use culvert_lab::{Capture, Creds, Family, Lab, Protocol, Signal};

const LONG: Duration = Duration::from_secs(5);

#[test]
fn a_capture_sees_both_directions_and_cut_words() {
    let lab = Lab::new("capture").unwrap();
    let (a, b) = (lab.pod("a").unwrap(), lab.pod("b").unwrap());
    for family in Family::BOTH {
        let mut capture = Capture::outside(lab.node(), &a).unwrap();
        let at = b.at(family, 7000).unwrap();
        let listener = b.run(|| TcpListener::bind(at)).unwrap();
        let mut client = a.run(|| TcpStream::connect(at)).unwrap();
        client.set_nodelay(true).unwrap();
        client.write_all(b"see").unwrap();
        client.write_all(b"ker").unwrap();
        let (mut server, peer) = listener.accept().unwrap();
        server.write_all(b"answer").unwrap();
        client.read_exact(&mut [0; 6]).unwrap();

        // No waiting: what has been answered has been captured.
        assert!(capture.tcp_payload_contains(b"seeker").unwrap());
        assert!(capture.contains(b"answer").unwrap());
        assert!(!capture.contains(b"seekers").unwrap());
        assert_eq!(capture.ports().unwrap(), [7000].into());
        assert_eq!(capture.connections().unwrap(), [(peer, at)].into());
        assert!(
            capture
                .any(|p| p.is_syn() && !p.outgoing && p.src == peer)
                .unwrap()
        );
        assert!(
            capture
                .any(|p| p.flags.syn() && p.flags.ack() && p.outgoing)
                .unwrap()
        );
        assert!(capture.none(|p| p.is_syn()).is_err());
        capture.none(|p| p.has_port(7001)).unwrap();

        let pcap = lab.scratch().join("c.pcap");
        capture.write_pcap(&pcap).unwrap();
        assert_eq!(
            std::fs::read(&pcap).unwrap()[..4],
            0xa1b2_c3d4u32.to_ne_bytes()
        );
        capture.stop();
        drop(server);
        assert!(!capture.any(|p| p.flags.fin()).unwrap());
        capture.clear();
        assert!(capture.packets().unwrap().is_empty());
    }
}

#[test]
fn a_capture_that_lost_frames_answers_nothing() {
    let lab = Lab::new("lossy").unwrap();
    let pod = lab.pod_builder("a").no_bridge().build().unwrap();
    let capture = Capture::start(&pod, "eth0").unwrap();
    // More than a capture may hold.
    pod.run(|| {
        pod.set_mtu("eth0", 65535).unwrap();
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        let big = vec![0; 60_000];
        for _ in 0..5_000 {
            socket.send_to(&big, "10.77.0.1:9").unwrap();
        }
    });
    assert!(
        capture
            .any(|p| p.protocol == Protocol::Udp)
            .unwrap_err()
            .to_string()
            .contains("of no use")
    );
}

#[test]
fn loose_pods_send_into_the_open() {
    let lab = Lab::new("loose").unwrap();
    let a = lab.pod("a").unwrap();
    let b = lab
        .pod_builder("b")
        .same_addrs(&a)
        .no_bridge()
        .build()
        .unwrap();
    assert_eq!(
        (a.v4().unwrap(), a.v6().unwrap()),
        (b.v4().unwrap(), b.v6().unwrap())
    );
    assert_ne!(
        (a.cookie(), a.inode().unwrap()),
        (b.cookie(), b.inode().unwrap())
    );
    let capture = Capture::outside(lab.node(), &b).unwrap();
    for family in Family::BOTH {
        let at = a.at(family, 9).unwrap();
        let outside = lab.outside().unwrap().at(family, 80).unwrap();
        b.run(|| assert!(TcpStream::connect_timeout(&outside, Duration::from_millis(50)).is_err()));
        let syn = capture
            .wait_for(|p| p.is_syn() && p.dst == outside, LONG)
            .unwrap();
        assert_eq!(syn.src.ip(), at.ip());
    }
}

#[test]
fn creds_hold_for_threads_and_programs() {
    let lab = Lab::new("creds").unwrap();
    let pod = lab.pod("a").unwrap();
    let status = || std::fs::read_to_string("/proc/thread-self/status").unwrap();
    let field = |status: &str, key: &str| {
        let line = status.lines().find(|line| line.starts_with(key)).unwrap();
        line.split_whitespace()
            .skip(1)
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let before = status();
    for (creds, uid, caps) in [
        (Creds::Nobody, "65534", 0u64),
        (Creds::NetRawOnly, "65534", 1 << 13),
        (Creds::NetAdminOnly, "65534", 1 << 12),
        (Creds::RootNoCaps, "0", 0),
    ] {
        let mut cat = Command::new("/bin/cat");
        cat.arg("/proc/self/status");
        let program = String::from_utf8(pod.output_as(creds, cat).unwrap().stdout).unwrap();
        for seen in [pod.run_as(creds, status), program] {
            assert_eq!(field(&seen, "Uid:"), [uid; 4], "{creds}");
            assert_eq!(field(&seen, "CapEff:"), [format!("{caps:016x}")], "{creds}");
            assert_eq!(field(&seen, "CapPrm:"), [format!("{caps:016x}")], "{creds}");
        }
    }
    assert!(
        pod.run_as(Creds::Nobody, || std::fs::write(
            "/proc/sys/net/ipv4/ip_forward",
            "1"
        ))
        .is_err()
    );
    let raw = || {
        socket2::Socket::new(
            socket2::Domain::IPV4,
            socket2::Type::RAW,
            Some(socket2::Protocol::TCP),
        )
    };
    pod.run_as(Creds::NetRawOnly, raw).unwrap();
    pod.run_as(Creds::Nobody, raw).unwrap_err();
    assert_eq!(
        field(&before, "Uid:"),
        field(&status(), "Uid:"),
        "this thread is who it was"
    );
    assert_eq!(field(&before, "CapEff:"), field(&status(), "CapEff:"));
}

#[test]
fn programs_run_inside_and_end_with_their_guard() {
    let lab = Lab::new("spawn").unwrap();
    let pod = lab.pod("a").unwrap();
    let mut shell = Command::new("/bin/sh");
    shell.args([
        "-c",
        "cat /proc/self/cgroup; readlink /proc/self/ns/net; echo ready >&2; exec sleep 1000",
    ]);
    let child = pod.spawn(shell).unwrap();
    child.wait_for_output("ready", LONG).unwrap();
    assert!(
        child
            .stdout()
            .contains(&format!("net:[{}]", pod.inode().unwrap()))
    );
    assert!(child.stdout().contains(lab.id()));
    assert!(child.wait(Duration::from_millis(20)).is_err());
    let proc = format!("/proc/{}", child.pid());
    assert!(std::path::Path::new(&proc).exists());
    drop(child);
    assert!(!std::path::Path::new(&proc).exists());

    let mut shell = Command::new("/bin/sh");
    shell.args([
        "-c",
        "trap 'echo asked; exit 3' TERM; echo ready; while :; do sleep 0.01; done",
    ]);
    let child = pod.spawn(shell).unwrap();
    child.wait_for_output("ready", LONG).unwrap();
    child.term().unwrap();
    assert_eq!(child.wait(LONG).unwrap().code(), Some(3));
    child.wait_for_output("asked", LONG).unwrap();
    assert!(
        child
            .wait_for_output("never", LONG)
            .unwrap_err()
            .to_string()
            .contains("without printing")
    );
    child.signal(Signal::SIGKILL).unwrap();

    assert!(pod.spawn(Command::new("/no/such/program")).is_err());
}
