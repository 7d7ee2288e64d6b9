//! The log: what is noted where, how large the file grows, and that nothing about it fails a call.

use std::{fs, os::unix::fs::PermissionsExt as _, thread};

use serde_json::json;

use crate::common::{Agent, Place, Say, config, config_with};

#[test]
fn each_call_is_a_line_with_the_pod() {
    let place = Place::new("log");
    let agent = Agent::good(&place);
    place.call("ADD").config(&config("1.0.0")).run().succeeded();
    place.call("DEL").config(&config("1.0.0")).run().succeeded();
    place
        .call("STATUS")
        .config(&config("1.1.0"))
        .run()
        .succeeded();
    let log = place.log();
    assert_eq!(
        log.len(),
        2,
        "STATUS is asked too often to be noted: {log:?}"
    );
    assert_eq!(log[0]["command"], "ADD");
    assert_eq!(log[0]["level"], "info");
    assert_eq!(log[0]["message"], "enrolled: label");
    assert_eq!(
        log[0]["pod"],
        json!({"namespace": "shop", "name": "cart-0", "uid": "4f1c-22"})
    );
    assert_eq!(log[1]["command"], "DEL");
    let mode = fs::metadata(place.path("cni.log"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    let told = agent
        .seen()
        .iter()
        .filter(|request| request.line.ends_with("/log"))
        .count();
    assert_eq!(told, 0, "the agent knows what it has done itself");
}

#[test]
fn a_full_file_is_moved_aside_once() {
    let place = Place::new("log-full");
    let agent = Agent::good(&place);
    let filler = format!("{{\"x\":\"{}\"}}\n", "y".repeat(1 << 20));
    fs::write(place.path("cni.log"), &filler).unwrap();
    thread::scope(|scope| {
        for _ in 0..8 {
            let call = place.call("ADD").config(&config("1.0.0"));
            scope.spawn(move || call.run().succeeded().to_owned());
        }
    });
    assert!(
        fs::read_to_string(place.path("cni.log.1"))
            .unwrap()
            .starts_with(&filler)
    );
    let older = fs::read_to_string(place.path("cni.log.1"))
        .unwrap()
        .lines()
        .count()
        - 1;
    assert_eq!(older + place.log().len(), 8, "no line is lost");
    assert!(fs::metadata(place.path("cni.log")).unwrap().len() < 1 << 20);
    drop(agent);
}

#[test]
fn a_log_that_cannot_be_written_fails_nothing() {
    let place = Place::new("log-bad");
    let agent = Agent::good(&place);
    fs::create_dir(place.path("dir")).unwrap();
    for file in [
        "",
        "dir",
        "/dev/full",
        "/proc/nowhere/x.log",
        "no/such/dir/x.log",
    ] {
        let config = config_with("1.0.0", "logFile", file.into());
        place.call("ADD").config(&config).run().succeeded();
    }
    assert_eq!(agent.seen().len(), 5);
}

#[test]
fn an_agent_that_does_not_take_the_record_fails_nothing() {
    let place = Place::new("log-refused");
    let agent = Agent::start(&place, |request, before| {
        match (request.line.as_str(), before) {
            ("POST /v1/cni/add", 0) => Say::Close,
            ("POST /v1/cni/add", _) => Say::Json(200, json!({"enrolled": true, "reason": ""})),
            _ => Say::Nothing,
        }
    });
    place.call("ADD").config(&config("1.0.0")).run().succeeded();
    assert_eq!(agent.seen().len(), 3);
}
