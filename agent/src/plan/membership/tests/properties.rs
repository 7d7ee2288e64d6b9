//! What must hold for whatever input.

use proptest::prelude::*;

use super::*;

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
