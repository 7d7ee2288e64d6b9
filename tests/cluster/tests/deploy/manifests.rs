//! The kustomize base and its overlays: admitted by a real API server as they are, and the same as the chart's.

use serde_json::{Value, json};

use crate::render::{chart, deploy, kustomize, overlays};
use crate::{HOME, api};

#[test]
fn the_chart_makes_the_objects_of_the_base_and_of_every_overlay() {
    let compare = |dir: &str, values: &[&str]| {
        let mut base = kustomize(dir);
        // Helm makes the release's namespace, or takes the one that is there.
        base.retain(|(kind, ..), _| kind != "Namespace");
        let chart = chart(values);
        let (ours, theirs): (Vec<_>, Vec<_>) = (base.keys().collect(), chart.keys().collect());
        assert_eq!(ours, theirs, "{dir}");
        for (key, object) in &base {
            assert_eq!(*object, chart[key], "{dir}: {key:?}");
        }
    };
    compare("base", &[]);
    for name in overlays() {
        compare(&format!("overlays/{name}"), &[&format!("platform={name}")]);
    }
}

#[test]
fn the_api_server_takes_the_base_and_every_overlay() {
    let api = api("deploy-manifests");
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": HOME}});
    api.apply(&namespace.to_string()).unwrap();
    let all = overlays()
        .into_iter()
        .map(|name| format!("overlays/{name}"));
    for dir in std::iter::once("base".to_owned()).chain(all) {
        let path = deploy().join(&dir).display().to_string();
        let args = [
            "apply",
            "--dry-run=server",
            "--validate=strict",
            "-o",
            "name",
            "-k",
            &path,
        ];
        let taken = api
            .kubectl(&args)
            .unwrap_or_else(|error| panic!("{dir}: {error:#}"));
        assert!(taken.contains("daemonset.apps/culvert"), "{dir}: {taken}");
    }
    // Twice for real: the second time nothing changes.
    let base = deploy().join("base").display().to_string();
    api.kubectl(&["apply", "-k", &base]).unwrap();
    let again = api.kubectl(&["apply", "-k", &base]).unwrap();
    assert!(
        again.lines().all(|line| line.ends_with("unchanged")),
        "{again}"
    );
}

#[test]
fn only_our_own_namespace_admits_the_agents_pods_by_policy() {
    let api = api("deploy-policy");
    api.kubectl(&["apply", "-k", &deploy().join("base").display().to_string()])
        .unwrap();
    for level in ["baseline", "restricted"] {
        let label = "pod-security.kubernetes.io/enforce";
        let other = json!({
            "apiVersion": "v1", "kind": "Namespace", "metadata": {"name": level, "labels": {label: level}},
        });
        api.apply(&other.to_string()).unwrap();
    }
    let daemonset = api
        .admin()
        .get(&["daemonset", "culvert", "-n", HOME])
        .unwrap();
    let pod = |namespace: &str| -> String {
        let mut spec = daemonset["spec"]["template"]["spec"].clone();
        // Accounts are each namespace's own.
        spec.as_object_mut().unwrap().remove("serviceAccountName");
        spec.as_object_mut().unwrap().remove("serviceAccount");
        json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "agent", "namespace": namespace}, "spec": spec,
        })
        .to_string()
    };
    let create = |namespace: &str| {
        let args = ["create", "--dry-run=server", "-f", "-"];
        api.admin().run_with(&args, &pod(namespace))
    };
    create(HOME).unwrap();
    for level in ["baseline", "restricted"] {
        let refused = create(level).unwrap_err().to_string();
        for what in [
            "violates PodSecurity",
            "hostNetwork=true",
            "hostPID=true",
            "SYS_ADMIN",
            "hostPath",
        ] {
            assert!(refused.contains(what), "{level}: {what}: {refused}");
        }
    }
}

#[test]
fn the_agent_is_held_to_what_it_needs() {
    for (_, object) in kustomize("base")
        .into_iter()
        .filter(|((kind, ..), _)| kind == "DaemonSet")
    {
        let spec = &object["spec"]["template"]["spec"];
        let agent = &spec["containers"][0]["securityContext"];
        assert_eq!(agent["privileged"], false);
        assert_eq!(agent["allowPrivilegeEscalation"], false);
        assert_eq!(agent["readOnlyRootFilesystem"], true);
        assert_eq!(agent["capabilities"]["drop"], json!(["ALL"]));
        assert_eq!(
            spec["securityContext"]["seccompProfile"]["type"],
            "RuntimeDefault"
        );
        assert_eq!(spec["priorityClassName"], "system-node-critical");
        assert_eq!(spec["nodeSelector"], json!({"kubernetes.io/os": "linux"}));
        let strategy = &object["spec"]["updateStrategy"]["rollingUpdate"];
        assert_eq!(*strategy, json!({"maxUnavailable": 1, "maxSurge": 0}));
        for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
            assert!(
                spec["containers"][0][probe]["httpGet"]["path"].is_string(),
                "{probe}"
            );
        }
        // The default is a second, which a busy node may take.
        for probe in ["livenessProbe", "readinessProbe"] {
            assert_eq!(spec["containers"][0][probe]["timeoutSeconds"], 5, "{probe}");
        }
        let mounts = spec["containers"][0]["volumeMounts"].as_array().unwrap();
        let cgroup = mounts
            .iter()
            .find(|mount| mount["name"] == "cgroup")
            .unwrap();
        assert_eq!(cgroup["readOnly"], Value::Bool(true));
    }
}
