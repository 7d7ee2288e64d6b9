//! A pod's life under Culvert: enrolled and let go again and again, with connections open, a namespace that dies; and what
//! list and show say of it.

use std::collections::BTreeSet;
use std::net::TcpStream;

use anyhow::Result;
use culvert_e2e::{
    LONG, Mesh, bpf, eventually, picture,
    traffic::{Via, local_delivery_works, servers},
};
use culvert_lab::{Family, Lab, Ns, Rule, connect, roundtrip};
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
    let clean = (lab.pins().unwrap(), bpf::keys(&lab).unwrap());
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
    assert_eq!((lab.pins().unwrap(), bpf::keys(&lab).unwrap()), clean);
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
        fwmark: Some((0x111, 0xff5)),
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

#[test]
fn no_process_of_culvert_is_needed_for_traffic_to_go_on() {
    let mesh = Mesh::new("noprocess").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    mesh.enrol(&pod, &["--probe-source", "none"]).unwrap();
    let far = servers(&outside, 8080).unwrap();
    let own = servers(&pod, 8081).unwrap();
    let both_ways = || {
        for ((family, far), (_, own)) in far.iter().zip(&own) {
            assert_eq!(
                mesh.via(&pod, &pod, far).unwrap().0,
                Via::Outbound,
                "{family:?}"
            );
            assert_eq!(
                mesh.via(&pod, &outside, own).unwrap().0,
                Via::Inbound,
                "{family:?}"
            );
        }
    };
    both_ways();
    // The only ones that stay, and they go without a word.
    let watch = mesh.lab.culvert_spawn(&["netns", "watch"]).unwrap();
    watch.wait_for_output("watching 1 pods", LONG).unwrap();
    let events = mesh.lab.culvert_spawn(&["events"]).unwrap();
    both_ways();
    watch.kill().unwrap();
    events.kill().unwrap();
    both_ways();
    assert_eq!(mesh.show(&pod).unwrap()["whole"], true);
}
