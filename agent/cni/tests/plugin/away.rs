//! An agent that is absent, slow, dying or not an agent: the plugin asks again within its budget, and lets nobody of the
//! mesh start.

use std::{fs, os::unix::net::UnixListener, thread, time::Duration};

use serde_json::{Value, json};

use crate::common::{Agent, Outcome, POD, Place, Say, config, config_with, eventually};

fn brief() -> Value {
    config_with("1.0.0", "budgetSeconds", 2.into())
}

fn add(place: &Place, namespace: &str, config: &Value) -> Outcome {
    let pod = POD.replace("shop", namespace);
    place.call("ADD").config(config).set("CNI_ARGS", &pod).run()
}

fn enrolled() -> Say {
    Say::Json(200, json!({"enrolled": true, "reason": "label"}))
}

#[test]
fn a_pod_of_the_mesh_waits_for_the_whole_budget_and_fails() {
    let place = Place::new("absent");
    place.decisions(60, |_| {});
    for namespace in ["shop", "lab", "newer-than-the-file"] {
        let outcome = add(&place, namespace, &brief());
        assert_eq!(outcome.error_code(), 11);
        assert!(outcome.stdout.contains(namespace), "{}", outcome.stdout);
        assert!(
            outcome.took >= Duration::from_millis(1600),
            "{:?}",
            outcome.took
        );
    }
}

#[test]
fn who_is_not_of_the_mesh_starts_at_once() {
    let place = Place::new("absent-plain");
    place.decisions(60, |_| {});
    for namespace in ["plain", "kube-system"] {
        let outcome = add(&place, namespace, &config("1.0.0"));
        outcome.succeeded();
        assert!(outcome.took < Duration::from_secs(10), "{:?}", outcome.took);
    }
    let levels: Vec<_> = place
        .log()
        .iter()
        .map(|line| line["level"].clone())
        .collect();
    assert_eq!(
        levels,
        ["warn", "warn"],
        "it is noted that nobody was asked"
    );
}

#[test]
fn strict_lets_all_but_excluded_namespaces_wait() {
    let place = Place::new("strict");
    place.decisions(60, |file| file["excluded"] = json!(["elsewhere"]));
    let mut strict = brief();
    strict["agentAway"] = "strict".into();
    add(&place, "kube-system", &strict).succeeded();
    for namespace in ["plain", "elsewhere"] {
        let outcome = add(&place, namespace, &strict);
        assert_eq!(outcome.error_code(), 11);
        assert!(outcome.stdout.contains("strict"), "{}", outcome.stdout);
    }
}

#[test]
fn an_agent_that_comes_back_is_found() {
    let place = Place::new("back");
    let (outcome, agent) = thread::scope(|scope| {
        let call = place.call("ADD").config(&config("1.0.0"));
        let asking = scope.spawn(move || call.run());
        thread::sleep(Duration::from_millis(700));
        let agent = Agent::good(&place);
        (asking.join().unwrap(), agent)
    });
    outcome.succeeded();
    assert!(outcome.took < Duration::from_secs(15), "{:?}", outcome.took);
    let lines: Vec<_> = agent
        .seen()
        .into_iter()
        .map(|request| request.line)
        .collect();
    assert_eq!(
        lines,
        ["POST /v1/cni/add", "POST /v1/cni/log"],
        "and told that it was missed"
    );
}

#[test]
fn an_agent_killed_in_the_middle_is_asked_again() {
    let place = Place::new("killed");
    let agent = Agent::start(&place, |_, before| match before {
        0 => Say::Close,
        1 => Say::Raw(b"HTTP/1.1 200 OK\r\ncontent-length: 40\r\n\r\n{\"enro".to_vec()),
        2 => Say::Raw(b"HTTP/1.1 200 OK\r\ncontent-le".to_vec()),
        _ => enrolled(),
    });
    add(&place, "shop", &config("1.0.0")).succeeded();
    assert_eq!(agent.seen().len(), 5);
}

#[test]
fn an_agent_that_knows_no_cluster_leaves_the_decision_to_the_file() {
    let place = Place::new("undecided");
    place.decisions(60, |_| {});
    let _agent = Agent::start(&place, |_, _| {
        Say::Json(
            503,
            json!({"code": 11, "message": "not listed yet", "retry": true, "undecided": true}),
        )
    });
    let outcome = add(&place, "plain", &config("1.0.0"));
    outcome.succeeded();
    assert!(outcome.took < Duration::from_secs(10), "{:?}", outcome.took);
    // One that may be of the mesh waits, as without an agent.
    let outcome = add(&place, "shop", &brief());
    assert_eq!(outcome.error_code(), 11);
    assert!(
        outcome.took >= Duration::from_millis(1600),
        "{:?}",
        outcome.took
    );
    let mut strict = brief();
    strict["agentAway"] = "strict".into();
    assert_eq!(add(&place, "plain", &strict).error_code(), 11);
}

