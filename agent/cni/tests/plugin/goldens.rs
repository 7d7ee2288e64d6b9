//! What each command says in each version, word for word: a file for every command.

use std::fmt::Write as _;

use crate::common::{Agent, Call, POD, Place, Say, config, config_with, golden, previous};
use serde_json::{Value, json};

const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// Runs one case and writes down what came of it, and what the agent was asked.
fn case(transcript: &mut String, title: &str, call: &Call, agent: Option<&Agent>) {
    let outcome = call.run();
    let code = outcome
        .code
        .map_or_else(|| "killed".to_owned(), |code| code.to_string());
    writeln!(transcript, "# {title}\nexit {code}").unwrap();
    if !outcome.stdout.is_empty() {
        writeln!(transcript, "{}", outcome.stdout.trim_end()).unwrap();
    }
    for mut request in agent.map(Agent::seen).unwrap_or_default() {
        if let Some(body) = request.body.as_object_mut() {
            for (key, name) in [
                ("netns", "/proc/PID/fd/N"),
                ("budget_ms", "LEFT"),
                ("time", "TIME"),
                ("took_us", "TOOK"),
            ] {
                if let Some(value) = body.get_mut(key) {
                    check_shape(key, value);
                    *value = name.into();
                }
            }
        }
        let body = if request.body.is_null() {
            String::new()
        } else {
            format!(" {}", request.body)
        };
        writeln!(transcript, "agent: {}{body}", request.line).unwrap();
    }
    transcript.push('\n');
}

/// What is different each time is replaced, but not unseen.
fn check_shape(key: &str, value: &Value) {
    let good = match key {
        "netns" => value.as_str().is_some_and(|path| {
            let rest = path
                .strip_prefix("/proc/")
                .and_then(|rest| rest.split_once("/fd/"));
            rest.is_some_and(|(pid, fd)| pid.parse::<u32>().is_ok() && fd.parse::<u32>().is_ok())
        }),
        "budget_ms" => value
            .as_u64()
            .is_some_and(|left| (20_000..=25_000).contains(&left)),
        "time" => value
            .as_str()
            .is_some_and(|time| time.ends_with('Z') && time.len() == 24),
        _ => value.is_u64(),
    };
    assert!(good, "{key}: {value}");
}

