//! Bad input: always an error object with the specification's code and a cure, never a pod that starts open.

use std::time::Duration;

use serde_json::{Value, json};

use crate::common::{Agent, Place, config, config_with, previous};

#[test]
fn stdin_that_is_no_configuration() {
    let place = Place::new("stdin");
    let agent = Agent::good(&place);
    let deep = "[".repeat(100_000);
    let nested = format!(
        r#"{{"cniVersion":"1.0.0","prevResult":{}}}"#,
        r#"{"a":"#.repeat(5000)
    );
    let cases: [(&[u8], u64); 14] = [
        (b"", 6),
        (b" \n", 6),
        (b"not json", 6),
        (b"{\"cniVersion\":\"1.0.0\"", 6),
        (b"{\"cniVersion\":\"1.0.0\"} {}", 6),
        (b"\xff\xfe{}", 6),
        (
            b"{\"cniVersion\":\"1.0.0\",\"prevResult\":{\"a\":\"\xff\"}}",
            6,
        ),
        (deep.as_bytes(), 6),
        (nested.as_bytes(), 6),
        (b"[\"1.0.0\",\"n\",null,null]", 6),
        (b"null", 6),
        (b"{\"cniVersion\":1}", 7),
        (b"{\"cniVersion\":\"1.0.0\",\"prevResult\":[1]}", 7),
        (b"{\"cniVersion\":\"1.0.0\",\"cniVersion\":\"1.1.0\"}", 7),
    ];
    for (stdin, code) in cases {
        for command in ["ADD", "CHECK", "DEL", "GC", "STATUS"] {
            let outcome = place.call(command).stdin(stdin).run();
            let shown = String::from_utf8_lossy(stdin.get(..stdin.len().min(60)).unwrap());
            assert_eq!(outcome.error_code(), code, "{command} {shown}");
        }
    }
    assert!(agent.seen().is_empty());
}

#[test]
fn versions_that_we_do_not_speak() {
    let place = Place::new("versions");
    for version in ["0.1.0", "0.2.0", "1.0", "2.0.0", "", "1.0.0\n"] {
        let outcome = place.call("ADD").config(&config(version)).run();
        assert_eq!(outcome.error_code(), 1, "{version}");
        assert_eq!(outcome.error()["cniVersion"], "1.1.0");
    }
    // A configuration without one is of 0.1.0.
    let outcome = place.call("ADD").config(&json!({"name": "n"})).run();
    assert_eq!(outcome.error_code(), 1);
}

