//! What users apply and install, against a real API server: the kustomize base and its overlays, the chart with the real
//! helm, and that both say the same. No node is needed; that pods of it work is shown elsewhere.
#![expect(
    clippy::unwrap_used,
    reason = "test code: a step that fails is a test that fails"
)]

mod chart;
mod image;
mod manifests;
mod render;
mod values;

/// Kinds that only some platforms have, as far as these tests need them: the API server looks at names alone.
const FOREIGN_KINDS: [(&str, &str, &str, &str); 5] = [
    (
        "security.openshift.io",
        "v1",
        "SecurityContextConstraints",
        "Cluster",
    ),
    (
        "k8s.cni.cncf.io",
        "v1",
        "NetworkAttachmentDefinition",
        "Namespaced",
    ),
    (
        "monitoring.coreos.com",
        "v1",
        "ServiceMonitor",
        "Namespaced",
    ),
    ("monitoring.coreos.com", "v1", "PodMonitor", "Namespaced"),
    (
        "monitoring.coreos.com",
        "v1",
        "PrometheusRule",
        "Namespaced",
    ),
];

/// Where the agent lives.
const HOME: &str = "culvert-system";

/// Definitions of [`FOREIGN_KINDS`], any content allowed.
fn foreign_kinds() -> String {
    let one = |(group, version, kind, scope): (&str, &str, &str, &str)| {
        let singular = kind.to_lowercase();
        let plural = match singular.strip_suffix('s') {
            Some(_) => singular.clone(),
            None => format!("{singular}s"),
        };
        serde_json::json!({
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {"name": format!("{plural}.{group}")},
            "spec": {
                "group": group,
                "scope": scope,
                "names": {"kind": kind, "plural": plural, "singular": singular},
                "versions": [{
                    "name": version, "served": true, "storage": true,
                    "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}},
                }],
            },
        })
        .to_string()
    };
    FOREIGN_KINDS.map(one).join("\n")
}

/// An API server that knows those kinds.
fn api(name: &str) -> culvert_cluster::ControlPlane {
    let api = culvert_cluster::ControlPlane::start(name).unwrap();
    api.apply(&foreign_kinds()).unwrap();
    let wait = [
        "wait",
        "--for=condition=established",
        "--timeout=60s",
        "crd",
        "--all",
    ];
    api.kubectl(&wait).unwrap();
    // Established is not yet to be found by everybody who asks which kinds there are.
    for (group, _, kind, _) in FOREIGN_KINDS {
        let list = ["get", &format!("{kind}.{group}"), "-A"];
        let what = format!("{kind} can be listed");
        let patience = std::time::Duration::from_secs(60);
        api.admin()
            .wait_until(&what, patience, &list, |_| true)
            .unwrap();
    }
    api
}
