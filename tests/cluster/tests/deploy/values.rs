//! What values of the chart make of its objects: the agent's settings, where it runs, what is made only where asked for.

use serde_json::{Value, json};

use crate::render::chart;

/// The object of a kind of which there is one.
fn only(kind: &str, values: &[&str]) -> Option<Value> {
    let mut all = chart(values).into_iter();
    all.find_map(|(key, object)| (key.0 == kind).then_some(object))
}

/// What the DaemonSet's pods are.
fn pod(values: &[&str]) -> Value {
    only("DaemonSet", values).unwrap()["spec"]["template"]["spec"].clone()
}

/// Their container.
fn agent(values: &[&str]) -> Value {
    pod(values)["containers"][0].clone()
}

/// One of its environment variables.
fn variable(container: &Value, name: &str) -> Option<String> {
    let all = container["env"].as_array().unwrap();
    let one = all.iter().find(|one| one["name"] == name)?;
    Some(one["value"].as_str().unwrap().to_owned())
}

#[test]
fn values_reach_the_agent() {
    let container = agent(&[
        "agent.excludedNamespaces={kube-system,legacy}",
        "agent.probeSource=none",
        "agent.metricsPort=9000",
        "agent.ztunnelGrace=1m",
        "agent.enablementSelectors[0].podSelector.matchLabels.mesh=yes",
        "settings.reconcile-period=10s",
        "cni.ownConfig=false",
    ]);
    let variable = |name: &str| variable(&container, name).unwrap_or_else(|| panic!("no {name}"));
    assert_eq!(
        variable("CULVERT_EXCLUDED_NAMESPACES"),
        "kube-system,legacy"
    );
    assert_eq!(variable("CULVERT_PROBE_SOURCE"), "none");
    assert_eq!(variable("CULVERT_METRICS_ADDRESS"), ":9000");
    assert_eq!(variable("CULVERT_ZTUNNEL_GRACE"), "1m");
    assert_eq!(
        variable("CULVERT_ENABLEMENT_SELECTORS"),
        r#"[{"podSelector":{"matchLabels":{"mesh":"yes"}}}]"#
    );
    assert_eq!(variable("CULVERT_RECONCILE_PERIOD"), "10s");
    assert_eq!(variable("CULVERT_CNI_OWN_CONFIG"), "false");
    let ports = container["ports"].as_array().unwrap();
    assert!(ports.iter().any(|port| port["containerPort"] == 9000));
    let digest = format!("sha256:{}", "0".repeat(64));
    let image = agent(&[
        "image.repository=registry.example/culvert",
        &format!("image.digest={digest}"),
    ]);
    assert_eq!(image["image"], format!("registry.example/culvert@{digest}"));
}

#[test]
fn no_excluded_namespaces_are_none() {
    let set = |values: &[&str]| variable(&agent(values), "CULVERT_EXCLUDED_NAMESPACES");
    assert_eq!(set(&["agent.excludedNamespaces=[]"]).as_deref(), Some("[]"));
    // The agent's default, which is the chart's.
    assert_eq!(set(&["agent.excludedNamespaces=null"]), None);
}

#[test]
fn beside_cilium_the_plugin_can_be_called_by_name_alone() {
    let own = |values: &[&str]| {
        let container = agent(&[&["platform=cilium"], values].concat());
        variable(&container, "CULVERT_CNI_OWN_CONFIG")
    };
    assert_eq!(own(&[]).as_deref(), Some("true"));
    // The agent takes one of both.
    assert_eq!(own(&["cni.chained=false"]), None);
}

/// The plugin runs on the node and is told paths as the agent has them.
#[test]
fn directories_that_the_plugin_looks_into_are_the_same_for_the_agent() {
    let container = agent(&["hostPaths.run=/run/other", "hostPaths.state=/var/lib/other"]);
    for (name, value) in [
        ("CULVERT_RUN_DIR", "/run/other"),
        ("CULVERT_AGENT_SOCKET", "/run/other/agent.sock"),
        ("CULVERT_DECISION_FILE", "/var/lib/other/decisions.json"),
    ] {
        assert_eq!(variable(&container, name).as_deref(), Some(value));
    }
    let mounts = container["volumeMounts"].as_array().unwrap();
    for (name, path) in [("run", "/run/other"), ("state", "/var/lib/other")] {
        let mount = mounts.iter().find(|mount| mount["name"] == name).unwrap();
        assert_eq!(mount["mountPath"], path);
    }
}

