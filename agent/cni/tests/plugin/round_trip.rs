//! Whatever the plugins before us have said comes out as it went in: to the byte, whoever wrote it.

use culvert_cni::{config, environment};
use proptest::prelude::*;

use crate::common::Place;

/// JSON as text, so that its spelling is part of what is tested.
fn json() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        Just("null".to_owned()),
        any::<bool>().prop_map(|b| b.to_string()),
        "-?(0|[1-9][0-9]{0,25})(\\.[0-9]{1,9})?([eE][-+]?[0-9]{1,3})?",
        string(),
    ];
    leaf.prop_recursive(4, 40, 5, |inner| {
        prop_oneof![
            (prop::collection::vec(inner.clone(), 0..5), space()).prop_map(
                |(items, space)| format!("[{space}{}{space}]", items.join(&format!("{space},")))
            ),
            object(inner),
        ]
    })
}

fn object(inner: impl Strategy<Value = String> + 'static) -> impl Strategy<Value = String> {
    (prop::collection::vec((string(), inner), 0..5), space()).prop_map(|(pairs, space)| {
        let pairs: Vec<_> = pairs
            .iter()
            .map(|(key, value)| format!("{key}{space}:{space}{value}"))
            .collect();
        format!("{{{space}{}{space}}}", pairs.join(&format!(",{space}")))
    })
}

fn string() -> impl Strategy<Value = String> {
    prop_oneof![
        any::<String>().prop_map(|text| serde_json::to_string(&text).unwrap()),
        Just(r#""\u00e9\/\ud83d\ude00\b""#.to_owned()),
        "\"[a-z/.]{0,12}\"",
    ]
}

fn space() -> impl Strategy<Value = &'static str> {
    prop_oneof![Just(""), Just(" "), Just("\n\t")]
}

fn stdin(previous: &str) -> String {
    format!(
        r#"{{"cniVersion":"1.0.0","name":"n","logFile":"","type":"culvert-cni","prevResult": {previous} }}"#
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn a_result_is_kept_to_the_byte(previous in object(json())) {
        let config = config::parse(stdin(&previous).as_bytes()).unwrap();
        prop_assert_eq!(config.result(), previous);
        // It may not be a result at all; that is said, not fallen over.
        let _addresses = config.addresses();
    }

    #[test]
    fn no_configuration_makes_it_panic(content in prop::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(config::parse(&content).is_err());
        let _version = config::version(&content);
    }

    #[test]
    fn no_arguments_make_it_panic(text in "(K8S_POD_NAME|K8S_POD_NAMESPACE|K8S_POD_UID|[A-Z_;=]{0,3}|=|;|[a-z0-9.-]{0,8}|\\PC){0,12}") {
        if let Ok(Some(pod)) = environment::pod(&text) {
            prop_assert!(!pod.namespace.is_empty() && !pod.name.is_empty());
            prop_assert!(!pod.to_string().contains(';'));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn through_the_real_plugin_too(previous in object(json())) {
        let place = Place::new("round-trip");
        let outcome = place.call("ADD").unset("CNI_ARGS").stdin(stdin(&previous)).run();
        prop_assert_eq!(outcome.stdout, previous + "\n");
    }
}
