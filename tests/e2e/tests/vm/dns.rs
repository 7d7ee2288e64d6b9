//! Lookups: answered by ztunnel under the resolver's address, and by the resolver while ztunnel is away.
#![expect(
    clippy::unwrap_used,
    reason = "test code: a step that fails is a test that fails"
)]

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use culvert_e2e::{
    Mesh,
    dns::{Resolver, ask, ask_connected, bound, question, receive},
};
use culvert_lab::{Family, Lab, Ns, Zds, Ztunnel, ZtunnelOptions};

const BY_ZTUNNEL: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const BY_RESOLVER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);

/// The mesh, its pod with capture on, and the resolvers of both families.
fn stage(name: &str) -> (Vec<Resolver>, Mesh, Ns) {
    let lab = Lab::new(name).unwrap();
    let outside = lab.outside().unwrap();
    let start = |ip: IpAddr| Resolver::start(&outside, ip, BY_RESOLVER).unwrap();
    let resolvers: Vec<_> = Family::BOTH
        .into_iter()
        .map(|family| start(outside.ip(family).unwrap()))
        .collect();
    let zds = Zds::start(&lab).unwrap();
    let options = ZtunnelOptions::new()
        .arg("--dns-name")
        .arg(&format!("mesh.test={BY_ZTUNNEL}"))
        .arg("--dns-upstream")
        .arg(&resolvers[0].addr().to_string());
    let ztunnel = Ztunnel::start(&lab, &zds, &options).unwrap();
    let pod = lab.pod("a").unwrap();
    let mesh = Mesh { zds, ztunnel, lab };
    mesh.enrol(&pod, &["--dns"]).unwrap();
    mesh.expect_listeners(&pod, 5).unwrap();
    (resolvers, mesh, pod)
}

#[test]
fn dns_is_answered_by_ztunnel_under_the_resolvers_address() {
    let (resolvers, mesh, pod) = stage("vm-dns");
    for resolver in &resolvers {
        for asking in [ask, ask_connected] {
            let of = |name| asking(&pod, resolver.addr(), name).unwrap();
            assert_eq!(of("mesh.test"), BY_ZTUNNEL);
            assert_eq!(of("else.test"), BY_RESOLVER);
        }
    }
    // Each name of others was asked once: no loop.
    assert_eq!(mesh.stat(&pod, "dns_queries").unwrap(), 8);
    assert_eq!(resolvers[0].total(), 4);
    pod.run(|| {
        let socket = bound(resolvers[0].addr()).unwrap();
        let several: Vec<SocketAddr> = (1..=3_u8)
            .map(|n| SocketAddr::from(([10, 88, 0, 100 + n], 53)))
            .collect();
        for (id, to) in (0..).zip(&several) {
            socket.send_to(&question(id, "mesh.test"), to).unwrap();
        }
        for _ in &several {
            let (from, (id, _)) = receive(&socket).unwrap();
            assert_eq!(from, several[usize::from(id)]);
        }
    });
}

#[test]
fn dns_is_answered_by_the_resolver_while_ztunnel_is_away() {
    let (resolvers, mesh, pod) = stage("vm-dns-away");
    mesh.ztunnel.kill().unwrap();
    for resolver in &resolvers {
        for asking in [ask, ask_connected] {
            assert_eq!(
                asking(&pod, resolver.addr(), "mesh.test").unwrap(),
                BY_RESOLVER
            );
        }
    }
}
