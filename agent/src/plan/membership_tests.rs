//! Who is in the mesh: istio-cni's cases first, then what must hold for whatever input.

use proptest::prelude::*;

use super::*;
use crate::{
    model::PodUid,
    plan::annotations::{MAX_EXCLUSIONS, parse_bool},
};

fn pod() -> Pod {
    Pod {
        uid: PodUid::from("uid"),
        static_uid: None,
        namespace: "test".into(),
        name: "test".into(),
        service_account: "default".into(),
        labels: Labels::new(),
        annotations: Labels::new(),
        host_network: false,
        runtime_class: None,
        phase: Phase::Running,
        deleting: false,
        addresses: ["11.1.1.12".parse().unwrap()].into(),
        nameservers: [].into(),
    }
}

fn labelled(mode: &str) -> Labels {
    [(keys::DATAPLANE_MODE.into(), mode.into())].into()
}

fn namespace(mode: Option<&str>) -> Namespace {
    Namespace {
        labels: mode.map(labelled).unwrap_or_default(),
        annotations: Labels::new(),
    }
}

fn decided(pod: &Pod, ns: &Namespace) -> Membership {
    decide(pod, Some(ns), &Settings::default())
}

fn ambient_pod_with(annotations: &[(&str, &str)]) -> Wanted {
    let mut pod = pod();
    pod.annotations = annotations
        .iter()
        .map(|(k, v)| ((*k).into(), (*v).into()))
        .collect();
    match decided(&pod, &namespace(Some("ambient"))) {
        Membership::In(wanted) => wanted,
        other => panic!("{other}"),
    }
}

#[test]
fn labels_of_pod_and_namespace() {
    let out = Membership::Out;
    for (of_namespace, of_pod, expected) in [
        (None, None, Some(out(Reason::NotSelected))),
        (None, Some("ambient"), None),
        (None, Some("none"), Some(out(Reason::OptedOut))),
        (Some("ambient"), None, None),
        (Some("ambient"), Some("ambient"), None),
        (Some("ambient"), Some("none"), Some(out(Reason::OptedOut))),
        (Some("none"), None, Some(out(Reason::NotSelected))),
        (Some("none"), Some("ambient"), None),
        (Some("Ambient"), None, Some(out(Reason::NotSelected))),
        // Anything but `none` does not opt out.
        (Some("ambient"), Some("sidecar"), None),
    ] {
        let mut pod = pod();
        pod.labels = of_pod.map(labelled).unwrap_or_default();
        let got = decided(&pod, &namespace(of_namespace));
        match expected {
            Some(expected) => assert_eq!(got, expected, "{of_namespace:?} {of_pod:?}"),
            None => assert!(
                matches!(got, Membership::In(_)),
                "{of_namespace:?} {of_pod:?}: {got}"
            ),
        }
    }
}

#[test]
fn what_is_never_in_the_mesh_whatever_its_labels() {
    type Change = fn(&mut Pod);
    let cases: [(Change, Reason); 7] = [
        (|p| p.host_network = true, Reason::HostNetwork),
        (|p| p.phase = Phase::Succeeded, Reason::Ended),
        (|p| p.phase = Phase::Failed, Reason::Ended),
        (
            |p| p.namespace = "kube-system".into(),
            Reason::ExcludedNamespace,
        ),
        (
            |p| {
                p.annotations
                    .insert(keys::SIDECAR_STATUS.into(), "{}".into());
            },
            Reason::Sidecar,
        ),
        (
            |p| {
                p.annotations
                    .insert(keys::SIDECAR_STATUS.into(), String::new());
            },
            Reason::Sidecar,
        ),
        (
            |p| {
                p.namespace = "istio-system".into();
                p.labels.insert("app".into(), "ztunnel".into());
            },
            Reason::Ztunnel,
        ),
    ];
    for (change, reason) in cases {
        let mut pod = pod();
        pod.labels = labelled("ambient");
        change(&mut pod);
        let ns = namespace(Some("ambient"));
        assert_eq!(decided(&pod, &ns), Membership::Out(reason));
        assert_eq!(
            decide(&pod, None, &Settings::default()),
            Membership::Out(reason),
            "certain without its namespace"
        );
    }
}

#[test]
fn the_system_namespace_and_ztunnels_name_alone_keep_nobody_out() {
    let ns = namespace(Some("ambient"));
    let mut namesake = pod();
    namesake.labels.insert("app".into(), "ztunnel".into());
    assert!(matches!(decided(&namesake, &ns), Membership::In(_)));
    let mut neighbour = pod();
    neighbour.namespace = "istio-system".into();
    assert!(matches!(decided(&neighbour, &ns), Membership::In(_)));
}

