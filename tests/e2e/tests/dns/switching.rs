//! On and off, for some resolvers or all, with and without ztunnel, and what a pod next door sees of it.

use culvert_e2e::{
    dns::{Resolver, ask, ask_connected, bound, question, receive},
    eventually,
};
use culvert_lab::{Family, Ztunnel};

use crate::{BY_OTHER, BY_RESOLVER, BY_ZTUNNEL, Stage, options};

#[test]
fn one_pod_with_and_one_without() {
    let stage = Stage::captured("dns-two").unwrap();
    let without = stage.mesh.lab.pod("b").unwrap();
    stage.mesh.enrol(&without, &[]).unwrap();
    let stranger = stage.mesh.lab.pod("c").unwrap();
    for family in Family::BOTH {
        let resolver = stage.resolver(family);
        for asking in [ask, ask_connected] {
            assert_eq!(
                asking(&stage.pod, resolver, "mesh.test").unwrap(),
                BY_ZTUNNEL
            );
            for pod in [&without, &stranger] {
                assert_eq!(asking(pod, resolver, "mesh.test").unwrap(), BY_RESOLVER);
            }
        }
    }
}

#[test]
fn switched_on_and_off_under_a_living_pod() {
    let stage = Stage::open("dns-live").unwrap();
    let resolver = stage.resolver(Family::V4);
    stage.enrol(&[]).unwrap();
    assert_eq!(ask(&stage.pod, resolver, "mesh.test").unwrap(), BY_RESOLVER);
    for _ in 0..2 {
        stage.enrol(&["--dns"]).unwrap();
        assert_eq!(ask(&stage.pod, resolver, "mesh.test").unwrap(), BY_ZTUNNEL);
        stage.enrol(&[]).unwrap();
        assert_eq!(ask(&stage.pod, resolver, "mesh.test").unwrap(), BY_RESOLVER);
    }
}

#[test]
fn a_ztunnel_that_is_named_later_goes_on_answering() {
    let stage = Stage::open("dns-later").unwrap();
    let pod = &stage.pod;
    let answers = || {
        Family::BOTH.map(|family| {
            [ask, ask_connected]
                .map(|asking| asking(pod, stage.resolver(family), "mesh.test").unwrap())
        })
    };
    // Told by its mark.
    stage.mesh.lab.attach(pod, &["--dns"]).unwrap();
    stage.mesh.zds.add_pod(pod).unwrap();
    stage.mesh.expect_listeners(pod, 5).unwrap();
    assert_eq!(answers(), [[BY_ZTUNNEL; 2]; 2]);
    // And by its process, when it has no reason to open a socket anew.
    let pid = stage.mesh.ztunnel.pid().to_string();
    let named = ["--dns", "--ztunnel", &pid];
    stage.mesh.lab.attach(pod, &named).unwrap();
    assert_eq!(answers(), [[BY_ZTUNNEL; 2]; 2]);
    // Its listeners are missed when they close, too.
    let away = || stage.mesh.show(pod).unwrap()["policy"]["ztunnel_away_seconds"].clone();
    assert_eq!(away(), serde_json::Value::Null);
    stage.mesh.ztunnel.kill().unwrap();
    eventually("its end is known", || Ok(away().is_u64())).unwrap();
}

#[test]
fn only_the_resolvers_that_are_named() {
    let stage = Stage::open("dns-named").unwrap();
    let v4 = stage.resolver(Family::V4);
    stage
        .enrol(&["--dns", "--dns-resolver", &v4.ip().to_string()])
        .unwrap();
    assert_eq!(ask(&stage.pod, v4, "mesh.test").unwrap(), BY_ZTUNNEL);
    let v6 = stage.resolver(Family::V6);
    assert_eq!(ask(&stage.pod, v6, "mesh.test").unwrap(), BY_RESOLVER);
    let gateway = stage.mesh.lab.node();
    let other = Resolver::start(gateway, gateway.ip(Family::V4).unwrap(), BY_OTHER).unwrap();
    assert_eq!(
        ask_connected(&stage.pod, other.addr(), "mesh.test").unwrap(),
        BY_OTHER
    );
    // Another list takes the place of the first.
    stage
        .enrol(&["--dns", "--dns-resolver", &v6.ip().to_string()])
        .unwrap();
    assert_eq!(ask(&stage.pod, v6, "mesh.test").unwrap(), BY_ZTUNNEL);
    assert_eq!(ask(&stage.pod, v4, "mesh.test").unwrap(), BY_RESOLVER);
}

#[test]
fn the_resolver_itself_answers_while_ztunnel_is_away() {
    let mut stage = Stage::captured("dns-away").unwrap();
    stage.mesh.ztunnel.kill().unwrap();
    for family in Family::BOTH {
        for asking in [ask, ask_connected] {
            let answer = asking(&stage.pod, stage.resolver(family), "mesh.test");
            assert_eq!(answer.unwrap(), BY_RESOLVER);
        }
    }
    assert_eq!(
        (stage.count("dns_away_udp4"), stage.count("dns_away_udp6")),
        (2, 2)
    );
    let upstream = stage.resolver(Family::V4);
    stage.mesh.ztunnel =
        Ztunnel::start(&stage.mesh.lab, &stage.mesh.zds, &options(upstream)).unwrap();
    stage.enrol(&["--dns"]).unwrap();
    eventually("ztunnel answers again", || {
        Ok(ask(&stage.pod, upstream, "mesh.test")? == BY_ZTUNNEL)
    })
    .unwrap();
}

