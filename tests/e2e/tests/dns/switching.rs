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