#[test]
fn only_listed_namespaces_are_excluded() {
    let ns = namespace(Some("ambient"));
    let mut pod = pod();
    pod.namespace = "kube-system".into();
    let settings = Settings {
        excluded_namespaces: ["other".into()].into(),
        ..Settings::default()
    };
    assert!(matches!(
        decide(&pod, Some(&ns), &settings),
        Membership::In(_)
    ));
    pod.namespace = "other".into();
    let got = decide(&pod, Some(&ns), &settings);
    assert_eq!(got, Membership::Out(Reason::ExcludedNamespace));
    pod.namespace = "other-too".into();
    assert!(matches!(
        decide(&pod, Some(&ns), &settings),
        Membership::In(_)
    ));
}

#[test]
fn a_pod_being_deleted_drains_through_the_mesh() {
    let mut pod = pod();
    pod.deleting = true;
    assert!(matches!(
        decided(&pod, &namespace(Some("ambient"))),
        Membership::In(_)
    ));
    pod.phase = Phase::Succeeded;
    assert_eq!(
        decided(&pod, &namespace(Some("ambient"))),
        Membership::Out(Reason::Ended)
    );
}

#[test]
fn without_an_address_it_waits_and_says_how_it_would_go_on() {
    let mut pod = pod();
    pod.addresses.clear();
    let got = decided(&pod, &namespace(Some("ambient")));
    let Membership::Wait(Waiting::Address(wanted)) = got else {
        panic!("{got}");
    };
    assert!(wanted.dns);
    assert_eq!(
        decided(&pod, &namespace(None)),
        Membership::Out(Reason::NotSelected)
    );
}

#[test]
fn without_its_namespace_it_waits_only_where_that_decides() {
    let settings = Settings::default();
    let mut pod = pod();
    assert_eq!(
        decide(&pod, None, &settings),
        Membership::Wait(Waiting::Namespace)
    );
    // Its own label would do, but its namespace may exclude ports.
    pod.labels = labelled("ambient");
    assert_eq!(
        decide(&pod, None, &settings),
        Membership::Wait(Waiting::Namespace)
    );
    pod.labels = labelled("none");
    assert_eq!(
        decide(&pod, None, &settings),
        Membership::Out(Reason::OptedOut)
    );
}

#[test]
fn dual_stack_and_single_stack() {
    let ns = namespace(Some("ambient"));
    let mut pod = pod();
    let v6 = "2001:db8::1".parse().unwrap();
    pod.addresses.insert(v6);
    let no_v6 = Settings {
        ipv6: false,
        ..Settings::default()
    };
    assert!(matches!(decided(&pod, &ns), Membership::In(_)));
    assert!(matches!(decide(&pod, Some(&ns), &no_v6), Membership::In(_)));
    pod.addresses = [v6].into();
    assert!(matches!(decided(&pod, &ns), Membership::In(_)));
    assert_eq!(
        decide(&pod, Some(&ns), &no_v6),
        Membership::Refused(Refusal::Ipv6Off)
    );
}

#[test]
fn sandboxes_are_refused_with_a_cure_and_only_where_they_belong_into_the_mesh() {
    let settings = Settings {
        sandboxed_runtime_classes: vec!["firecracker".into(), "vm-*".into()],
        ..Settings::default()
    };
    let mut pod = pod();
    for (class, refused) in [
        ("gvisor", true),
        ("runsc", true),
        ("kata", true),
        ("kata-qemu", true),
        ("firecracker", true),
        ("vm-small", true),
        ("firecracker-2", false),
        ("runc", false),
        ("nvidia", false),
        ("my-kata", false),
    ] {
        pod.runtime_class = Some(class.into());
        let got = decide(&pod, Some(&namespace(Some("ambient"))), &settings);
        assert_eq!(
            matches!(got, Membership::Refused(Refusal::RuntimeClass(_))),
            refused,
            "{class}"
        );
        if refused {
            let text = got.to_string();
            assert!(
                text.contains(class) && text.contains("dataplane-mode=none"),
                "{text}"
            );
        }
        let outside = decide(&pod, Some(&namespace(None)), &settings);
        assert_eq!(outside, Membership::Out(Reason::NotSelected));
    }
}