#[test]
fn an_unconnected_socket_follows_every_change() {
    let stage = Stage::captured("dns-follows").unwrap();
    let resolver = stage.resolver(Family::V4);
    let socket = stage.pod.run(|| bound(resolver)).unwrap();
    let asks = || {
        socket.send_to(&question(1, "mesh.test"), resolver).unwrap();
        let (from, (_, answer)) = receive(&socket).unwrap();
        assert_eq!(from, resolver);
        answer
    };
    assert_eq!(asks(), BY_ZTUNNEL);
    stage.mesh.lab.detach(&stage.pod).unwrap();
    assert_eq!(asks(), BY_RESOLVER);
}

#[test]
fn sockets_that_were_redirected_are_not_left_behind() {
    let stage = Stage::open("dns-strays").unwrap();
    let connected = |family| {
        let resolver = stage.resolver(family);
        let socket = stage.pod.run(|| bound(resolver)).unwrap();
        socket.connect(resolver).unwrap();
        socket
    };
    let asks = |socket: &std::net::UdpSocket, family| {
        socket.send(&question(1, "mesh.test")).unwrap();
        let (from, (_, answer)) = receive(socket).unwrap();
        assert_eq!(from, stage.resolver(family));
        assert_eq!(socket.peer_addr().unwrap(), stage.resolver(family));
        answer
    };
    // From before enrolment, from under capture, and once more after that.
    let early = Family::BOTH.map(|family| (connected(family), family));
    stage.enrol(&["--dns"]).unwrap();
    for (socket, family) in &early {
        assert_eq!(asks(socket, *family), BY_RESOLVER);
    }
    let captured = Family::BOTH.map(|family| (connected(family), family));
    for (socket, family) in &captured {
        assert_eq!(asks(socket, *family), BY_ZTUNNEL);
    }
    stage.enrol(&[]).unwrap();
    for (socket, family) in &captured {
        assert_eq!(asks(socket, *family), BY_RESOLVER);
    }
    stage.enrol(&["--dns"]).unwrap();
    let again = Family::BOTH.map(|family| (connected(family), family));
    for (socket, family) in &again {
        assert_eq!(asks(socket, *family), BY_ZTUNNEL);
    }
    stage.mesh.lab.detach(&stage.pod).unwrap();
    stage.mesh.zds.del(stage.pod.name()).unwrap();
    for (socket, family) in early.iter().chain(&captured).chain(&again) {
        assert_eq!(asks(socket, *family), BY_RESOLVER);
    }
}

#[test]
fn pods_cgroup_is_found_and_others_that_run_first_are_told() {
    let stage = Stage::open("dns-cgroup").unwrap();
    let root = stage.mesh.lab.cgroup().to_owned();
    let kubepods = root.join("node1/kubepods");
    std::fs::create_dir_all(&kubepods).unwrap();
    for dir in [root.join("node1"), kubepods.clone()] {
        std::fs::write(dir.join("cgroup.type"), "threaded").unwrap();
    }
    let resolver = stage.resolver(Family::V4);
    let place = || stage.mesh.show(&stage.pod).unwrap()["dns"]["cgroup"].clone();
    // Nobody is in it: the processes of pods are at the root.
    stage.enrol(&["--dns"]).unwrap();
    assert_eq!(place(), root.to_str().unwrap());
    // A pod's process is in it: it is taken, and what is outside is not seen.
    let ask_inside = || {
        stage.pod.run(|| {
            let tid = nix::unistd::gettid().to_string();
            std::fs::write(kubepods.join("cgroup.threads"), tid).unwrap();
            let load = || {
                stage
                    .mesh
                    .lab
                    .culvert(&["-o", "json", "load"])
                    .unwrap()
                    .ok()
                    .unwrap()
            };
            let report = load().json().unwrap();
            assert_eq!(report["dns"]["found"], "kubepods", "{report}");
            assert_eq!(report["dns"]["cgroup"], kubepods.to_str().unwrap());
            assert_eq!(report["dns"]["ahead"], serde_json::json!([]));
            let answer = culvert_e2e::dns::ask_here(resolver, "mesh.test").unwrap();
            std::fs::write(
                root.join("cgroup.threads"),
                nix::unistd::gettid().to_string(),
            )
            .unwrap();
            answer
        })
    };
    assert_eq!(ask_inside(), BY_ZTUNNEL);
    assert_eq!(place(), kubepods.to_str().unwrap());
    assert_eq!(ask(&stage.pod, resolver, "mesh.test").unwrap(), BY_RESOLVER);
    // Named by hand.
    let named = root.to_str().unwrap();
    let load = ["--dns-cgroup", named, "-o", "json", "load"];
    let report = stage
        .mesh
        .lab
        .culvert(&load)
        .unwrap()
        .ok()
        .unwrap()
        .json()
        .unwrap();
    assert_eq!(report["dns"]["found"], "named", "{report}");
    assert_eq!(ask(&stage.pod, resolver, "mesh.test").unwrap(), BY_ZTUNNEL);
    for dir in [&kubepods, &root.join("node1")] {
        std::fs::remove_dir(dir).unwrap();
    }
}