#[test]
fn a_stale_socket_is_no_agent() {
    let place = Place::new("stale");
    drop(UnixListener::bind(place.path("agent.sock")).unwrap());
    let outcome = add(&place, "shop", &brief());
    assert_eq!(outcome.error_code(), 11);
    fs::remove_file(place.path("agent.sock")).unwrap();
    fs::write(place.path("agent.sock"), "a file").unwrap();
    assert_eq!(add(&place, "shop", &brief()).error_code(), 11);
}

#[test]
fn a_refusal_that_may_pass_is_tried_again_and_one_that_will_not_is_not() {
    let place = Place::new("refusals");
    let not_yet = || {
        Say::Json(
            503,
            json!({"code": 11, "message": "ztunnel is not connected", "cure": "look at ztunnel", "retry": true}),
        )
    };
    let agent = Agent::start(
        &place,
        move |_, before| if before < 3 { not_yet() } else { enrolled() },
    );
    add(&place, "shop", &config("1.0.0")).succeeded();
    assert_eq!(agent.seen().len(), 5);
    drop(agent);
    let agent = Agent::start(&place, move |_, _| not_yet());
    // Its word counts, not the file's, while it is there.
    place.decisions(60, |_| {});
    let outcome = add(&place, "plain", &brief());
    assert_eq!(outcome.error_code(), 11);
    assert_eq!(outcome.error()["msg"], "ztunnel is not connected");
    assert!(agent.seen().len() > 3);
    drop(agent);
    let agent = Agent::start(&place, |_, _| {
        Say::Json(
            422,
            json!({"code": 100, "message": "no", "cure": "take it out", "retry": false}),
        )
    });
    assert_eq!(add(&place, "shop", &config("1.0.0")).error_code(), 100);
    let adds = agent
        .seen()
        .iter()
        .filter(|request| request.line.ends_with("/add"))
        .count();
    assert_eq!(adds, 1);
}

#[test]
fn a_slow_agent_has_the_budget_and_no_more() {
    let place = Place::new("slow");
    place.decisions(60, |_| {});
    let agent = Agent::start(&place, |_, _| Say::Nothing);
    let outcome = add(&place, "shop", &brief());
    assert_eq!(outcome.error_code(), 11);
    assert!(outcome.stdout.contains("in time"), "{}", outcome.stdout);
    assert!(
        outcome.took >= Duration::from_millis(1900),
        "{:?}",
        outcome.took
    );
    assert!(outcome.took < Duration::from_secs(12), "{:?}", outcome.took);
    // One that hangs may know of a label that its file does not: but not for ever.
    let outcome = add(&place, "plain", &brief());
    outcome.succeeded();
    assert!(
        outcome.took >= Duration::from_millis(1900),
        "{:?}",
        outcome.took
    );
    // An excluded namespace does not hang on it, whatever the budget.
    let outcome = add(&place, "kube-system", &config("1.0.0"));
    outcome.succeeded();
    assert!(outcome.took < Duration::from_secs(15), "{:?}", outcome.took);
    eventually("it saw them all go", || agent.hung_up() >= 3);
}

#[test]
fn del_gc_and_status_do_not_fail_with_the_agent() {
    let place = Place::new("del-slow");
    let from_1_0 = config("1.0.0");
    let gc = config_with("1.1.0", "cni.dev/valid-attachments", json!([]));
    for say in [
        || Say::Nothing,
        || Say::Close,
        || Say::Raw(b"garbage\r\n\r\n".to_vec()),
    ] {
        let agent = Agent::start(&place, move |_, _| say());
        let calls = [("DEL", &from_1_0), ("GC", &gc), ("STATUS", &gc)];
        thread::scope(|scope| {
            for (command, config) in calls {
                let call = place.call(command).config(config);
                scope.spawn(move || {
                    let outcome = call.run();
                    assert_eq!(outcome.succeeded(), "");
                    assert!(
                        outcome.took < Duration::from_secs(20),
                        "{command} {:?}",
                        outcome.took
                    );
                });
            }
        });
        assert!(!agent.seen().is_empty());
    }
}

