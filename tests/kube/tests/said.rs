//! What goes wrong is said where people look: events on the pod and the node, readiness, `culvert status`, metrics, each with
//! its cure.

#![expect(
    clippy::unwrap_used,
    reason = "test code: a step that fails is a test that fails"
)]

use culvert_cluster::IN_TIME;
use culvert_kube_tests::{
    Bed, LONG, NODE, eventually, logs, mode,
    node::{Node, running},
    rbac,
};
use culvert_lab::{Family, Rule};
use k8s_openapi::api::events::v1::Event;
use kube::api::ListParams;
use serde_json::json;

async fn event(bed: &Bed, namespace: &str, object: &str, reason: &str, text: &str) {
    let events = kube::Api::<Event>::namespaced(bed.admin.clone(), namespace);
    eventually(&format!("event {reason} on {object}"), || async {
        let all = events.list(&ListParams::default()).await?.items;
        Ok(all.iter().any(|e| {
            e.reason.as_deref() == Some(reason)
                && e.regarding.as_ref().and_then(|r| r.name.as_deref()) == Some(object)
                && e.note.as_deref().is_some_and(|note| note.contains(text))
        }))
    })
    .await
    .unwrap();
}

/// The pod's condition of ours says this reason, or there is none; the kubelet's stays.
async fn condition(bed: &Bed, name: &str, reason: Option<&str>, text: &str) {
    eventually(&format!("{name}'s condition is {reason:?}"), || async {
        let pod = bed.pods("mesh").get(name).await?;
        let all = pod.status.and_then(|s| s.conditions).unwrap_or_default();
        let ours = all.iter().find(|c| c.type_ == "culvert.dev/Captured");
        let said = ours.is_none_or(|c| {
            let message = c.message.as_deref().unwrap_or_default();
            c.status == "False" && c.last_transition_time.is_some() && message.contains(text)
        });
        let kept = all.iter().any(|c| c.type_ == "Ready" && c.status == "True");
        Ok(kept && said && ours.and_then(|c| c.reason.as_deref()) == reason)
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_that_cannot_be_served_and_why() {
    logs();
    let bed = Bed::start("said-pods").await.unwrap();
    bed.namespace("mesh", mode("ambient")).await.unwrap();
    for class in ["gvisor", "kata-qemu", "microvm", "runc"] {
        bed.plane
            .apply(&format!(
                "{{\"apiVersion\": \"node.k8s.io/v1\", \"kind\": \"RuntimeClass\", \"metadata\": {{\"name\": \"{class}\"}}, \
                 \"handler\": \"{class}\"}}"
            ))
            .unwrap();
        let more = json!({"spec": {"runtimeClassName": class}});
        bed.pod("mesh", class, NODE, more).await.unwrap();
    }
    let odd = json!({"metadata": {
        "labels": {"app": "odd"},
        "annotations": {"ambient.istio.io/bypass-inbound-capture": "perhaps"}}});
    bed.pod("mesh", "odd", NODE, odd).await.unwrap();
    let all = ["gvisor", "kata-qemu", "microvm", "runc", "odd"];
    for (i, name) in all.iter().enumerate() {
        let ip = format!("10.9.0.{i}");
        let ready = json!([{"type": "Ready", "status": "True"}]);
        let status = json!({"phase": "Running", "podIP": ip, "conditions": ready});
        bed.status("mesh", name, status).await.unwrap();
    }
    let policy = |ports: &str| {
        format!(
            "{{\"apiVersion\": \"networking.k8s.io/v1\", \"kind\": \"NetworkPolicy\", \"metadata\": {{\"name\": \"only-http\", \
             \"namespace\": \"mesh\"}}, \"spec\": {{\"podSelector\": {{\"matchLabels\": {{\"app\": \"odd\"}}}}, \"ingress\": \
             [{{\"ports\": {ports}}}]}}}}"
        )
    };
    bed.plane.apply(&policy("[{\"port\": 80}]")).unwrap();

    let mut node = Node::new("said-pods", &bed).unwrap();
    node.start_agent(&["--sandboxed-runtime-classes", "microvm"])
        .unwrap();
    for class in ["gvisor", "kata-qemu", "microvm"] {
        event(
            &bed,
            "mesh",
            class,
            "CulvertRefused",
            "istio.io/dataplane-mode=none",
        )
        .await;
        node.until_state("mesh", class, "refused").unwrap();
        condition(&bed, class, Some("Refused"), "istio.io/dataplane-mode=none").await;
    }
    // The node's own runtime is none of them; that pod has no process here, and that is said.
    event(
        &bed,
        "mesh",
        "runc",
        "CulvertEnrolmentFailed",
        "no running process",
    )
    .await;
    condition(&bed, "runc", Some("Failing"), "no running process").await;
    event(&bed, "mesh", "odd", "CulvertIgnored", "perhaps").await;
    event(
        &bed,
        "mesh",
        "odd",
        "CulvertNetworkPolicy",
        "add port 15008",
    )
    .await;
    node.until(
        "counted",
        || Ok(node.metric("culvert_failing_pods")? >= 3.0),
    )
    .unwrap();
    let warns = |text: &str| {
        let pod = node.pod("mesh", "odd").unwrap();
        pod["warnings"].to_string().contains(text)
    };
    assert!(warns("only-http"));
    // Mended: nothing is said of it any more.
    bed.plane
        .apply(&policy(
            "[{\"port\": 80}, {\"port\": 15000, \"endPort\": 15010}]",
        ))
        .unwrap();
    node.until("the policy is in nobody's way", || Ok(!warns("only-http")))
        .unwrap();
    bed.plane.apply(&policy("[{\"port\": 80}]")).unwrap();
    node.until("it is again", || Ok(warns("only-http")))
        .unwrap();
    bed.plane
        .kubectl(&[
            "delete",
            "networkpolicy",
            "only-http",
            "-n",
            "mesh",
            IN_TIME,
        ])
        .unwrap();
    node.until("gone", || Ok(!warns("only-http"))).unwrap();
    // Whoever asks for the mesh no more needs no excuse, not even when it was another agent that gave it.
    let none = json!({"labels": {"istio.io/dataplane-mode": "none"}});
    bed.patch_pod("mesh", "gvisor", none.clone()).await.unwrap();
    bed.patch_pod("mesh", "runc", none.clone()).await.unwrap();
    condition(&bed, "gvisor", None, "").await;
    condition(&bed, "runc", None, "").await;
    node.stop_agent().unwrap();
    bed.patch_pod("mesh", "microvm", none).await.unwrap();
    condition(&bed, "microvm", Some("Refused"), "").await;
    node.start_agent(&[]).unwrap();
    condition(&bed, "microvm", None, "").await;
    condition(&bed, "kata-qemu", Some("Refused"), "").await;
    node.stop_agent().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_somebody_takes_away_in_a_pod_is_put_back_and_said() {
    logs();
    let bed = Bed::start("said-repairs").await.unwrap();
    bed.namespace("mesh", mode("ambient")).await.unwrap();
    let mut node = Node::new("said-repairs", &bed).unwrap();
    node.start_agent(&[]).unwrap();
    node.until("ready", || Ok(node.status(&[])?.status.success()))
        .unwrap();
    node.start_ztunnel().unwrap();
    for name in ["robbed", "beside"] {
        let ns = node.lab.pod(name).unwrap();
        let pod = bed.pod("mesh", name, NODE, json!({})).await.unwrap();
        node.container(&pod.metadata.uid.unwrap(), "app", &ns)
            .unwrap();
        bed.status("mesh", name, running(&ns).unwrap())
            .await
            .unwrap();
        node.until_state("mesh", name, "enrolled").unwrap();
        if name == "robbed" {
            let turn = Rule {
                fwmark: Some((0x111, 0xff5)),
                pref: Some(0),
                ..Rule::fwmark(Family::V4, 0, 15001)
            };
            ns.del_rule(&turn).unwrap();
        }
    }
    event(&bed, "mesh", "robbed", "CulvertRepaired", "0x111/0xff5").await;
    assert!(
        node.metric("culvert_repairs_total{kind=\"rules\"}")
            .unwrap()
            >= 1.0
    );
    let events = kube::Api::<Event>::namespaced(bed.admin.clone(), "mesh");
    let all = events.list(&ListParams::default()).await.unwrap().items;
    let beside = all.iter().filter(|e| {
        e.regarding.as_ref().and_then(|r| r.name.as_deref()) == Some("beside")
            && e.reason.as_deref() == Some("CulvertRepaired")
    });
    assert_eq!(beside.count(), 0, "nothing was taken from it");
    node.stop_agent().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cilium_beside_us_is_judged_as_it_changes() {
    logs();
    let bed = Bed::start("said-cilium").await.unwrap();
    let config = |pairs: &[(&str, &str)]| {
        let data: serde_json::Map<_, _> = pairs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), json!(v)))
            .collect();
        let map = json!({"apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": "cilium-config", "namespace": "kube-system"}, "data": data});
        bed.plane.apply(&map.to_string()).unwrap();
    };
    let mut node = Node::new("said-cilium", &bed).unwrap();
    node.start_agent(&[]).unwrap();
    node.until("ready without Cilium", || {
        let task = node.task("cilium")?;
        Ok(task["ready"] == true && task["reason"] == "" && node.status(&[])?.status.success())
    })
    .unwrap();

    // It is installed, and is to be the only CNI.
    config(&[
        ("cni-exclusive", "true"),
        ("kube-proxy-replacement", "true"),
        ("bpf-lb-sock-hostns-only", "true"),
    ]);
    event(
        &bed,
        "default",
        NODE,
        "CulvertCiliumExclusive",
        "cni.exclusive=false",
    )
    .await;
    let exclusive = "culvert_cilium_findings{setting=\"cni_exclusive\"}";
    let socket_lb = "culvert_cilium_findings{setting=\"socket_lb\"}";
    node.until("counted", || Ok(node.metric(exclusive)? == 1.0))
        .unwrap();
    let status = node.status(&[]).unwrap();
    assert!(
        status.status.success(),
        "the mesh works all the same: {status:?}"
    );
    assert!(status.stdout.contains("cni.exclusive=false"), "{status:?}");
    assert!(
        node.page(8000, "/readyz")
            .unwrap()
            .contains("cni.exclusive=false")
    );

    // Another fault, the first mended.
    config(&[
        ("cni-exclusive", "false"),
        ("kube-proxy-replacement", "true"),
        ("bpf-lb-sock-hostns-only", "false"),
    ]);
    event(
        &bed,
        "default",
        NODE,
        "CulvertCiliumSocketLB",
        "socketLB.hostNamespaceOnly=true",
    )
    .await;
    node.until("counted", || {
        Ok(node.metric(exclusive)? == 0.0 && node.metric(socket_lb)? == 1.0)
    })
    .unwrap();

    // Two that capture: not ready, and the next agent does not begin.
    config(&[("enable-ztunnel", "true")]);
    node.until("not ready", || {
        let task = node.task("cilium")?;
        let why = task["reason"].as_str().unwrap_or_default().to_owned();
        Ok(task["ready"] == false && why.contains("encryption.enabled=false"))
    })
    .unwrap();
    node.stop_agent().unwrap();
    let agent = node.start_agent(&[]).unwrap();
    assert!(!agent.wait(LONG).unwrap().success());
    let said = agent.stderr();
    assert!(
        said.contains("two programs would capture the same pods")
            && said.contains("encryption.enabled=false"),
        "{said}"
    );

    // All in order again.
    config(&[("enable-ztunnel", "false"), ("cni-exclusive", "false")]);
    node.start_agent(&[]).unwrap();
    node.until("in order", || Ok(node.task("cilium")?["ready"] == true))
        .unwrap();
    bed.plane
        .kubectl(&[
            "delete",
            "configmap",
            "cilium-config",
            "-n",
            "kube-system",
            IN_TIME,
        ])
        .unwrap();
    node.until("nothing to say", || {
        let task = node.task("cilium")?;
        Ok(task["ready"] == true && task["reason"] == "")
    })
    .unwrap();
    node.stop_agent().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_without_its_rights_says_which_it_lacks() {
    logs();
    let bed = Bed::start("said-rights").await.unwrap();
    bed.plane
        .apply(&rbac::manifests(|_, _| false).unwrap())
        .unwrap();
    let mut node = Node::new("said-rights", &bed).unwrap();
    node.start_agent(&[]).unwrap();
    node.until("not ready, and why", || {
        let text = node.page(8000, "/readyz")?;
        Ok(text.starts_with("HTTP/1.1 503")
            && text.contains("namespaces is forbidden")
            && text.contains("the chart's ClusterRole lists what is needed"))
    })
    .unwrap();
    assert!(
        node.page(8000, "/healthz")
            .unwrap()
            .starts_with("HTTP/1.1 200")
    );
    bed.plane
        .apply(&rbac::manifests(|_, _| true).unwrap())
        .unwrap();
    node.until("ready as soon as they are granted", || {
        Ok(node.page(8000, "/readyz")?.starts_with("HTTP/1.1 200"))
    })
    .unwrap();

    // Later, an API server that is away is no reason to be not ready; it is said all the same.
    tokio::task::block_in_place(|| bed.plane.stop_api_server()).unwrap();
    node.until("what is known stays valid", || {
        let text = node.page(8000, "/readyz")?;
        Ok(text.starts_with("HTTP/1.1 200")
            && text.contains("check that the API server can be reached"))
    })
    .unwrap();
    tokio::task::block_in_place(|| bed.plane.start_api_server()).unwrap();
    node.until("nothing to say", || {
        let task = node.task("watch")?;
        Ok(task["ready"] == true && task["reason"] == "")
    })
    .unwrap();
    node.stop_agent().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn preflight_finds_what_the_cluster_refuses_before_an_agent_does() {
    logs();
    let bed = Bed::start("said-preflight").await.unwrap();
    let node = Node::new("said-preflight", &bed).unwrap();
    let whole = node.preflight().unwrap();
    assert!(whole.status.success(), "{whole:?}");
    assert!(
        whole.stdout.contains("right on pods/status") && whole.stdout.contains("not installed"),
        "{whole:?}"
    );
    // A right less, and a setting of Cilium's.
    let without =
        rbac::manifests(|rule, verb| rule.resource != "networkpolicies" || verb != "watch");
    bed.plane.apply(&without.unwrap()).unwrap();
    bed.plane
        .kubectl(&[
            "create",
            "configmap",
            "cilium-config",
            "-n",
            "kube-system",
            "--from-literal=cni-exclusive=true",
        ])
        .unwrap();
    node.until("the authoriser knows", || {
        Ok(!node.preflight()?.status.success())
    })
    .unwrap();
    node.until("both are named", || {
        let found = node.preflight()?;
        Ok(
            ["refused: watch", "in a ClusterRole", "cni.exclusive=false"]
                .iter()
                .all(|text| found.stdout.contains(text)),
        )
    })
    .unwrap();
    bed.plane
        .apply(&rbac::manifests(|_, _| false).unwrap())
        .unwrap();
    node.until("everything that is refused is listed at once", || {
        let found = node.preflight()?;
        Ok(found.stdout.matches("refused: ").count() == culvert::watch::rbac::RULES.len())
    })
    .unwrap();
}