#[test]
fn switches_read_as_go_does() {
    for text in ["1", "t", "T", "TRUE", "true", "True"] {
        assert_eq!(parse_bool(text), Some(true));
        let wanted = ambient_pod_with(&[(keys::BYPASS_INBOUND, text)]);
        assert!(wanted.bypass_inbound && wanted.warnings.is_empty());
    }
    for text in ["0", "f", "F", "FALSE", "false", "False"] {
        assert_eq!(parse_bool(text), Some(false));
        let wanted = ambient_pod_with(&[(keys::DNS_CAPTURE, text)]);
        assert!(!wanted.dns && wanted.warnings.is_empty());
    }
    for text in ["yes", "tRUE", " true", "", "2", "on"] {
        let wanted = ambient_pod_with(&[(keys::BYPASS_INBOUND, text), (keys::DNS_CAPTURE, text)]);
        assert!(!wanted.bypass_inbound && wanted.dns, "{text:?}");
        assert_eq!(wanted.warnings.len(), 2, "{text:?}");
        assert!(wanted.warnings[0].contains("use \"true\" or \"false\""));
    }
}

#[test]
fn dns_annotation_overrides_the_default_both_ways() {
    let ns = namespace(Some("ambient"));
    for (global, annotation, dns) in [
        (true, None, true),
        (false, None, false),
        (true, Some("false"), false),
        (false, Some("true"), true),
        (false, Some("maybe"), false),
    ] {
        let mut pod = pod();
        pod.annotations = annotation
            .map(|a| (keys::DNS_CAPTURE.into(), a.into()))
            .into_iter()
            .collect();
        let settings = Settings {
            dns: global,
            ..Settings::default()
        };
        let Membership::In(wanted) = decide(&pod, Some(&ns), &settings) else {
            panic!("in the mesh");
        };
        assert_eq!(wanted.dns, dns, "{global} {annotation:?}");
    }
}

#[test]
fn lists_are_read_item_by_item() {
    let wanted = ambient_pod_with(&[
        (
            keys::VIRTUAL_INTERFACES,
            " br0 , tap/1,br0,averyveryverylongname,net1,",
        ),
        (keys::EXCLUDE_OUTBOUND_PORTS, "5432, 0,3306,http,70000,3306"),
        (
            keys::EXCLUDE_OUTBOUND_CIDRS,
            "10.1.2.3/8,192.0.2.1,2001:db8::1/32,10.0.0.0/33",
        ),
        (keys::EXCLUDE_INBOUND_PORTS, "9090"),
    ]);
    assert_eq!(wanted.virtual_interfaces, ["br0", "net1"]);
    assert_eq!(wanted.exclude_outbound_ports, [3306, 5432].into());
    let nets = ["10.0.0.0/8", "192.0.2.1/32", "2001:db8::/32"].map(|n| n.parse().unwrap());
    assert_eq!(wanted.exclude_outbound_cidrs, nets.into());
    assert_eq!(wanted.exclude_inbound_ports, [9090].into());
    assert_eq!(wanted.warnings.len(), 2 + 3 + 1, "{:#?}", wanted.warnings);
}

#[test]
fn a_pods_annotation_stands_in_place_of_its_namespaces() {
    let settings = Settings::default();
    let mut ns = namespace(Some("ambient"));
    ns.annotations = [
        (keys::EXCLUDE_OUTBOUND_PORTS.into(), "1,2".into()),
        (keys::EXCLUDE_INBOUND_PORTS.into(), "3".into()),
        // Not for namespaces.
        (keys::BYPASS_INBOUND.into(), "true".into()),
        (keys::DNS_CAPTURE.into(), "false".into()),
    ]
    .into();
    let mut pod = pod();
    pod.annotations = [(keys::EXCLUDE_OUTBOUND_PORTS.into(), "9".into())].into();
    let Membership::In(wanted) = decide(&pod, Some(&ns), &settings) else {
        panic!("in the mesh");
    };
    assert_eq!(wanted.exclude_outbound_ports, [9].into());
    assert_eq!(wanted.exclude_inbound_ports, [3].into());
    assert!(!wanted.bypass_inbound && wanted.dns);
    pod.annotations = [(keys::EXCLUDE_INBOUND_PORTS.into(), String::new())].into();
    let Membership::In(wanted) = decide(&pod, Some(&ns), &settings) else {
        panic!("in the mesh");
    };
    assert!(wanted.exclude_inbound_ports.is_empty());
}

