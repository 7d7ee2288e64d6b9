//! What can be seen of lookups: a record of each decision for who watches, counters by pod, transport, family and
//! verdict, and where the programs are attached.

use std::collections::BTreeMap;

use culvert_e2e::dns::{ask, bound, question};
use culvert_e2e::eventually;
use culvert_lab::{Family, Ns};
use serde_json::Value;

use crate::{Stage, nobody};

/// All that is counted of a pod's lookups, and is not zero.
fn counted(stage: &Stage, pod: &Ns) -> BTreeMap<String, u64> {
    let shown = stage.mesh.show(pod).unwrap();
    let counters = shown["counters"].as_object().unwrap();
    counters
        .iter()
        .filter(|(name, _)| name.contains("dns"))
        .map(|(name, count)| (name.clone(), count.as_u64().unwrap()))
        .filter(|(_, count)| *count > 0)
        .collect()
}

#[test]
fn every_lookup_is_counted_and_shown_to_who_watches() {
    let stage = Stage::captured("dns-seen").unwrap();
    let other = stage.mesh.lab.pod("b").unwrap();
    stage.mesh.enrol(&other, &["--dns"]).unwrap();
    stage.mesh.expect_listeners(&other, 5).unwrap();
    let watcher = stage
        .mesh
        .lab
        .culvert_spawn(&["-o", "json", "events"])
        .unwrap();
    let seen = |pod: &Ns, port: u16, verdict: &str| -> Option<Value> {
        let (cookie, said) = (pod.cookie(), watcher.stdout());
        said.lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .find(|e| e["cookie"] == cookie && e["source_port"] == port && e["verdict"] == verdict)
    };
    for family in Family::BOTH {
        let resolver = nobody(family);
        let asks = |pod: &Ns| {
            pod.run(|| {
                let socket = bound(resolver).unwrap();
                socket.send_to(&question(1, "mesh.test"), resolver).unwrap();
                socket.local_addr().unwrap().port()
            })
        };
        let verdict = match family {
            Family::V4 => "to_dns_udp4",
            Family::V6 => "to_dns_udp6",
        };
        for pod in [&stage.pod, &other] {
            // Only who watches is told: ask until the watcher is there.
            eventually("the watcher sees a lookup", || {
                let port = asks(pod);
                let mut event = None;
                let _seen = eventually_soon(|| {
                    event = seen(pod, port, verdict);
                    event.is_some()
                });
                let Some(event) = event else { return Ok(false) };
                assert_eq!(event["destination"], resolver.ip().to_string());
                assert_eq!(event["destination_port"], 53);
                Ok(true)
            })
            .unwrap();
        }
    }
    watcher.kill().unwrap();
    // Each pod's own, by transport, family and verdict.
    let before = [&stage.pod, &other].map(|pod| counted(&stage, pod));
    for family in Family::BOTH {
        ask(&stage.pod, stage.resolver(family), "mesh.test").unwrap();
        ask(&stage.pod, stage.resolver(family), "else.test").unwrap();
    }
    let [mut grown, still] = [&stage.pod, &other].map(|pod| counted(&stage, pod));
    assert_eq!(still, before[1]);
    for (name, count) in &before[0] {
        *grown.get_mut(name).unwrap() -= count;
    }
    grown.retain(|_, count| *count > 0);
    let wanted = [
        ("to_dns_udp4", 2),
        ("to_dns_udp6", 2),
        ("dns_ztunnel_udp4", 2),
    ];
    assert_eq!(
        grown,
        wanted.map(|(name, count)| (name.to_owned(), count)).into()
    );
    // For people, where the programs are.
    let path = stage.pod.path().display().to_string();
    let show = ["netns", "show", "--netns", &path];
    let text = stage.mesh.lab.culvert(&show).unwrap().ok().unwrap();
    let place = stage.mesh.lab.cgroup().display().to_string();
    assert!(text.stdout.contains(&place), "{}", text.stdout);
}

/// Half a second's patience: the watcher may not be there yet.
fn eventually_soon(mut holds: impl FnMut() -> bool) -> bool {
    for _ in 0..10 {
        if holds() {
            return true;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    false
}
