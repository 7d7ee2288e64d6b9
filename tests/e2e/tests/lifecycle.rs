//! A pod's life under Culvert: enrolled and let go again and again, with connections open, addresses that come and go, a
//! namespace that dies, programs replaced under load; and what is left in the kernel afterwards.

use std::collections::BTreeSet;
use std::net::{SocketAddr, TcpStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use culvert_e2e::{
    LONG, Mesh, bpf, eventually, picture,
    traffic::{Via, local_delivery_works, talk},
};
use culvert_lab::{Capture, Connect, Family, Lab, Ns, Rule, Server, connect, roundtrip};
use serde_json::Value;

/// Runs a netns verb on one pod and returns what it says of it.
fn verb(lab: &Lab, verb: &str, pod: &Ns, args: &[&str]) -> Result<Value> {
    let path = pod.path().display().to_string();
    let all: Vec<&str> = ["-o", "json", "netns", verb, "--netns", &path]
        .into_iter()
        .chain(args.iter().copied())
        .collect();
    let said = lab.culvert(&all)?.ok()?.json()?;
    Ok(said["pods"][0].clone())
}

fn servers(ns: &Ns, port: u16) -> Result<Vec<(Family, Server)>> {
    Family::BOTH
        .into_iter()
        .map(|family| Ok((family, Server::echo(ns, ns.at(family, port)?)?)))
        .collect()
}

/// A loaded lab without ztunnel, its pod, and what both look like before anything is enrolled.
fn loaded(name: &str) -> Result<(Lab, Ns, Vec<String>)> {
    let lab = Lab::new(name)?;
    let pod = lab.pod("a")?;
    lab.culvert(&["load"])?.ok()?;
    let before = picture::settled(&lab, &[&pod])?;
    Ok((lab, pod, before))
}

#[test]
fn attaching_and_detaching_twice_is_the_same_as_once() {
    let (lab, pod, before) = loaded("twice").unwrap();
    assert_eq!(
        verb(&lab, "attach", &pod, &[]).unwrap()["result"],
        "enrolled"
    );
    let enrolled = picture::all(&lab, &[&pod]).unwrap();
    assert_ne!(before, enrolled);
    assert_eq!(
        verb(&lab, "attach", &pod, &[]).unwrap()["result"],
        "updated"
    );
    picture::same(&enrolled, &picture::all(&lab, &[&pod]).unwrap()).unwrap();
    assert_eq!(
        verb(&lab, "detach", &pod, &[]).unwrap()["result"],
        "detached"
    );
    picture::same(&before, &picture::all(&lab, &[&pod]).unwrap()).unwrap();
    assert_eq!(
        verb(&lab, "detach", &pod, &[]).unwrap()["result"],
        "not enrolled"
    );
    picture::same(&before, &picture::all(&lab, &[&pod]).unwrap()).unwrap();
}

#[test]
fn settings_that_were_on_before_are_on_after() {
    let lab = Lab::new("kept").unwrap();
    let pod = lab.pod("a").unwrap();
    lab.culvert(&["load"]).unwrap().ok().unwrap();
    pod.set_sysctl("net/ipv4/tcp_fwmark_accept", "1").unwrap();
    pod.set_sysctl("net/ipv6/fwmark_reflect", "1").unwrap();
    let before = picture::settled(&lab, &[&pod]).unwrap();
    lab.attach(&pod, &[]).unwrap();
    // The second attach must not take our own values for those of before.
    lab.attach(&pod, &[]).unwrap();
    lab.detach(&pod).unwrap();
    picture::same(&before, &picture::all(&lab, &[&pod]).unwrap()).unwrap();
}

#[test]
fn a_namespace_that_is_gone_can_be_detached_and_is_collected() {
    let lab = Lab::new("gone").unwrap();
    lab.culvert(&["load"]).unwrap().ok().unwrap();
    let first = lab.pod("a").unwrap();
    let second = lab.pod("b").unwrap();
    let stays = lab.pod("c").unwrap();
    lab.attach(&stays, &[]).unwrap();
    let clean = (lab.pins().unwrap(), keys(&lab).unwrap());
    lab.attach(&first, &["--exclude-outbound-port", "80"])
        .unwrap();
    lab.attach(&second, &["--exclude-outbound-cidr", "10.0.0.0/8"])
        .unwrap();
    let path = first.path().display().to_string();
    lab.delete(first).unwrap();
    lab.delete(second).unwrap();
    // The kernel takes namespaces apart when it has time.
    eventually("both namespaces are known to be dead", || {
        let list = lab
            .culvert(&["-o", "json", "netns", "list"])?
            .ok()?
            .json()?;
        let dead = |pod: &&Value| pod["state"] == "dead";
        Ok(list["pods"]
            .as_array()
            .is_some_and(|pods| pods.iter().filter(dead).count() == 2))
    })
    .unwrap();
    let said = lab
        .culvert(&["-o", "json", "netns", "detach", "--netns", &path])
        .unwrap()
        .ok()
        .unwrap()
        .json()
        .unwrap();
    assert_eq!(said["pods"][0]["result"], "gone");
    assert_eq!(said["collected"], 2);
    assert_eq!((lab.pins().unwrap(), keys(&lab).unwrap()), clean);
    let path = stays.path().display().to_string();
    let show = lab
        .culvert(&["-o", "json", "netns", "show", "--netns", &path])
        .unwrap();
    assert_eq!(show.ok().unwrap().json().unwrap()["whole"], true);
}

#[test]
fn a_namespace_deleted_while_it_is_watched_and_served_is_no_trouble_to_others() {
    let mesh = Mesh::new("deleted").unwrap();
    let stays = mesh.lab.pod("stays").unwrap();
    let goes = mesh.lab.pod("goes").unwrap();
    mesh.enrol(&stays, &[]).unwrap();
    mesh.enrol(&goes, &[]).unwrap();
    let watch = mesh.lab.culvert_spawn(&["netns", "watch"]).unwrap();
    watch.wait_for_output("watching 2 pods", LONG).unwrap();
    let cookie = goes.cookie();
    mesh.zds.del("goes").unwrap();
    mesh.lab.delete(goes).unwrap();
    let outside = mesh.lab.outside().unwrap();
    for (family, server) in servers(&outside, 8080).unwrap() {
        assert_eq!(
            mesh.via(&stays, &stays, &server).unwrap().0,
            Via::Outbound,
            "{family:?}"
        );
    }
    assert!(watch.status().is_none(), "{}", watch.stderr());
    // Whoever watches holds the namespace by its descriptor; once it lets go the next command collects.
    watch.kill().unwrap();
    eventually("the dead pod is collected", || {
        let path = stays.path().display().to_string();
        mesh.lab
            .culvert(&["netns", "attach", "--netns", &path])?
            .ok()?;
        Ok(!mesh.lab.pins()?.contains(&format!("pods/{cookie}").into()))
    })
    .unwrap();
}

/// A second address of each family for a pod on `br0`.
const SECOND: [&str; 2] = ["10.77.200.1/16", "fd77::200:1/64"];

fn second(family: Family) -> ipnet::IpNet {
    let text = match family {
        Family::V4 => SECOND[0],
        Family::V6 => SECOND[1],
    };
    #[expect(clippy::unwrap_used, reason = "written above")]
    text.parse().unwrap()
}

/// Goes out from the second address, and is spoken to on it.
fn second_address(mesh: &Mesh, pod: &Ns, outside: &Ns, family: Family) -> Result<(Via, Via)> {
    let own = SocketAddr::new(second(family).addr(), 0);
    let far = Server::echo(outside, outside.at(family, 8080)?)?;
    let before = mesh.stat(pod, "outbound_accepts")?;
    let stream = Connect::to(far.addr()).from(own).run(pod)?;
    roundtrip(&stream, b"from the second")?;
    let out = match mesh.stat(pod, "outbound_accepts")? - before {
        0 => Via::Nothing,
        _ => Via::Outbound,
    };
    let app = Server::echo(pod, own)?;
    let (inbound, _) = mesh.via(pod, outside, &app)?;
    Ok((out, inbound))
}

#[test]
fn a_second_address_is_captured_at_once_while_somebody_watches() {
    let mesh = Mesh::new("second").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    mesh.enrol(&pod, &["--probe-source", "none"]).unwrap();
    let watch = mesh.lab.culvert_spawn(&["netns", "watch"]).unwrap();
    watch.wait_for_output("watching 1 pods", LONG).unwrap();
    for family in Family::BOTH {
        let address = second(family).addr().to_string();
        let knows = |known: bool| {
            eventually("the second address is noticed", || {
                let show = mesh.show(&pod)?;
                let has = show["addresses"]
                    .as_array()
                    .is_some_and(|all| all.iter().any(|a| a == address.as_str()));
                Ok(has == known && show["whole"] == true)
            })
        };
        pod.add_addr("eth0", second(family)).unwrap();
        knows(true).unwrap();
        assert_eq!(
            second_address(&mesh, &pod, &outside, family).unwrap(),
            (Via::Outbound, Via::Inbound),
            "{family:?}"
        );
        pod.del_addr("eth0", second(family)).unwrap();
        knows(false).unwrap();
    }
    // Watching outlives pods that are let go.
    mesh.lab.detach(&pod).unwrap();
    watch.wait_for_output("watching 0 pods", LONG).unwrap();
}

#[test]
fn a_second_address_nobody_watched_for_goes_out_through_ztunnel_and_is_closed_inbound() {
    let mesh = Mesh::new("unwatched").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    let args = ["--probe-source", "none"];
    mesh.enrol(&pod, &args).unwrap();
    for family in Family::BOTH {
        pod.add_addr("eth0", second(family)).unwrap();
        let own = SocketAddr::new(second(family).addr(), 0);
        let far = Server::echo(&outside, outside.at(family, 8080).unwrap()).unwrap();
        let before = mesh.stat(&pod, "outbound_accepts").unwrap();
        let stream = Connect::to(far.addr()).from(own).run(&pod).unwrap();
        roundtrip(&stream, b"from the second").unwrap();
        assert_eq!(
            mesh.stat(&pod, "outbound_accepts").unwrap(),
            before + 1,
            "{family:?}: captured"
        );
        // Inbound: past ztunnel would be a hole, so it is closed until somebody looks.
        let app = Server::echo(&pod, own).unwrap();
        let result = connect(&outside, app.addr(), Duration::from_millis(500));
        assert!(result.is_err(), "{family:?}: {result:?}");
        assert_eq!(app.count(), 0, "{family:?}");
        drop((app, far));
        let show = mesh.show(&pod).unwrap();
        assert_eq!(show["whole"], false, "{family:?}: {show}");
        // Attaching again looks.
        let pid = mesh.ztunnel.pid().to_string();
        mesh.lab
            .attach(&pod, &["--probe-source", "none", "--ztunnel", &pid])
            .unwrap();
        assert_eq!(
            second_address(&mesh, &pod, &outside, family).unwrap(),
            (Via::Outbound, Via::Inbound),
            "{family:?}"
        );
    }
}

#[test]
fn an_address_that_moved_to_another_pod_is_that_pods() {
    let mesh = Mesh::new("moved").unwrap();
    let a = mesh.lab.pod("a").unwrap();
    let b = mesh.lab.pod("b").unwrap();
    for family in Family::BOTH {
        a.add_addr("eth0", second(family)).unwrap();
    }
    for pod in [&a, &b] {
        mesh.enrol(pod, &["--probe-source", "none"]).unwrap();
    }
    let wire = Capture::outside(mesh.lab.node(), &a).unwrap();
    for family in Family::BOTH {
        a.del_addr("eth0", second(family)).unwrap();
        b.add_addr("eth0", second(family)).unwrap();
        let to = SocketAddr::new(second(family).addr(), 8080);
        let app = Server::echo(&b, to).unwrap();
        // Nobody watched: still its own for `a`, so it stays at home and is refused; nothing leaves.
        let result = connect(&a, app.addr(), Duration::from_millis(500));
        assert!(result.is_err(), "{family:?}: {result:?}");
        assert_eq!(app.count(), 0, "{family:?}");
        wire.none(|p| p.is_tcp() && p.has_port(8080)).unwrap();
    }
    let watch = mesh.lab.culvert_spawn(&["netns", "watch"]).unwrap();
    watch.wait_for_output("watching 2 pods", LONG).unwrap();
    eventually("both are whole again", || {
        Ok(mesh.show(&a)?["whole"] == true && mesh.show(&b)?["whole"] == true)
    })
    .unwrap();
    for family in Family::BOTH {
        let to = SocketAddr::new(second(family).addr(), 8080);
        let app = Server::echo(&b, to).unwrap();
        assert_eq!(
            mesh.via(&a, &a, &app).unwrap(),
            (Via::Outbound, a.ip(family).unwrap()),
            "{family:?}"
        );
        let inbound = mesh.stat(&b, "inbound_accepts").unwrap();
        talk(&a, app.addr()).unwrap();
        assert_eq!(mesh.stat(&b, "inbound_accepts").unwrap(), inbound + 1);
    }
}

#[test]
fn connections_from_before_enrolment_go_on_untouched() {
    let mesh = Mesh::new("before").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    let far = servers(&outside, 8080).unwrap();
    let own = servers(&pod, 8081).unwrap();
    let mut streams: Vec<TcpStream> = Vec::new();
    for ((_, far), (_, own)) in far.iter().zip(&own) {
        for (from, server) in [(&pod, far), (&outside, own), (&pod, own)] {
            let stream = connect(from, server.addr(), LONG).unwrap();
            roundtrip(&stream, b"before").unwrap();
            streams.push(stream);
        }
    }
    mesh.enrol(&pod, &["--probe-source", "none"]).unwrap();
    let much = vec![7; 300_000];
    for stream in &streams {
        assert_eq!(roundtrip(stream, &much).unwrap(), much);
    }
    assert_eq!(mesh.stat(&pod, "outbound_accepts").unwrap(), 0);
    assert_eq!(mesh.stat(&pod, "inbound_accepts").unwrap(), 0);
    for (family, far) in &far {
        assert_eq!(
            mesh.via(&pod, &pod, far).unwrap().0,
            Via::Outbound,
            "{family:?}"
        );
    }
    for stream in &streams {
        roundtrip(stream, b"still").unwrap();
    }
}

#[test]
fn connections_from_before_un_enrolment_go_on_and_keep_the_rules_until_they_end() {
    let mesh = Mesh::new("drain").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    mesh.lab.culvert(&["load"]).unwrap().ok().unwrap();
    let before = picture::settled(&mesh.lab, &[&pod]).unwrap();
    mesh.enrol(&pod, &["--probe-source", "none"]).unwrap();
    let far = servers(&outside, 8080).unwrap();
    let own = servers(&pod, 8081).unwrap();
    let mut streams: Vec<TcpStream> = Vec::new();
    for ((_, far), (_, own)) in far.iter().zip(&own) {
        for (from, server) in [(&pod, far), (&outside, own), (&pod, own)] {
            let stream = connect(from, server.addr(), LONG).unwrap();
            roundtrip(&stream, b"before").unwrap();
            streams.push(stream);
        }
    }
    let said = verb(&mesh.lab, "detach", &pod, &[]).unwrap();
    assert_eq!(said["result"], "draining", "{said}");
    assert!(said["connections"].as_u64().unwrap() >= 6, "{said}");
    let list = mesh
        .lab
        .culvert(&["-o", "json", "netns", "list"])
        .unwrap()
        .json()
        .unwrap();
    assert_eq!(list["pods"][0]["state"], "draining");
    let much = vec![7; 300_000];
    for stream in &streams {
        assert_eq!(roundtrip(stream, &much).unwrap(), much);
    }
    // New ones are plain at once, in both directions.
    for ((family, far), (_, own)) in far.iter().zip(&own) {
        assert_eq!(
            mesh.via(&pod, &pod, far).unwrap().0,
            Via::Nothing,
            "{family:?}"
        );
        assert_eq!(
            mesh.via(&pod, &outside, own).unwrap().0,
            Via::Nothing,
            "{family:?}"
        );
    }
    local_delivery_works(&pod).unwrap();
    assert_eq!(
        verb(&mesh.lab, "detach", &pod, &[]).unwrap()["result"],
        "draining"
    );
    for stream in &streams {
        roundtrip(stream, b"still").unwrap();
    }
    drop(streams);
    let said = verb(&mesh.lab, "detach", &pod, &["--wait", "20"]).unwrap();
    assert_eq!(said["result"], "detached", "{said}");
    picture::same(&before, &picture::all(&mesh.lab, &[&pod]).unwrap()).unwrap();
}

#[test]
fn a_pod_that_drains_can_be_enrolled_again() {
    let mesh = Mesh::new("redrain").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    mesh.lab.culvert(&["load"]).unwrap().ok().unwrap();
    let before = picture::settled(&mesh.lab, &[&pod]).unwrap();
    mesh.enrol(&pod, &[]).unwrap();
    let far = servers(&outside, 8080).unwrap();
    let old: Vec<TcpStream> = far
        .iter()
        .map(|(_, server)| connect(&pod, server.addr(), LONG).unwrap())
        .collect();
    assert_eq!(
        verb(&mesh.lab, "detach", &pod, &[]).unwrap()["result"],
        "draining"
    );
    let pid = mesh.ztunnel.pid().to_string();
    let said = verb(&mesh.lab, "attach", &pod, &["--ztunnel", &pid]).unwrap();
    assert_eq!(said["result"], "enrolled", "{said}");
    mesh.expect_listeners(&pod, 3).unwrap();
    for ((family, server), old) in far.iter().zip(&old) {
        assert_eq!(
            mesh.via(&pod, &pod, server).unwrap().0,
            Via::Outbound,
            "{family:?}"
        );
        roundtrip(old, b"still").unwrap();
    }
    assert_eq!(mesh.show(&pod).unwrap()["whole"], true);
    drop(old);
    let said = verb(&mesh.lab, "detach", &pod, &["--wait", "20"]).unwrap();
    assert_eq!(said["result"], "detached", "{said}");
    // What the first enrolment found, not what the second did, is what was put back.
    picture::same(&before, &picture::all(&mesh.lab, &[&pod]).unwrap()).unwrap();
}

#[test]
fn list_and_show_say_what_is_there() {
    let mesh = Mesh::new("listshow").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    mesh.enrol(&pod, &["--exclude-outbound-port", "8080", "--hold", "3"])
        .unwrap();
    let list = mesh
        .lab
        .culvert(&["-o", "json", "netns", "list"])
        .unwrap()
        .ok()
        .unwrap()
        .json()
        .unwrap();
    let pods = list["pods"].as_array().unwrap();
    assert_eq!(pods.len(), 1, "{list}");
    let (listed, show) = (&pods[0], mesh.show(&pod).unwrap());
    for said in [listed, &show] {
        assert_eq!(said["cookie"], pod.cookie());
        assert_eq!(said["inode"], pod.inode().unwrap());
        assert_eq!(said["state"], "enrolled");
        for family in Family::BOTH {
            let address = pod.ip(family).unwrap().to_string();
            assert!(
                said["addresses"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .any(|a| a == address.as_str()),
                "{said}"
            );
        }
    }
    assert_eq!(listed["path"], pod.path().display().to_string());
    assert_eq!(show["whole"], true);
    assert_eq!(show["problems"].as_array().unwrap().len(), 0);
    let roles: BTreeSet<&str> = show["listeners"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|l| l["role"].as_str())
        .collect();
    for role in ["outbound", "inbound", "hbone"] {
        assert!(roles.contains(role), "{show}");
    }
    assert!(!show["programmed"].as_array().unwrap().is_empty());
    // A rule that somebody else took away is a problem, and the next attach cures it.
    let rules = pod.rules(Family::V4).unwrap().len();
    let ours = Rule {
        pref: Some(0),
        fwmark: Some((0x111, 0xffd)),
        ..Rule::fwmark(Family::V4, 0x111, 15001)
    };
    pod.del_rule(&ours).unwrap();
    assert_eq!(pod.rules(Family::V4).unwrap().len(), rules - 1);
    let broken = mesh.show(&pod).unwrap();
    assert_eq!(broken["whole"], false, "{broken}");
    assert!(!broken["problems"].as_array().unwrap().is_empty());
    mesh.lab.attach(&pod, &[]).unwrap();
    assert_eq!(mesh.show(&pod).unwrap()["whole"], true);
    // For people, too.
    let path = pod.path().display().to_string();
    for args in [
        vec!["netns", "list"],
        vec!["netns", "show", "--netns", &path],
    ] {
        let said = mesh.lab.culvert(&args).unwrap().ok().unwrap().stdout;
        assert!(said.contains("enrolled") && said.contains(&path), "{said}");
    }
}

/// The keys of all maps that have some.
fn keys(lab: &Lab) -> Result<Vec<(String, Vec<Vec<u8>>)>> {
    bpf::maps_of(lab)?
        .into_iter()
        .filter(|(_, map)| map.has_keys())
        .map(|(name, map)| {
            let mut keys = map.keys().with_context(|| format!("map {name}"))?;
            keys.sort();
            Ok((name, keys))
        })
        .collect()
}

#[test]
fn after_detach_and_unload_nothing_of_ours_is_left() {
    let mesh = Mesh::new("nothing").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    let before = picture::settled(&mesh.lab, &[&pod, &outside]).unwrap();
    mesh.enrol(&pod, &["--exclude-outbound-port", "9"]).unwrap();
    let ids = bpf::map_ids(&mesh.lab).unwrap();
    assert!(ids.len() > 10, "{ids:?}");
    assert!(!bpf::programs_using(&ids).unwrap().is_empty());
    for (_, server) in servers(&outside, 8080).unwrap() {
        assert_eq!(mesh.via(&pod, &pod, &server).unwrap().0, Via::Outbound);
    }
    let said = verb(&mesh.lab, "detach", &pod, &["--wait", "20"]).unwrap();
    assert_eq!(said["result"], "detached", "{said}");
    mesh.lab.culvert(&["unload"]).unwrap().ok().unwrap();
    picture::same(
        &before,
        &picture::all(&mesh.lab, &[&pod, &outside]).unwrap(),
    )
    .unwrap();
    // ztunnel's sockets do not keep anything either; the kernel frees programs and maps a moment later.
    eventually("programs are freed", || {
        Ok(bpf::programs_using(&ids)?.is_empty())
    })
    .unwrap();
    eventually("maps are freed", || {
        for id in &ids {
            if bpf::map_exists(*id)? {
                return Ok(false);
            }
        }
        Ok(true)
    })
    .unwrap();
    // And unloading again finds nothing.
    mesh.lab.culvert(&["unload"]).unwrap().ok().unwrap();
}

#[test]
fn five_hundred_pods_come_and_go_and_leave_nothing() {
    const PODS: usize = 500;
    const AT_ONCE: usize = 50;
    let lab = Lab::new("many").unwrap();
    lab.culvert(&["load"]).unwrap().ok().unwrap();
    let ids = bpf::map_ids(&lab).unwrap();
    let clean = (
        lab.pins().unwrap(),
        keys(&lab).unwrap(),
        bpf::programs_using(&ids).unwrap(),
    );
    let mut gone = 0;
    for round in 0..PODS / AT_ONCE {
        let pods: Vec<Ns> = (0..AT_ONCE)
            .map(|n| {
                let name = format!("p{}", round * AT_ONCE + n);
                lab.pod_builder(&name).no_bridge().build().unwrap()
            })
            .collect();
        let paths: Vec<String> = pods
            .iter()
            .map(|p| p.path().display().to_string())
            .collect();
        let flags = |paths: &[String]| -> Vec<String> {
            paths
                .iter()
                .flat_map(|p| ["--netns".to_owned(), p.clone()])
                .collect()
        };
        let run = |verb: &str, paths: &[String], more: &[&str]| {
            let flags = flags(paths);
            let args: Vec<&str> = ["netns", verb]
                .into_iter()
                .chain(flags.iter().map(String::as_str))
                .chain(more.iter().copied())
                .collect();
            lab.culvert(&args).unwrap().ok().unwrap()
        };
        run(
            "attach",
            &paths,
            &[
                "--exclude-outbound-port",
                "80",
                "--exclude-outbound-cidr",
                "fd00::/8",
                "--exclude-inbound-port",
                "81",
            ],
        );
        assert!(lab.pins().unwrap().len() >= clean.0.len() + AT_ONCE);
        // Every second one is let go, the others die as they are.
        let (live, die): (Vec<_>, Vec<_>) = paths
            .iter()
            .cloned()
            .enumerate()
            .partition(|(n, _)| n % 2 == 0);
        let live: Vec<String> = live.into_iter().map(|(_, p)| p).collect();
        run("detach", &live, &[]);
        gone += die.len();
        for pod in pods {
            lab.delete(pod).unwrap();
        }
    }
    assert_eq!(gone, PODS / 2);
    let started = Instant::now();
    loop {
        // Any command that changes something collects; the kernel takes its time with dead namespaces.
        let nowhere = lab.culvert(&["netns", "detach", "--netns", "/run/netns/none-of-these"]);
        drop(nowhere);
        let now = (
            lab.pins().unwrap(),
            keys(&lab).unwrap(),
            bpf::programs_using(&ids).unwrap(),
        );
        if now == clean {
            break;
        }
        assert!(
            started.elapsed() < Duration::from_secs(60),
            "left behind: {} pins, {} programs, entries {:?}",
            now.0.len() - clean.0.len(),
            now.2.len() - clean.2.len(),
            now.1
                .iter()
                .map(|(name, keys)| (name, keys.len()))
                .collect::<Vec<_>>()
        );
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Makes the next `load` believe that what is loaded comes from another object.
fn age_programs(lab: &Lab) -> Result<()> {
    let config = bpf::Map::pinned(&lab.bpffs().join("maps/CONFIG"))?;
    let key = 0_u32.to_ne_bytes();
    let mut value = config.get(&key)?;
    // The object's number is the last field.
    let at = value.len() - 8;
    value[at..].fill(0);
    config.set(&key, &value)
}

#[test]
fn programs_replaced_under_load_lose_no_connection() {
    const REPLACEMENTS: usize = 10;
    const CONNECTIONS: usize = 3000;
    let mesh = Mesh::new("replace").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    mesh.enrol(&pod, &["--probe-source", "none", "--hold", "0"])
        .unwrap();
    let far = servers(&outside, 8080).unwrap();
    let own = servers(&pod, 8081).unwrap();
    let kinds: Vec<(&Ns, SocketAddr)> = far
        .iter()
        .map(|(_, s)| (&pod, s.addr()))
        .chain(own.iter().map(|(_, s)| (&outside, s.addr())))
        .chain(own.iter().map(|(_, s)| (&pod, s.addr())))
        .collect();
    let before = mesh.ztunnel.pod_stats("a").unwrap();
    let stop = AtomicBool::new(false);
    let done: Vec<AtomicUsize> = kinds.iter().map(|_| AtomicUsize::new(0)).collect();
    let errors = Mutex::new(Vec::new());
    let total = || -> usize { done.iter().map(|d| d.load(Ordering::SeqCst)).sum() };
    let started = Instant::now();
    let replaced = std::thread::scope(|scope| -> Result<usize> {
        for ((from, to), done) in kinds.iter().zip(&done) {
            let (stop, errors) = (&stop, &errors);
            scope.spawn(move || {
                from.run(|| {
                    while !stop.load(Ordering::SeqCst) {
                        let one = || -> Result<()> {
                            let stream = TcpStream::connect_timeout(to, LONG)?;
                            stream.set_read_timeout(Some(LONG))?;
                            roundtrip(&stream, b"1")?;
                            Ok(())
                        };
                        match one() {
                            Ok(()) => drop(done.fetch_add(1, Ordering::SeqCst)),
                            Err(error) => errors
                                .lock()
                                .unwrap_or_else(std::sync::PoisonError::into_inner)
                                .push(format!("{} to {to}: {error:?}", from.name())),
                        }
                    }
                });
            });
        }
        let replace = || -> Result<usize> {
            let mut replaced = 0;
            while replaced < REPLACEMENTS || total() < CONNECTIONS {
                let seen = total();
                age_programs(&mesh.lab)?;
                let report = mesh.lab.culvert(&["-o", "json", "load"])?.ok()?.json()?;
                let programs = report["programs"].as_array().context("no programs")?;
                let new = programs
                    .iter()
                    .filter(|p| p["action"] == "replaced")
                    .count();
                ensure!(new >= 3, "not replaced: {report}");
                replaced += 1;
                ensure!(started.elapsed() < Duration::from_secs(60), "too slow");
                eventually("connections go on", || Ok(total() > seen + kinds.len()))?;
            }
            Ok(replaced)
        };
        let result = replace();
        stop.store(true, Ordering::SeqCst);
        result
    });
    let took = started.elapsed();
    let errors = errors.into_inner().unwrap();
    assert!(
        errors.is_empty(),
        "{} of {} lost, first {:?}",
        errors.len(),
        total() + errors.len(),
        errors.first()
    );
    println!(
        "{} connections in {took:?} ({:.0} a second) while programs were replaced {} times",
        total(),
        total() as f64 / took.as_secs_f64(),
        replaced.unwrap()
    );
    // Not one went past ztunnel either.
    let after = mesh.ztunnel.pod_stats("a").unwrap();
    let count = |n: usize| done[n].load(Ordering::SeqCst) as u64;
    for (name, expected) in [
        ("outbound_accepts", count(0) + count(1)),
        ("inbound_accepts", count(2) + count(3)),
    ] {
        let grown = after[name].as_u64().unwrap() - before[name].as_u64().unwrap();
        assert_eq!(grown, expected, "{name}");
    }
    assert_eq!(mesh.show(&pod).unwrap()["whole"], true);
}
