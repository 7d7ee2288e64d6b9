//! What annotations ask for, well and badly written.

use super::*;
use crate::plan::annotations::{MAX_EXCLUSIONS, parse_bool};

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
