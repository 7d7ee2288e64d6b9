//! What must hold on every kernel that is supported: `cargo xtask test vm` runs these tests in emulated guests, where
//! nothing but static binaries is at hand and everything is thirty times slower. So they are few, execute no program
//! but `culvert` and the stand-in, and bound waiting from above generously.
//!
//! Finer points of each case are tested by the other files of this directory on the machine's own kernel.

mod away;
mod dns;
mod escape;
mod order;
mod paths;
mod probes;

use std::net::TcpStream;
use std::time::Duration;

use anyhow::Result;
use culvert_e2e::{LONG, Mesh};
use culvert_lab::{Family, Lab, Server, connect, roundtrip};

/// Long enough for an emulated machine with other things to do; a reset that is lost costs a connection attempt, ten
/// seconds. How fast it really is, other tests measure.
const AT_ONCE: Duration = Duration::from_secs(3);
/// What a pod's namespace has to look like as before: see `Ns::picture`.
const SYSCTLS: [&str; 3] = [
    "net/ipv4/tcp_fwmark_accept",
    "net/ipv4/fwmark_reflect",
    "net/ipv6/fwmark_reflect",
];

#[test]
fn load_is_verified_pinned_repeatable_and_undone() {
    let lab = Lab::new("vm-load").unwrap();
    let preflight = lab.culvert(&["-o", "json", "preflight"]).unwrap();
    let preflight = preflight.ok().unwrap().json().unwrap();
    assert_eq!(preflight["ok"], true, "{preflight}");

    let load = || -> Result<_> { lab.culvert(&["-o", "json", "load"])?.ok()?.json() };
    let first = load().unwrap();
    let programs = first["programs"].as_array().unwrap();
    let mut names: Vec<_> = programs
        .iter()
        .map(|p| p["name"].as_str().unwrap())
        .collect();
    names.sort_unstable();
    assert_eq!(
        names,
        [
            "culvert_connect",
            "culvert_dns_connect4",
            "culvert_dns_connect6",
            "culvert_dns_getpeername4",
            "culvert_dns_getpeername6",
            "culvert_dns_recvmsg4",
            "culvert_dns_recvmsg6",
            "culvert_dns_sendmsg4",
            "culvert_dns_sendmsg6",
            "culvert_enter",
            "culvert_sockopt",
            "culvert_steer",
            "culvert_vouch"
        ]
    );
    for program in programs {
        assert!(program["bytes_xlated"].as_u64().unwrap() > 0, "{program}");
        assert!(
            program["verified_instructions"].as_u64().unwrap() > 0,
            "{program}"
        );
    }
    let pins = lab.pins().unwrap();
    assert!(!pins.is_empty());

    let second = load().unwrap();
    assert_eq!(second["adopted"], true, "{second}");
    for (before, after) in programs.iter().zip(second["programs"].as_array().unwrap()) {
        assert_eq!(before["tag"], after["tag"]);
        assert!(
            after["action"] == "kept" || after["action"] == "checked",
            "{after}"
        );
    }
    assert_eq!(lab.pins().unwrap(), pins);

    lab.culvert(&["unload"]).unwrap().ok().unwrap();
    assert_eq!(lab.pins().unwrap(), Vec::<std::path::PathBuf>::new());
}

#[test]
fn detach_leaves_all_as_it_was_and_cuts_nothing() {
    let mesh = Mesh::new("vm-detach").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    let picture = pod.picture(&SYSCTLS).unwrap();
    let servers: Vec<_> = Family::BOTH
        .into_iter()
        .map(|family| Server::echo(&outside, outside.at(family, 8080).unwrap()).unwrap())
        .collect();
    let open = || -> Vec<_> {
        let one = |server: &Server| connect(&pod, server.addr(), LONG).unwrap();
        servers.iter().map(one).collect()
    };
    let alive = |streams: &[TcpStream]| {
        for stream in streams {
            assert_eq!(roundtrip(stream, b"alive").unwrap(), b"alive");
        }
    };

    let earlier = open();
    mesh.enrol(&pod, &[]).unwrap();
    assert_ne!(pod.picture(&SYSCTLS).unwrap(), picture);
    alive(&earlier);
    let captured = open();
    alive(&captured);
    assert_eq!(mesh.stat(&pod, "outbound_accepts").unwrap(), 2);

    // Those that go through ztunnel live on, on rules that stay for as long.
    mesh.lab.detach(&pod).unwrap();
    let later = open();
    for streams in [&earlier, &captured, &later] {
        alive(streams);
    }
    assert_eq!(mesh.stat(&pod, "outbound_accepts").unwrap(), 2);
    for (server, stream) in servers.iter().zip(&later) {
        assert_eq!(server.peers()[2], stream.local_addr().unwrap());
    }

    drop(captured);
    mesh.zds.del(pod.name()).unwrap();
    let path = pod.path().display().to_string();
    let wait = LONG.as_secs().to_string();
    let detach = ["netns", "detach", "--netns", &path, "--wait", &wait];
    mesh.lab.culvert(&detach).unwrap().ok().unwrap();
    assert_eq!(pod.picture(&SYSCTLS).unwrap(), picture);
    alive(&earlier);
    alive(&later);
    mesh.lab.culvert(&["unload"]).unwrap().ok().unwrap();
    assert_eq!(mesh.lab.pins().unwrap(), Vec::<std::path::PathBuf>::new());
    alive(&open());
}
