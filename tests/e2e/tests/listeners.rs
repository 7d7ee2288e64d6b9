//! The application's listening sockets with options of its own, from before enrolment and from after it; and ztunnel's that
//! the kernel side lost sight of.

use anyhow::Result;
use culvert_e2e::traffic::talk_as;
use culvert_e2e::{Mesh, bpf, eventually};
use culvert_lab::{Family, Ns, Server};

const APP: u16 = 8080;

/// Listeners to which an application has given a mark.
fn marked_listeners(pod: &Ns) -> Result<Vec<Server>> {
    let mut servers = Vec::new();
    for (number, mark) in (0..).zip([0x42, 0xabc0_0000, 0xabc0_0042]) {
        for family in Family::BOTH {
            let at = pod.at(family, APP + number)?;
            servers.push(Server::builder(pod, at).mark(mark).start()?);
        }
    }
    Ok(servers)
}

#[test]
fn a_listener_with_a_mark_set_after_enrolment() {
    let (_mesh, pod, outside) = Mesh::one_pod("listener-mark").unwrap();
    for server in marked_listeners(&pod).unwrap() {
        let family = Family::of(server.addr().ip());
        for client in [&outside, &pod] {
            talk_as(client, &server, client.ip(family).unwrap())
                .unwrap_or_else(|e| panic!("{} from {}: {e:?}", server.addr(), client.name()));
        }
    }
}

/// What such a listener accepts would keep the listener's mark, and its answer to ztunnel would leave the pod: enrolling
/// takes the mark from it.
#[test]
fn a_listener_with_a_mark_from_before_enrolment() {
    let mesh = Mesh::new("listener-mark-early").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    let outside = mesh.lab.outside().unwrap();
    let servers = marked_listeners(&pod).unwrap();
    mesh.enrol(&pod, &["--probe-source", "none"]).unwrap();
    let before = mesh.stat(&pod, "inbound_accepts").unwrap();
    for server in &servers {
        let family = Family::of(server.addr().ip());
        for client in [&outside, &pod] {
            talk_as(client, server, client.ip(family).unwrap()).unwrap();
        }
    }
    let through = before + u64::try_from(servers.len()).unwrap();
    eventually("ztunnel delivered to each", || {
        Ok(mesh.stat(&pod, "inbound_accepts")? == through)
    })
    .unwrap();
}

/// A delivery comes by `lo`: bound before or after enrolment, the listener must not see its device alone.
#[test]
fn a_listener_bound_to_a_device() {
    for early in [true, false] {
        let mesh = Mesh::new("listener-device").unwrap();
        let pod = mesh.lab.pod("a").unwrap();
        let outside = mesh.lab.outside().unwrap();
        let servers = || {
            Family::BOTH.map(|family| {
                Server::builder(&pod, pod.at(family, APP).unwrap())
                    .device("eth0")
                    .start()
                    .unwrap()
            })
        };
        let bound_early = early.then(servers);
        mesh.enrol(&pod, &["--probe-source", "none"]).unwrap();
        for server in bound_early.unwrap_or_else(servers) {
            let family = Family::of(server.addr().ip());
            for client in [&outside, &pod] {
                talk_as(client, &server, client.ip(family).unwrap()).unwrap();
            }
        }
    }
}

/// Attaching again brings back all there are, for lookups as well, though the pod could be without those.
#[test]
fn ztunnels_listeners_that_are_not_registered_are_fetched() {
    let mesh = Mesh::new("listener-fetched").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    mesh.enrol(&pod, &["--dns"]).unwrap();
    mesh.expect_listeners(&pod, 5).unwrap();
    let roles = || -> Vec<String> {
        let shown = mesh.show(&pod).unwrap();
        let listeners = shown["listeners"].as_array().unwrap();
        let name = |l: &serde_json::Value| l["role"].as_str().unwrap().to_owned();
        listeners.iter().map(name).collect()
    };
    let all = ["outbound", "inbound", "hbone", "dns4", "dns6"];
    assert_eq!(roles(), all);
    let map = bpf::Map::pinned(&mesh.lab.bpffs().join("maps/LISTENERS")).unwrap();
    let role = |key: &[u8]| u32::from_ne_bytes(key[8..12].try_into().unwrap());
    let pid = mesh.ztunnel.pid().to_string();
    let again = ["--dns", "--ztunnel", &pid];
    // All of them, and each kind alone.
    for lost in [&[0, 1, 2, 3, 4][..], &[2], &[3, 4]] {
        for key in map.keys().unwrap() {
            if lost.contains(&role(&key)) {
                map.delete(&key).unwrap();
            }
        }
        assert_eq!(roles().len(), 5 - lost.len());
        mesh.lab.attach(&pod, &again).unwrap();
        assert_eq!(roles(), all, "{lost:?}");
    }
}