#[test]
fn one_pod_cannot_fill_the_maps_of_all() {
    let many: Vec<String> = (1..=5000).map(|p| p.to_string()).collect();
    let wanted = ambient_pod_with(&[(keys::EXCLUDE_OUTBOUND_PORTS, &many.join(","))]);
    assert_eq!(wanted.exclude_outbound_ports.len(), MAX_EXCLUSIONS);
    assert_eq!(wanted.warnings.len(), 1);
}

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

fn any_labels() -> impl Strategy<Value = Labels> {
    let mode = prop::option::of(prop_oneof!["ambient", "none", "[a-z]{0,3}"]);
    (mode, prop::option::of("ztunnel|web")).prop_map(|(mode, app)| {
        let mut labels = mode.as_deref().map(labelled).unwrap_or_default();
        labels.extend(app.map(|a| ("app".into(), a)));
        labels
    })
}

fn any_annotations() -> impl Strategy<Value = Labels> {
    let key = prop::sample::select(keys::KEPT.to_vec());
    let value = prop_oneof![
        "true",
        "false",
        "[0-9,]{0,12}",
        "[0-9a-f.:/,]{0,20}",
        ".{0,12}"
    ];
    prop::collection::btree_map(key.prop_map(String::from), value, 0..5)
}

prop_compose! {
    fn any_pod()(
        namespace in "a|b|kube-system|istio-system",
        labels in any_labels(),
        annotations in any_annotations(),
        host_network in prop::bool::weighted(0.2),
        runtime_class in prop::option::weighted(0.2, "kata-x|runc"),
        phase in prop::sample::select(vec![Phase::Pending, Phase::Running, Phase::Failed]),
        deleting: bool,
        v4 in prop::option::of(any::<std::net::Ipv4Addr>()),
        v6 in prop::option::of(any::<std::net::Ipv6Addr>()),
    ) -> Pod {
        Pod {
            namespace, labels, annotations, host_network, runtime_class, phase, deleting,
            addresses: v4.map(Into::into).into_iter().chain(v6.map(Into::into)).collect(),
            ..pod()
        }
    }
}

proptest! {
    #[test]
    fn nobody_is_captured_who_must_not_be(pod in any_pod(), labels in any_labels(), dns: bool, ipv6: bool) {
        let settings = Settings { dns, ipv6, ..Settings::default() };
        let ns = Namespace { labels, annotations: Labels::new() };
        if let Membership::In(wanted) = decide(&pod, Some(&ns), &settings) {
            prop_assert!(!pod.host_network && pod.phase != Phase::Failed && !pod.addresses.is_empty());
            prop_assert!(pod.namespace != "kube-system" && !pod.annotations.contains_key(keys::SIDECAR_STATUS));
            prop_assert!(pod.labels.get(keys::DATAPLANE_MODE).is_none_or(|m| m != keys::NONE));
            prop_assert!(pod.runtime_class.is_none_or(|c| c == "runc"));
            prop_assert!(!wanted.exclude_inbound_ports.contains(&0) && !wanted.exclude_outbound_ports.contains(&0));
        }
    }

    #[test]
    fn a_namespace_said_to_be_out_has_nobody_in(pod in any_pod(), labels in any_labels()) {
        let settings = Settings::default();
        let ns = Namespace { labels, annotations: Labels::new() };
        let opted_in = usize::from(pod.labels.get(keys::DATAPLANE_MODE).is_some_and(|m| m == keys::AMBIENT));
        if !could_be_in(&pod.namespace, &ns.labels, opted_in, &settings) {
            let got = decide(&pod, Some(&ns), &settings);
            prop_assert!(matches!(got, Membership::Out(_)), "{got}");
        }
    }

    #[test]
    fn what_is_decided_without_the_namespace_holds_with_any(pod in any_pod(), labels in any_labels()) {
        let settings = Settings::default();
        let ns = Namespace { labels, annotations: Labels::new() };
        let without = decide(&pod, None, &settings);
        if without != Membership::Wait(Waiting::Namespace) {
            prop_assert_eq!(without, decide(&pod, Some(&ns), &settings));
        }
    }

    #[test]
    fn our_own_annotation_and_deletion_change_nothing(pod in any_pod(), labels in any_labels()) {
        let settings = Settings::default();
        let ns = Namespace { labels, annotations: Labels::new() };
        let mut other = pod.clone();
        other.deleting = !pod.deleting;
        other.annotations.insert(keys::REDIRECTION.into(), "enabled".into());
        prop_assert_eq!(decide(&pod, Some(&ns), &settings), decide(&other, Some(&ns), &settings));
    }
}
