//! The lab itself: what it builds works, labs do not see each other, and nothing is left of one.
#![expect(
    clippy::disallowed_methods,
    reason = "these tests run programs, themselves among them"
)]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use ipnet::IpNet;

use culvert_lab::{Capture, Connect, Family, Lab, Ns, Route, Rule, Server, connect, roundtrip};

const LONG: Duration = Duration::from_secs(5);
/// Set for the run of this test binary that is to die in the middle of a lab.
const VICTIM: &str = "CULVERT_LAB_TEST_VICTIM";

#[test]
fn pods_reach_each_other_and_the_node_and_the_outside() {
    let lab = Lab::new("reach").unwrap();
    let (a, b, outside) = (
        lab.pod("a").unwrap(),
        lab.pod("b").unwrap(),
        lab.outside().unwrap(),
    );
    let pairs = [
        (&a, &b),
        (&b, lab.node()),
        (lab.node(), &a),
        (&outside, &a),
        (&a, &outside),
    ];
    for family in Family::BOTH {
        for (server, client) in pairs {
            let at = server.at(family, 7000).unwrap();
            let listener = server.run(|| TcpListener::bind(at)).unwrap();
            let expected = client.run(|| {
                let mut stream = TcpStream::connect(at).unwrap();
                stream.write_all(b"x").unwrap();
                stream.local_addr().unwrap()
            });
            let (mut stream, peer) = listener.accept().unwrap();
            assert_eq!(peer, expected);
            assert_eq!(peer.ip(), client.ip(family).unwrap());
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            assert_eq!(&byte, b"x");
        }
    }
}

#[test]
fn panics_go_on_in_the_caller() {
    let lab = Lab::new("panic").unwrap();
    let caught = catch_unwind(AssertUnwindSafe(|| lab.node().run(|| panic!("on purpose"))));
    assert_eq!(
        caught.unwrap_err().downcast_ref::<&str>(),
        Some(&"on purpose")
    );
}

#[test]
fn parallel_labs_do_not_see_each_other() {
    let (one, two) = (Lab::new("twin").unwrap(), Lab::new("twin").unwrap());
    assert_ne!(one.id(), two.id());
    let (a, b) = (one.pod("a").unwrap(), two.pod("a").unwrap());
    assert_eq!(a.v4().unwrap(), b.v4().unwrap());
    let capture = Capture::start(two.node(), "br0").unwrap();
    for family in Family::BOTH {
        let server = Server::echo(&a, a.at(family, 7000).unwrap()).unwrap();
        roundtrip(
            &connect(one.node(), server.addr(), LONG).unwrap(),
            b"private",
        )
        .unwrap();
        assert!(connect(two.node(), server.addr(), LONG).is_err());
        assert_eq!(server.count(), 1);
    }
    assert!(!capture.contains(b"private").unwrap());

    // Threads and processes are in their own lab's cgroup, and only while they are asked to be.
    let cgroup = || std::fs::read_to_string("/proc/thread-self/cgroup").unwrap();
    assert!(
        a.run(cgroup)
            .lines()
            .any(|line| line == format!("0::/{}", one.id()))
    );
    assert!(
        b.run(cgroup)
            .lines()
            .any(|line| line == format!("0::/{}", two.id()))
    );
    assert!(!cgroup().contains("culvert-test"));
}

fn traces(lab: &Lab, namespaces: &[&Ns]) -> Vec<PathBuf> {
    let mut traces = vec![
        lab.cgroup().to_path_buf(),
        lab.bpffs().to_path_buf(),
        lab.scratch().to_path_buf(),
    ];
    traces.extend(namespaces.iter().map(|ns| ns.path().to_path_buf()));
    traces
}

