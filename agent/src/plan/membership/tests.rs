//! Who is in the mesh: istio-cni's cases first, then what must hold for whatever input.

mod annotations;
mod properties;
mod settings;

use super::*;
use crate::model::PodUid;

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
        uncaptured: None,
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
