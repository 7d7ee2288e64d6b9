//! The chart with the real helm: linted, with values that contradict refused by name, and a release's whole life on a real
//! API server.

use culvert_cluster::{ControlPlane, Part, Parts};
use serde_json::Value;

use crate::render::{chart, deploy, done, helm, objects, template};
use crate::{HOME, api};

#[test]
fn helm_finds_nothing_to_complain_about() {
    let chart = deploy().join("chart").display().to_string();
    let said = done(helm(&[
        "lint",
        "--strict",
        &chart,
        "--kube-version",
        "1.36.3",
    ]));
    assert!(
        said.contains("1 chart(s) linted, 0 chart(s) failed"),
        "{said}"
    );
}

#[test]
fn values_that_contradict_are_refused_by_name() {
    for (values, named) in [
        (
            &[
                "monitoring.serviceMonitor.enabled=true",
                "monitoring.podMonitor.enabled=true",
            ][..],
            "/monitoring",
        ),
        (&["multus.networkAttachmentDefinition=true"], "/cni/chained"),
        (
            &["cni.chained=false", "cni.ownConfig=true"],
            "/cni/ownConfig",
        ),
        (
            &["cni.ownConfigName=00-a.conflist", "cni.ownConfig=false"],
            "/cni/ownConfig",
        ),
        (&["agent.metricsPort=8000"], "one port of the node"),
        (&["agent.metrcsPort=9000"], "metrcsPort"),
        (&["updateStrategy.rollingUpdate.maxSurge=1"], "maxSurge"),
        (
            &["terminationGracePeriodSeconds=5"],
            "terminationGracePeriodSeconds",
        ),
        (&["platform=aks"], "/platform"),
        (&["agent.probeSource=everybody"], "/agent/probeSource"),
        (&["hostPaths.cniBin=opt/cni/bin"], "/hostPaths/cniBin"),
        (&["hostPaths.bpffs="], "/hostPaths/bpffs"),
        (&["image.digest=sha256:12"], "/image/digest"),
        (&["settings.log-level=debug"], "set agent.logLevel"),
        (&["settings.health-address=:9000"], "set agent.healthPort"),
        (&["settings.run-dir=/run/x"], "set hostPaths.run"),
        (&["resourceQuota.pods=0"], "/resourceQuota/pods"),
        (&["settings.Log_Level=debug"], "Log_Level"),
    ] {
        let output = template(values);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{values:?} was taken");
        assert!(said.contains(named), "{values:?}: {said}");
    }
}

/// Helm with a cluster's administrator.
fn on(api: &ControlPlane, args: &[&str]) -> String {
    let mut helm = helm(args);
    helm.env("KUBECONFIG", api.admin_kubeconfig());
    helm.args(["--namespace", HOME]);
    done(helm)
}