#[test]
fn stdin_without_end() {
    let place = Place::new("huge");
    let huge = config_with("1.0.0", "x", "y".repeat(2 << 20).into());
    let outcome = place.call("ADD").config(&huge).run();
    assert_eq!(outcome.error_code(), 6);
    assert!(outcome.stdout.contains("1048576"), "{}", outcome.stdout);
    // Just below the bound is taken.
    let large = config_with("1.0.0", "x", "y".repeat(1_000_000).into());
    let outcome = place.call("ADD").config(&large).unset("CNI_ARGS").run();
    assert_eq!(outcome.succeeded(), r#"{"cniVersion":"1.0.0"}"#);
}

#[test]
fn variables_that_are_missing_or_cannot_be_meant() {
    let place = Place::new("variables");
    let agent = Agent::good(&place);
    let config = config_with("1.0.0", "prevResult", previous("1.0.0"));
    let cases = [
        ("CNI_COMMAND", None),
        ("CNI_COMMAND", Some("add")),
        ("CNI_CONTAINERID", None),
        ("CNI_CONTAINERID", Some("")),
        ("CNI_CONTAINERID", Some("../x")),
        ("CNI_CONTAINERID", Some("-x")),
        ("CNI_IFNAME", None),
        ("CNI_IFNAME", Some("a/b")),
        ("CNI_IFNAME", Some("..")),
        ("CNI_IFNAME", Some("sixteen-bytes-xx")),
        ("CNI_NETNS", None),
        ("CNI_NETNS", Some("/no/such/namespace")),
        ("CNI_NETNS", Some("/")),
        ("CNI_NETNS", Some("/dev/null")),
    ];
    for (name, value) in cases {
        let call = place.call("ADD").config(&config);
        let call = match value {
            Some(value) => call.set(name, value),
            None => call.unset(name),
        };
        let outcome = call.run();
        assert_eq!(outcome.error_code(), 4, "{name}={value:?}");
        assert!(outcome.stdout.contains(name), "{}", outcome.stdout);
    }
    assert!(
        agent
            .seen()
            .iter()
            .all(|request| request.line.ends_with("/log"))
    );
}

#[test]
fn half_a_pod_does_not_start() {
    let place = Place::new("args");
    let agent = Agent::good(&place);
    for arguments in [
        "K8S_POD_NAME=a",
        "K8S_POD_NAMESPACE=a",
        "K8S_POD_UID=a",
        "K8S_POD_NAMESPACE=a;K8S_POD_NAME=",
        "K8S_POD_NAMESPACE=a;K8S_POD_NAME=b;K8S_POD_NAME=c",
        "K8S_POD_NAMESPACE=a;K8S_POD_NAME=B",
        "K8S_POD_NAMESPACE=../a;K8S_POD_NAME=b",
        "K8S_POD_NAMESPACE=a;nonsense",
        "IgnoreUnknown",
    ] {
        let call = place.call("ADD").config(&config("1.0.0"));
        let outcome = call.set("CNI_ARGS", arguments).run();
        assert_eq!(outcome.error_code(), 4, "{arguments}");
        // But a sandbox must go.
        let call = place.call("DEL").config(&config("1.0.0"));
        call.set("CNI_ARGS", arguments).run().succeeded();
    }
    for arguments in [
        "",
        "IgnoreUnknown=1",
        "FOO=BAR;IgnoreUnknown=1;",
        ";;",
        "FOO=a=b",
    ] {
        let call = place.call("ADD").config(&config("1.0.0"));
        call.set("CNI_ARGS", arguments).run().succeeded();
    }
    let asked = agent
        .seen()
        .iter()
        .filter(|request| request.line.ends_with("/add"))
        .count();
    assert_eq!(asked, 0, "none of these is a pod");
}

#[test]
fn a_pod_of_an_older_runtime_has_no_uid() {
    let place = Place::new("no-uid");
    let agent = Agent::good(&place);
    let call = place.call("ADD").config(&config("1.0.0"));
    let call = call.set(
        "CNI_ARGS",
        "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart-0;K8S_POD_UID=",
    );
    call.run().succeeded();
    let pod = &agent.seen()[0].body["pod"];
    assert_eq!(*pod, json!({"namespace": "shop", "name": "cart-0"}));
}

#[test]
fn keys_of_ours_that_cannot_be_meant() {
    let place = Place::new("keys");
    for (key, value) in [
        ("budgetSeconds", json!(0)),
        ("budgetSeconds", json!(-1)),
        ("budgetSeconds", json!(100_000)),
        ("budgetSeconds", json!("25")),
        ("agentAway", json!("open")),
        ("socket", json!(null)),
        ("excludedNamespaces", json!("kube-system")),
        ("decisionMaxAgeSeconds", json!(1.5)),
    ] {
        let outcome = place
            .call("ADD")
            .config(&config_with("1.0.0", key, value.clone()))
            .run();
        assert_eq!(outcome.error_code(), 7, "{key}: {value}");
    }
    // Those of others, and of the runtime, are none of our business.
    let foreign = config_with("1.0.0", "runtimeConfig", json!({"portMappings": []}));
    place
        .call("ADD")
        .config(&foreign)
        .unset("CNI_ARGS")
        .run()
        .succeeded();
}

#[test]
fn earlier_results_that_make_no_sense() {
    let place = Place::new("results");
    let agent = Agent::good(&place);
    for previous in [
        json!({"ips": [{"address": "nonsense"}]}),
        json!({"ips": [{"address": ""}]}),
        json!({"ips": [{}]}),
        json!({"ips": 5}),
        json!({"interfaces": {}, "ips": []}),
    ] {
        let config = config_with("1.0.0", "prevResult", previous.clone());
        let outcome = place.call("ADD").config(&config).run();
        assert_eq!(outcome.error_code(), 7, "{previous}");
        // For what is no pod we only hand it on.
        let outcome = place.call("ADD").config(&config).unset("CNI_ARGS").run();
        assert_eq!(outcome.succeeded(), previous.to_string());
    }
    for (previous, wanted) in [
        (json!({"ips": null, "interfaces": null}), json!([])),
        (
            json!({"ips": [{"address": "10.0.0.1"}]}),
            json!(["10.0.0.1"]),
        ),
        (
            json!({"ips": [{"address": "10.0.0.1/8", "interface": 7}]}),
            json!(["10.0.0.1"]),
        ),
        (
            json!({"ips": [{"address": "10.0.0.1/8", "interface": -1}, {"address": "10.0.0.1/8"}]}),
            json!(["10.0.0.1"]),
        ),
        (
            json!({"interfaces": [{"name": "x", "sandbox": ""}], "ips": [{"address": "10.0.0.1/8", "interface": 0}]}),
            json!([]),
        ),
    ] {
        let before = agent.seen().len();
        place
            .call("ADD")
            .config(&config_with("1.0.0", "prevResult", previous))
            .run()
            .succeeded();
        let asked = agent.seen().split_off(before);
        let adds: Vec<&Value> = asked
            .iter()
            .map(|request| &request.body["addresses"])
            .collect();
        assert_eq!(adds, [&wanted]);
    }
}

#[test]
fn version_does_not_wait_for_an_agent() {
    let place = Place::new("version-quick");
    let outcome = place.call("VERSION").config(&config("1.0.0")).run();
    assert!(outcome.took < Duration::from_secs(5));
    outcome.succeeded();
}