#[test]
fn nothing_is_left_after_drop_nor_after_a_panic() {
    let watcher = Lab::new("watcher").unwrap();
    for panics in [false, true] {
        let lab = Lab::new("gone").unwrap();
        let pod = lab.pod("a").unwrap();
        let traces = traces(&lab, &[lab.node(), &pod, &lab.outside().unwrap()]);
        assert!(traces.iter().all(|trace| trace.exists()), "{traces:?}");
        std::fs::create_dir(lab.bpffs().join("deep")).unwrap();
        assert_eq!(lab.pins().unwrap(), [Path::new("deep")]);
        // The other end of a pair vanishes with its namespace: that is how to see that the namespace itself is gone.
        pod.add_veth("tie", watcher.node(), "tie").unwrap();
        let mut sleep = Command::new("/bin/sleep");
        sleep.arg("1000");
        let child = pod.spawn(sleep).unwrap();
        let pid = child.pid();
        // Its guard never runs, and a thread stays in the cgroup: the lab has to cope.
        std::mem::forget(child);
        let (leave, stay) = std::sync::mpsc::channel::<()>();
        let thread = pod.run(|| std::thread::spawn(move || stay.recv().unwrap_err()));

        let end = AssertUnwindSafe(|| {
            let _goes_first = (lab, pod);
            assert!(!panics, "on purpose");
        });
        assert_eq!(catch_unwind(end).is_err(), panics);
        assert_eq!(traces.iter().find(|trace| trace.exists()), None);
        let started = Instant::now();
        while Path::new(&format!("/proc/{pid}")).exists() {
            assert!(started.elapsed() < LONG, "process {pid} lives on");
            std::thread::sleep(Duration::from_millis(5));
        }
        drop(leave);
        thread.join().unwrap();
        while watcher
            .node()
            .interfaces()
            .unwrap()
            .contains(&"tie".to_owned())
        {
            assert!(started.elapsed() < LONG, "the namespace lives on");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

#[test]
fn what_a_killed_run_left_is_swept_by_the_next() {
    if std::env::var_os(VICTIM).is_some() {
        let lab = Lab::new("victim").unwrap();
        let pod = lab.pod("a").unwrap();
        let mut sleep = Command::new("/bin/sleep");
        sleep.arg("1000");
        let child = pod.spawn(sleep).unwrap();
        println!("child={}", child.pid());
        for trace in traces(&lab, &[lab.node(), &pod]) {
            println!("trace={}", trace.display());
        }
        std::process::abort();
    }
    let mut myself = Command::new(std::env::current_exe().unwrap());
    myself.args([
        "--exact",
        "what_a_killed_run_left_is_swept_by_the_next",
        "--nocapture",
    ]);
    let output = myself.env(VICTIM, "1").output().unwrap();
    assert!(!output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    let said = |key: &str| -> Vec<String> {
        text.lines()
            .filter_map(|line| line.strip_prefix(key).map(str::to_owned))
            .collect()
    };
    let traces = said("trace=");
    assert_eq!(traces.len(), 5, "{text}");
    // Its programs died with it, although nobody was left to kill them.
    let child = Path::new("/proc").join(&said("child=")[0]);
    let started = Instant::now();
    while std::fs::read_to_string(child.join("stat")).is_ok_and(|stat| !stat.contains(") Z")) {
        assert!(started.elapsed() < LONG, "{} lives on", child.display());
        std::thread::sleep(Duration::from_millis(5));
    }
    let _lab = Lab::new("sweeper").unwrap();
    assert_eq!(traces.iter().find(|trace| Path::new(trace).exists()), None);
}

#[test]
fn pods_come_in_all_shapes() {
    let lab = Lab::new("shapes").unwrap();
    let v4 = lab.pod_builder("v4").ipv4_only().build().unwrap();
    assert!(v4.v6().is_err());
    assert_eq!(v4.sysctl("net/ipv6/conf/lo/disable_ipv6").unwrap(), "1");
    assert!(
        v4.addrs()
            .unwrap()
            .iter()
            .all(|(_, net)| net.addr().is_ipv4())
    );
    let v6 = lab.pod_builder("v6").ipv6_only().build().unwrap();
    assert!(v6.v4().is_err());
    let bare = lab.pod_builder("bare").no_interface().build().unwrap();
    assert_eq!(bare.interfaces().unwrap(), ["lo"]);

    let other = lab
        .pod_builder("other")
        .bridge("br1")
        .same_addrs(&v4)
        .ifname("net0")
        .build()
        .unwrap();
    let third = lab.pod_builder("third").bridge("br1").build().unwrap();
    assert_eq!(other.ifname(), "net0");
    let server = Server::echo(&other, other.at(Family::V4, 7000).unwrap()).unwrap();
    connect(&third, server.addr(), LONG).unwrap();
    assert!(connect(lab.node(), server.addr(), LONG).is_err());

    let net = "10.99.0.1/24".parse().unwrap();
    let two = lab
        .pod_builder("two")
        .extra_interface("net1", &[net])
        .build()
        .unwrap();
    let index = two.ifindex("net1").unwrap();
    assert!(two.addrs().unwrap().contains(&(index, net)));

    let cookie = lab.delete(two.clone()).unwrap_err();
    assert!(cookie.to_string().contains("keep"), "{cookie}");
    let path = two.path().to_path_buf();
    lab.delete(two).unwrap();
    assert!(!path.exists());
}

#[test]
fn addresses_rules_routes_and_links_come_and_go() {
    let lab = Lab::new("changes").unwrap();
    let (a, b) = (lab.pod("a").unwrap(), lab.pod("b").unwrap());
    let before = a.picture(&["net/ipv4/ip_forward"]).unwrap();
    for (family, addr) in [
        (Family::V4, "10.77.9.9/16".parse().unwrap()),
        (Family::V6, "fd77::99/64".parse().unwrap()),
    ] {
        a.add_addr("eth0", addr).unwrap();
        let server = Server::echo(&a, (addr.addr(), 7000).into()).unwrap();
        connect(&b, server.addr(), LONG).unwrap();
        assert_eq!(
            a.add_addr("eth0", addr)
                .unwrap_err()
                .downcast_ref::<std::io::Error>()
                .unwrap()
                .raw_os_error(),
            Some(17)
        );
        a.del_addr("eth0", addr).unwrap();

        let rule = Rule::fwmark(family, 0x42, 77);
        a.add_rule(&rule).unwrap();
        let to = b.at(family, 9).unwrap();
        let round = Route {
            table: 77,
            local: true,
            ..Route::dev(IpNet::from(to.ip()), "lo")
        };
        a.add_route(&round).unwrap();
        let capture = Capture::outside(lab.node(), &a).unwrap();
        let from = a.at(family, 0).unwrap();
        for (mark, leaves) in [(0x42, false), (0x43, true)] {
            let soon = Duration::from_millis(50);
            Connect::to(to)
                .from(from)
                .mark(mark)
                .timeout(soon)
                .run(&a)
                .unwrap_err();
            assert_eq!(capture.any(|p| p.is_syn() && p.dst == to).unwrap(), leaves);
        }
        a.del_route(&round).unwrap();
        assert_ne!(a.picture(&["net/ipv4/ip_forward"]).unwrap(), before);
        a.del_rule(&rule).unwrap();
    }
    assert_eq!(a.picture(&["net/ipv4/ip_forward"]).unwrap(), before);

    let host = lab.add_interface(&a, "d0").unwrap();
    assert!(lab.node().interfaces().unwrap().contains(&host));
    a.set_down("d0").unwrap();
    a.rename_link("d0", "d1").unwrap();
    a.move_link("d1", &b, "d2").unwrap();
    assert_eq!(a.interfaces().unwrap(), ["lo", "eth0"]);
    b.del_link("d2").unwrap();
    assert!(b.del_link("d2").is_err());
    b.link_local("eth0").unwrap();
}

#[test]
fn only_root_gets_a_lab_and_is_told_so() {
    let binary = std::env::current_exe().unwrap();
    let lab = Lab::new("unroot").unwrap();
    let mut myself = Command::new(binary);
    myself.args(["--exact", "panics_go_on_in_the_caller"]);
    let output = lab.node().output_as(culvert_lab::Creds::Nobody, myself);
    // The file may lie where nobody may not look; then the refusal is the kernel's.
    if let Ok(output) = output {
        assert!(!output.status.success());
        let said =
            String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("run as root"), "{said}");
    }
}