#[test]
fn a_node_selector_is_added_to_the_charts() {
    let selector = |values: &[&str]| pod(values)["nodeSelector"].clone();
    let linux = json!({"kubernetes.io/os": "linux"});
    assert_eq!(selector(&[]), linux);
    let both = json!({"kubernetes.io/os": "linux", "mesh": "yes"});
    assert_eq!(selector(&["nodeSelector.mesh=yes"]), both);
    let none = selector(&[r"nodeSelector.kubernetes\.io/os=null"]);
    assert_eq!(none, Value::Null);
}

#[test]
fn a_quota_admits_as_many_pods_as_it_is_told() {
    let hard = |values: &[&str]| {
        let quota = only("ResourceQuota", &[&["platform=gke"], values].concat())?;
        Some(quota["spec"]["hard"]["pods"].clone())
    };
    assert_eq!(hard(&[]), Some("5000".into()));
    assert_eq!(hard(&["resourceQuota.pods=200"]), Some("200".into()));
    assert_eq!(hard(&["resourceQuota.enabled=false"]), None);
}

#[test]
fn no_alert_waits_for_a_plugin_that_nobody_installs() {
    let alerts = |values: &[&str]| -> String {
        let enabled = ["monitoring.prometheusRule.enabled=true"];
        let rule = only("PrometheusRule", &[&enabled, values].concat()).unwrap();
        rule["spec"]["groups"][0]["rules"].to_string()
    };
    assert!(alerts(&[]).contains("CulvertPluginNotInstalled"));
    let without = alerts(&["cni.install=false"]);
    assert!(!without.contains("CulvertPluginNotInstalled"), "{without}");
    assert!(without.contains("CulvertNoZtunnel"), "{without}");
}

#[test]
fn monitors_ask_the_port_that_the_agent_names() {
    let made = |values: &[&str]| -> Vec<Value> {
        let all = chart(values).into_iter();
        let kinds = ["Service", "ServiceMonitor", "PodMonitor"];
        let ours = all.filter(|((kind, ..), _)| kinds.contains(&kind.as_str()));
        ours.map(|(_, object)| object).collect()
    };
    assert!(made(&[]).is_empty());
    let pods = made(&[
        "monitoring.podMonitor.enabled=true",
        "monitoring.podMonitor.interval=10s",
        "monitoring.podMonitor.labels.release=prometheus",
    ]);
    let [monitor] = &pods[..] else {
        panic!("{pods:?}")
    };
    assert_eq!(monitor["kind"], "PodMonitor");
    assert_eq!(monitor["metadata"]["labels"]["release"], "prometheus");
    let [endpoint] = &monitor["spec"]["podMetricsEndpoints"].as_array().unwrap()[..] else {
        panic!("{monitor}")
    };
    assert_eq!(endpoint["port"], agent(&[])["ports"][0]["name"]);
    assert_eq!(endpoint["interval"], "10s");
    let labels = &monitor["spec"]["selector"]["matchLabels"];
    assert_eq!(*labels, json!({"app.kubernetes.io/name": "culvert"}));

    let service = made(&["monitoring.serviceMonitor.enabled=true"]);
    let kinds: Vec<&Value> = service.iter().map(|object| &object["kind"]).collect();
    assert_eq!(kinds, ["Service", "ServiceMonitor"]);
    assert_eq!(service[1]["spec"]["endpoints"][0]["port"], endpoint["port"]);
}

#[test]
fn scopes_divide_the_objects_between_them() {
    let of = |values: &[&str]| -> Vec<_> { chart(values).into_keys().collect() };
    let platform = "platform=openshift";
    let mut divided = of(&[platform, "resourceScope=cluster"]);
    assert!(
        divided.iter().all(|(_, namespace, _)| namespace.is_empty()),
        "{divided:?}"
    );
    let namespaced = of(&[platform, "resourceScope=namespace"]);
    assert!(
        namespaced
            .iter()
            .all(|(_, namespace, _)| !namespace.is_empty()),
        "{namespaced:?}"
    );
    divided.extend(namespaced);
    divided.sort();
    assert_eq!(divided, of(&[platform]));
}
