//! Selectors and other settings.

use super::*;

#[test]
fn selectors_are_read_as_istio_cni_writes_them() {
    let default = "- podSelector:\n    matchLabels:\n      istio.io/dataplane-mode: ambient\n\
                   - namespaceSelector:\n    matchLabels:\n      istio.io/dataplane-mode: ambient\n  podSelector:\n    \
                   matchExpressions:\n    - key: istio.io/dataplane-mode\n      operator: NotIn\n      values:\n      - none";
    assert_eq!(parse_selectors(default).unwrap(), default_selectors());
    assert_eq!(parse_selectors("").unwrap(), []);
    let anyone = parse_selectors("[{namespaceSelector: {matchLabels: {mesh: 'on'}}}]").unwrap();
    let settings = Settings {
        selectors: anyone,
        ..Settings::default()
    };
    let mut pod = pod();
    pod.labels = labelled("none");
    let ns = Namespace {
        labels: [("mesh".into(), "on".into())].into(),
        ..Namespace::default()
    };
    assert!(matches!(
        decide(&pod, Some(&ns), &settings),
        Membership::In(_)
    ));
    for bad in [
        "{}",
        "[{podSelector: []}]",
        "[{pods: {}}]",
        "- podSelector: {matchLabels: {a: [b]}}",
    ] {
        let error = parse_selectors(bad).unwrap_err();
        assert!(error.contains("not a YAML list of"), "{error}");
    }
}

#[test]
fn settings_are_read_and_default_to_istio_cnis() {
    let read: Settings = serde_saphyr::from_str(
        "{excludedNamespaces: [a, b], dns: false, ipv6: false, systemNamespace: mesh, sandboxedRuntimeClasses: [x*]}",
    )
    .unwrap();
    assert_eq!(read.selectors, default_selectors());
    assert_eq!(read.excluded_namespaces.len(), 2);
    assert!(!read.dns && !read.ipv6 && read.is_sandboxed("xyz"));
    assert_eq!(
        serde_saphyr::from_str::<Settings>("{}").unwrap(),
        Settings::default()
    );
    assert!(serde_saphyr::from_str::<Settings>("{dsn: true}").is_err());
}

#[test]
fn which_namespaces_are_certainly_out() {
    let settings = Settings::default();
    let could = |name: &str, mode: Option<&str>, opted_in| {
        let labels = mode.map(labelled).unwrap_or_default();
        could_be_in(name, &labels, opted_in, &settings)
    };
    assert!(could("a", Some("ambient"), 0));
    assert!(!could("a", None, 0) && !could("a", Some("none"), 0));
    assert!(could("a", None, 1) && could("a", Some("none"), 1));
    assert!(!could("kube-system", Some("ambient"), 5));
    let opt_in = settings.opt_in_selectors();
    assert_eq!(
        opt_in,
        ["istio.io/dataplane-mode in (ambient)".into()].into()
    );
}