#[test]
fn what_makes_no_sense_lets_nobody_start() {
    let place = Place::new("garbage");
    let head = |rest: &str| format!("HTTP/1.1 200 OK\r\n{rest}").into_bytes();
    let mut endless = head("\r\n");
    endless.resize(3 << 20, b' ');
    let mut headers = head("");
    headers.extend(b"x: y\r\n".repeat(10_000));
    let answers: Vec<Vec<u8>> = vec![
        b"SSH-2.0-OpenSSH_9.2\r\n".to_vec(),
        b"\0\0\0\0\0\0\0\0\r\n\r\n".to_vec(),
        head("content-length: 2\r\n\r\n{}"),
        head("content-length: 4\r\n\r\ntrue"),
        head("content-length: -1\r\n\r\n{}"),
        head("content-length: 99999999999999999999\r\n\r\n{}"),
        head("content-length: 2\r\ncontent-length: 17\r\n\r\n{\"enrolled\":true}"),
        head("transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"),
        b"HTTP/1.1 204 No Content\r\n\r\n".to_vec(),
        b"HTTP/1.1 500 Oops\r\ncontent-length: 4\r\n\r\noops".to_vec(),
        b"HTTP/1.1 302 Found\r\nlocation: http://example.com\r\n\r\n".to_vec(),
        b"HTTP/1.1 200\r\n\r\n{\"enrolled\":\"yes\",\"reason\":\"\"}".to_vec(),
        endless,
        headers,
    ];
    thread::scope(|scope| {
        for (number, answer) in answers.into_iter().enumerate() {
            scope.spawn(move || {
                let place = Place::new(&format!("garbage-{number}"));
                let agent = Agent::start(&place, move |_, _| Say::Raw(answer.clone()));
                let outcome = add(
                    &place,
                    "shop",
                    &config_with("1.0.0", "budgetSeconds", 3.into()),
                );
                assert_eq!(outcome.error_code(), 11, "answer {number}");
                assert!(
                    outcome.stdout.contains("makes no sense"),
                    "answer {number}: {}",
                    outcome.stdout
                );
                assert!(agent.seen().len() > 1, "answer {number}");
            });
        }
    });
    drop(place);
}

#[test]
fn an_answer_a_byte_at_a_time_is_bounded_as_a_whole() {
    let place = Place::new("drip");
    let answer =
        b"HTTP/1.1 200 OK\r\ncontent-length: 34\r\n\r\n{\"enrolled\":true,\"reason\":\"label\"}"
            .to_vec();
    let slow = answer.clone();
    let agent = Agent::start(&place, move |_, _| {
        Say::Drip(slow.clone(), Duration::from_millis(200))
    });
    let outcome = add(&place, "shop", &brief());
    assert_eq!(outcome.error_code(), 11);
    assert!(outcome.took < Duration::from_secs(12), "{:?}", outcome.took);
    drop(agent);
    let _agent = Agent::start(&place, move |_, _| {
        Say::Drip(answer.clone(), Duration::from_millis(2))
    });
    add(&place, "shop", &config("1.0.0")).succeeded();
}

#[test]
fn a_listener_that_does_not_accept_is_bounded_too() {
    let place = Place::new("queue");
    let listener = UnixListener::bind(place.path("agent.sock")).unwrap();
    // Fills the queue: connecting would block from here on.
    let socket = place.path("agent.sock");
    let fillers: Vec<_> = (0..5000)
        .map_while(|_| {
            let filler =
                socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).unwrap();
            filler.set_nonblocking(true).unwrap();
            let address = socket2::SockAddr::unix(&socket).unwrap();
            filler.connect(&address).ok().map(|()| filler)
        })
        .collect();
    assert!(fillers.len() < 5000, "the queue does not fill");
    let outcome = add(&place, "shop", &brief());
    assert_eq!(outcome.error_code(), 11);
    assert!(outcome.took < Duration::from_secs(12), "{:?}", outcome.took);
    drop(listener);
}

#[test]
fn a_plugin_killed_in_the_middle_closes_its_connection() {
    let place = Place::new("plugin-killed");
    let agent = Agent::start(&place, |_, _| Say::Nothing);
    let mut plugin = place.call("ADD").config(&config("1.0.0")).spawn();
    eventually("the agent is asked", || agent.seen().len() == 1);
    assert_eq!(agent.hung_up(), 0);
    plugin.kill().unwrap();
    assert_eq!(plugin.wait().unwrap().code(), None);
    eventually("the agent notices", || agent.hung_up() == 1);
}

#[test]
fn the_namespace_can_be_opened_by_its_name_while_the_plugin_waits() {
    use std::os::unix::fs::MetadataExt as _;
    let place = Place::new("netns");
    let ours = fs::metadata("/proc/self/ns/net").unwrap().ino();
    let agent = Agent::start(&place, move |request, _| {
        match request.body["netns"].as_str() {
            Some(path) => {
                let same = fs::metadata(path).is_ok_and(|data| data.ino() == ours);
                Say::Json(200, json!({"enrolled": same, "reason": ""}))
            }
            None => Say::Close,
        }
    });
    add(&place, "shop", &config("1.0.0")).succeeded();
    assert_eq!(place.log()[0]["message"], "enrolled: ");
    drop(agent);
}
