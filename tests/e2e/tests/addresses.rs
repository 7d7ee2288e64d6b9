//! Addresses that come, go and move while a pod is enrolled, with somebody watching and with nobody.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;
use culvert_e2e::{
    LONG, Mesh, eventually,
    traffic::{Via, talk},
};
use culvert_lab::{Capture, Connect, Family, Ns, Server, connect, roundtrip};

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