#[test]
fn a_release_is_installed_upgraded_rolled_back_and_removed() {
    let api = api("deploy-helm");
    let chart = deploy().join("chart").display().to_string();
    let daemonset = || api.admin().get(&["daemonset", "culvert", "-n", HOME]);
    let variables =
        || daemonset().unwrap()["spec"]["template"]["spec"]["containers"][0]["env"].to_string();

    let notes = on(&api, &["install", "culvert", &chart, "--create-namespace"]);
    assert!(notes.contains("culvert status"), "{notes}");
    assert!(
        notes.contains("pod-security.kubernetes.io/enforce=privileged"),
        "{notes}"
    );
    let first = daemonset().unwrap()["spec"].clone();

    let everything = [
        "upgrade",
        "culvert",
        &chart,
        "--set",
        "agent.logLevel=debug",
        "--set",
        "resourceQuota.enabled=true",
        "--set",
        "monitoring.serviceMonitor.enabled=true",
        "--set",
        "monitoring.prometheusRule.enabled=true",
        "--set",
        "networkPolicy.enabled=true",
        "--set",
        "openshift.securityContextConstraints=true",
        "--set",
        "cni.chained=false",
        "--set",
        "multus.networkAttachmentDefinition=true",
        "--set",
        "istioCniNodeLabel=true",
        "--set",
        "podLabels.team=mesh",
        "--set",
        "imagePullSecrets={registry}",
        "--set",
        "nodeSelector.mesh=yes",
        "--set",
        "updateStrategy.type=OnDelete",
    ];
    on(&api, &everything);
    assert!(
        variables().contains(r#""name":"CULVERT_LOG_LEVEL","value":"debug""#),
        "{}",
        variables()
    );
    let labels = daemonset().unwrap()["spec"]["template"]["metadata"]["labels"].clone();
    assert_eq!(
        (&labels["k8s-app"], &labels["team"]),
        (&"istio-cni-node".into(), &"mesh".into())
    );
    for object in [
        "resourcequota",
        "networkpolicy",
        "servicemonitor",
        "prometheusrule",
        "securitycontextconstraints",
    ] {
        api.kubectl(&["get", object, "culvert", "-n", HOME])
            .unwrap();
    }

    on(&api, &["rollback", "culvert", "1"]);
    assert_eq!(daemonset().unwrap()["spec"], first);
    assert!(
        api.kubectl(&["get", "resourcequota", "culvert", "-n", HOME])
            .is_err()
    );

    on(&api, &["uninstall", "culvert"]);
    let gone = daemonset().unwrap_err().to_string();
    assert!(gone.contains("NotFound"), "{gone}");
    for (kind, namespace) in [
        ("clusterrole", HOME),
        ("role", HOME),
        ("role", "kube-system"),
        ("serviceaccount", HOME),
    ] {
        let left = api.kubectl(&["get", kind, "culvert", "-n", namespace]);
        assert!(left.is_err(), "{kind} in {namespace} is left");
    }
}

#[test]
fn the_values_for_istio_do_what_they_say_in_its_own_charts() {
    let charts = Parts::find().unwrap().get(Part::IstioCharts).unwrap();
    let render = |chart: &str, values: &[&str]| -> String {
        let chart = charts.join(chart).display().to_string();
        let common = ["template", "istio", &chart, "--kube-version", "1.36.3"];
        let namespace = ["--namespace", "istio-system"];
        done(helm(&[&common[..], &namespace, values].concat()))
    };
    // Of one object, not of text: what a chart renders also quotes its values.
    let object = |text: &str, kind: &str, name: &str| -> Value {
        objects(text)
            .into_iter()
            .find_map(|(key, object)| (key.0 == kind && key.2 == name).then_some(object))
            .unwrap_or_else(|| panic!("no {kind} {name}"))
    };
    let file = |name: &str| {
        let path = deploy().join("istio").join(name);
        path.display().to_string()
    };

    let (istiod, values) = ("istio-control/istio-discovery", file("istiod.yaml"));
    let deployment = |more: &[&str]| {
        let text = render(istiod, &[&["--values", &values][..], more].concat());
        object(&text, "Deployment", "istiod").to_string()
    };
    let ambient = r#"{"name":"PILOT_ENABLE_AMBIENT","value":"true"}"#;
    let untaints = "PILOT_ENABLE_NODE_UNTAINT_CONTROLLERS";
    let plain = object(&render(istiod, &[]), "Deployment", "istiod").to_string();
    assert!(!plain.contains(ambient), "then the value is not needed");
    assert!(deployment(&[]).contains(ambient));
    assert!(!deployment(&[]).contains(untaints));
    assert!(deployment(&["--set", "pilot.taint.enabled=true"]).contains(untaints));
    let injector = |more: &[&str]| -> Value {
        let text = render(istiod, &[&["--values", &values][..], more].concat());
        let map = object(&text, "ConfigMap", "istio-sidecar-injector");
        let values = map["data"]["values"].as_str().unwrap();
        serde_json::from_str(values).unwrap()
    };
    assert_eq!(injector(&[])["pilot"]["cni"]["enabled"], false);
    let enabled = injector(&["--set", "pilot.cni.enabled=true"]);
    assert_eq!(enabled["pilot"]["cni"]["enabled"], true);

    let values = file("ztunnel.yaml");
    let daemonset = |more: &[&str]| {
        let text = render("ztunnel", &[&["--values", &values][..], more].concat());
        object(&text, "DaemonSet", "ztunnel")
    };
    let ztunnel = daemonset(&[]);
    let elsewhere = daemonset(&["--set", "istioNamespace=elsewhere"]).to_string();
    assert!(
        ztunnel
            .to_string()
            .contains("istiod.istio-system.svc:15012")
    );
    assert!(elsewhere.contains("istiod.elsewhere.svc:15012"));
    // Where Culvert answers, and by what it knows ztunnel's pods.
    let paths = |daemonset: &Value| -> Vec<String> {
        let volumes = daemonset["spec"]["template"]["spec"]["volumes"].as_array();
        let paths = volumes.unwrap().iter();
        paths
            .filter_map(|one| one["hostPath"]["path"].as_str().map(str::to_owned))
            .collect()
    };
    assert_eq!(paths(&ztunnel), ["/var/run/ztunnel"]);
    let (_, ours) = chart(&[])
        .into_iter()
        .find(|(key, _)| key.0 == "DaemonSet")
        .unwrap();
    assert!(paths(&ours).contains(&"/var/run/ztunnel".to_owned()));
    assert_eq!(
        ztunnel["spec"]["template"]["metadata"]["labels"]["app"],
        "ztunnel"
    );
}

#[test]
fn every_value_of_istio_cnis_chart_has_a_line_for_those_who_come_from_it() {
    let charts = Parts::find().unwrap().get(Part::IstioCharts).unwrap();
    let values = std::fs::read_to_string(charts.join("istio-cni/values.yaml")).unwrap();
    let values: Value = serde_saphyr::from_str(&values).unwrap();
    let page = std::fs::read_to_string(deploy().join("../docs/from-istio-cni.md")).unwrap();
    let mut names = Vec::new();
    leaves(&values["_internal_defaults_do_not_set"], "", &mut names);
    assert!(names.len() > 40, "{names:?}");
    for name in names {
        // Some values of `global` are defaults for those of the same name, and of some a part is said for the whole.
        let own = name.strip_prefix("global.").unwrap_or(&name);
        let above = name.match_indices('.').map(|(at, _)| name[..at].to_owned());
        let said = above
            .flat_map(|above| [format!("`{above}.*`"), format!("`{above}`")])
            .chain([format!("`{name}`"), format!("`{own}`")])
            .any(|word| page.contains(&word));
        assert!(
            said,
            "docs/from-istio-cni.md does not say what becomes of {name}"
        );
    }
}

/// Names of all values that have none below them.
fn leaves(values: &Value, path: &str, found: &mut Vec<String>) {
    match values.as_object() {
        Some(map) if !map.is_empty() => {
            for (name, below) in map {
                let path = match path {
                    "" => name.clone(),
                    path => format!("{path}.{name}"),
                };
                leaves(below, &path, found);
            }
        }
        _ => found.push(path.to_owned()),
    }
}

#[test]
fn the_values_for_cilium_are_what_its_configuration_says_then() {
    let agent = Parts::find().unwrap().get(Part::CiliumAgent).unwrap();
    let cilium = agent.with_file_name("chart").display().to_string();
    let values = deploy().join("cilium/values.yaml").display().to_string();
    let shown = "templates/cilium-configmap.yaml";
    let rendered = |more: &[&str]| -> Value {
        let common = [
            "template",
            "cilium",
            &cilium,
            "--kube-version",
            "1.36.3",
            "--show-only",
            shown,
        ];
        let text = done(helm(&[&common[..], more].concat()));
        serde_saphyr::from_str::<Value>(&text).unwrap()["data"].clone()
    };
    let (plain, ours) = (rendered(&[]), rendered(&["--values", &values]));
    assert_eq!(
        plain["cni-exclusive"], "true",
        "then the value is not needed any more"
    );
    assert_eq!(ours["cni-exclusive"], "false");
    assert_eq!(ours["bpf-lb-sock-hostns-only"], "true");
    assert_ne!(ours["enable-ztunnel"], "true");
}