#[test]
fn version() {
    let place = Place::new("golden-version");
    let mut transcript = String::new();
    for version in VERSIONS {
        let call = place
            .call("VERSION")
            .config(&json!({"cniVersion": version}));
        case(&mut transcript, &format!("VERSION {version}"), &call, None);
    }
    for (title, stdin) in [
        ("of the future", r#"{"cniVersion":"9.0.0"}"#),
        ("without a configuration", ""),
    ] {
        let call = place.call("VERSION").stdin(stdin);
        case(&mut transcript, &format!("VERSION {title}"), &call, None);
    }
    golden("version.txt", &transcript);
}

#[test]
fn add() {
    let place = Place::new("golden-add");
    let mut transcript = String::new();
    for version in VERSIONS {
        let chained = config_with(version, "prevResult", previous(version));
        let agent = Agent::good(&place);
        case(
            &mut transcript,
            &format!("ADD {version}, in a chain, of the mesh"),
            &place.call("ADD").config(&chained),
            Some(&agent),
        );
        drop(agent);
        let agent = Agent::start(&place, |_, _| {
            Say::Json(200, json!({"enrolled": false, "reason": "no label"}))
        });
        case(
            &mut transcript,
            &format!("ADD {version}, alone, not of the mesh"),
            &place.call("ADD").config(&config(version)),
            Some(&agent),
        );
        drop(agent);
        let agent = Agent::start(&place, |_, _| {
            Say::Json(
                422,
                json!({"code": 100, "message": "runtime class gvisor has its own network stack", "cure": "take the pod out of the mesh", "retry": false}),
            )
        });
        case(
            &mut transcript,
            &format!("ADD {version}, refused"),
            &place.call("ADD").config(&chained),
            Some(&agent),
        );
    }
    let chained = config_with("1.0.0", "prevResult", previous("1.0.0"));
    let agent = Agent::good(&place);
    let call = place.call("ADD").config(&chained).unset("CNI_ARGS");
    case(&mut transcript, "ADD 1.0.0, no pod", &call, Some(&agent));
    drop(agent);
    let mut brief = chained.clone();
    brief
        .as_object_mut()
        .unwrap()
        .insert("budgetSeconds".into(), 1.into());
    case(
        &mut transcript,
        "ADD 1.0.0, no agent, nothing known",
        &place.call("ADD").config(&brief),
        None,
    );
    place.decisions(60, |_| {});
    case(
        &mut transcript,
        "ADD 1.0.0, no agent, of the mesh",
        &place.call("ADD").config(&brief),
        None,
    );
    let plain = POD.replace("shop", "plain");
    case(
        &mut transcript,
        "ADD 1.0.0, no agent, not of the mesh",
        &place.call("ADD").config(&brief).set("CNI_ARGS", &plain),
        None,
    );
    golden("add.txt", &transcript);
}

#[test]
fn del() {
    let place = Place::new("golden-del");
    let mut transcript = String::new();
    for version in VERSIONS {
        let chained = config_with(version, "prevResult", previous(version));
        let agent = Agent::good(&place);
        case(
            &mut transcript,
            &format!("DEL {version}"),
            &place.call("DEL").config(&chained),
            Some(&agent),
        );
        drop(agent);
        let call = place
            .call("DEL")
            .config(&chained)
            .unset("CNI_NETNS")
            .unset("CNI_ARGS");
        case(
            &mut transcript,
            &format!("DEL {version}, no agent, namespace gone"),
            &call,
            None,
        );
    }
    let agent = Agent::start(&place, |_, _| {
        Say::Json(
            503,
            json!({"code": 11, "message": "not listed yet", "cure": "wait", "retry": true}),
        )
    });
    case(
        &mut transcript,
        "DEL 1.0.0, refused",
        &place.call("DEL").config(&config("1.0.0")),
        Some(&agent),
    );
    golden("del.txt", &transcript);
}

#[test]
fn check() {
    let place = Place::new("golden-check");
    let mut transcript = String::new();
    for version in VERSIONS {
        let chained = config_with(version, "prevResult", previous(version));
        let agent = Agent::good(&place);
        case(
            &mut transcript,
            &format!("CHECK {version}"),
            &place.call("CHECK").config(&chained),
            Some(&agent),
        );
        drop(agent);
        let agent = Agent::start(&place, |_, _| {
            Say::Json(
                200,
                json!({"enrolled": true, "problem": "the rule for 0x111 is missing"}),
            )
        });
        case(
            &mut transcript,
            &format!("CHECK {version}, a rule is missing"),
            &place.call("CHECK").config(&chained),
            Some(&agent),
        );
    }
    let brief = config_with("1.0.0", "budgetSeconds", 1.into());
    case(
        &mut transcript,
        "CHECK 1.0.0, no agent",
        &place.call("CHECK").config(&brief),
        None,
    );
    golden("check.txt", &transcript);
}

#[test]
fn gc() {
    let place = Place::new("golden-gc");
    let mut transcript = String::new();
    let valid =
        json!([{"containerID": "c1", "ifname": "eth0"}, {"containerID": "c2", "ifname": "net1"}]);
    for version in VERSIONS {
        let agent = Agent::good(&place);
        let call = place.call("GC").config(&config_with(
            version,
            "cni.dev/valid-attachments",
            valid.clone(),
        ));
        case(
            &mut transcript,
            &format!("GC {version}"),
            &call,
            Some(&agent),
        );
    }
    let agent = Agent::good(&place);
    let none = config_with("1.1.0", "cni.dev/valid-attachments", Value::Null);
    case(
        &mut transcript,
        "GC 1.1.0, nothing lives",
        &place.call("GC").config(&none),
        Some(&agent),
    );
    drop(agent);
    let agent = Agent::good(&place);
    case(
        &mut transcript,
        "GC 1.1.0, no list",
        &place.call("GC").config(&config("1.1.0")),
        Some(&agent),
    );
    drop(agent);
    case(
        &mut transcript,
        "GC 1.1.0, no agent",
        &place.call("GC").config(&none),
        None,
    );
    golden("gc.txt", &transcript);
}

#[test]
fn status() {
    let place = Place::new("golden-status");
    let mut transcript = String::new();
    for version in VERSIONS {
        let agent = Agent::good(&place);
        case(
            &mut transcript,
            &format!("STATUS {version}"),
            &place.call("STATUS").config(&config(version)),
            Some(&agent),
        );
    }
    let broken = || {
        Say::Json(
            200,
            json!({"version": "0.1.0", "broken": "the kernel has no sk_lookup"}),
        )
    };
    let agent = Agent::start(&place, move |_, _| broken());
    case(
        &mut transcript,
        "STATUS 1.1.0, broken",
        &place.call("STATUS").config(&config("1.1.0")),
        Some(&agent),
    );
    drop(agent);
    case(
        &mut transcript,
        "STATUS 1.1.0, no agent",
        &place.call("STATUS").config(&config("1.1.0")),
        None,
    );
    let agent = Agent::start(&place, |_, _| Say::Nothing);
    case(
        &mut transcript,
        "STATUS 1.1.0, an agent that hangs",
        &place.call("STATUS").config(&config("1.1.0")),
        Some(&agent),
    );
    golden("status.txt", &transcript);
}
