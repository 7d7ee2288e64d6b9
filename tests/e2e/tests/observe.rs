//! What can be seen: decisions as events and counters.

use culvert_e2e::{LONG, Mesh, eventually};
use culvert_lab::{Family, Server, connect, roundtrip};

#[test]
fn every_decision_is_counted_and_shown_to_who_watches() {
    let mesh = Mesh::new("events").unwrap();
    let (pod, other) = (mesh.lab.pod("a").unwrap(), mesh.lab.pod("b").unwrap());
    let outside = mesh.lab.outside().unwrap();
    mesh.enrol(&pod, &[]).unwrap();
    mesh.enrol(&other, &[]).unwrap();
    let path = pod.path().display().to_string();
    for family in Family::BOTH {
        let server = Server::echo(&outside, outside.at(family, 8080).unwrap()).unwrap();
        let watcher = mesh
            .lab
            .culvert_spawn(&["-o", "json", "events", "--netns", &path])
            .unwrap();
        // Only who watches is told: connect until the watcher is there.
        let mut client = 0;
        eventually("the watcher sees a connection", || {
            let stream = connect(&pod, server.addr(), LONG)?;
            client = stream.local_addr()?.port();
            roundtrip(&stream, b"x")?;
            roundtrip(&connect(&other, server.addr(), LONG)?, b"x")?;
            Ok(watcher
                .stdout()
                .contains(&format!("\"source_port\":{client}")))
        })
        .unwrap();
        eventually("both halves of it are there", || {
            Ok(watcher.stdout().contains("to_outbound"))
        })
        .unwrap();
        watcher.kill().unwrap();
        let cookie = pod.cookie();
        let events: Vec<serde_json::Value> = watcher
            .stdout()
            .lines()
            .filter_map(|l| serde_json::from_str(l).ok())
            .filter(|e: &serde_json::Value| e["source_port"] == client)
            .collect();
        let verdicts: Vec<&str> = events
            .iter()
            .filter_map(|e| e["verdict"].as_str())
            .collect();
        assert!(
            verdicts.contains(&"captured") && verdicts.contains(&"to_outbound"),
            "{events:?}"
        );
        for event in &events {
            assert_eq!(event["cookie"], cookie, "only the pod that was asked for");
            assert_eq!(event["direction"], "outbound");
            assert_eq!(event["source"], pod.ip(family).unwrap().to_string());
            assert_eq!(event["destination"], server.addr().ip().to_string());
            assert_eq!(event["destination_port"], 8080);
        }
    }
    assert_eq!(
        mesh.counter(&pod, "captured").unwrap(),
        mesh.counter(&pod, "to_outbound").unwrap(),
        "each captured connection was handed to ztunnel"
    );
}
