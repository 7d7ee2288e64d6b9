//! The control plane alone: what it promises to the tests that watch a real API server.

use std::time::{Duration, Instant};

use culvert_cluster::{ControlPlane, Kubectl};

const ACCOUNT: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: mesh}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: agent, namespace: mesh}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: agent}
rules:
- {apiGroups: [""], resources: [pods], verbs: [get, list, watch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: agent}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: agent}
subjects: [{kind: ServiceAccount, name: agent, namespace: mesh}]
"#;

const POD: &str = r#"
apiVersion: v1
kind: Node
metadata: {name: node1}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: mesh}
spec: {nodeName: node1, containers: [{name: web, image: "web:1"}]}
"#;

#[test]
fn a_service_account_may_do_what_its_role_says_and_nothing_else() {
    let api = ControlPlane::start("rbac").unwrap();
    api.apply(ACCOUNT).unwrap();
    api.apply(POD).unwrap();
    let agent = Kubectl::new(api.kubeconfig_for("mesh", "agent").unwrap());
    let pod = agent.get(&["pod", "web", "-n", "mesh"]).unwrap();
    assert_eq!(pod["spec"]["nodeName"], "node1");
    let refused = agent
        .run(&["get", "secrets", "-A"])
        .unwrap_err()
        .to_string();
    assert!(refused.contains("Forbidden"), "{refused}");
    let who = agent.run(&["auth", "whoami"]).unwrap();
    assert!(who.contains("system:serviceaccount:mesh:agent"), "{who}");
    let version = api.admin().run(&["version", "-o", "json"]).unwrap();
    assert!(version.contains("\"gitVersion\": \"v1.36"), "{version}");
}

#[test]
fn a_node_is_held_to_itself_by_the_node_authoriser() {
    let api = ControlPlane::start("node-auth").unwrap();
    api.apply(ACCOUNT).unwrap();
    api.apply(POD).unwrap();
    let node = api
        .kubeconfig_of_user("system:node:node2", "system:nodes")
        .unwrap();
    let node = Kubectl::new(node);
    let refused = node.run(&["get", "node", "node1"]).unwrap_err().to_string();
    assert!(refused.contains("only its own Node object"), "{refused}");
    assert!(node.run(&["get", "services", "-A"]).is_ok());
}

#[test]
fn the_api_server_goes_and_comes_back_with_all_it_knew() {
    let api = ControlPlane::start("restart").unwrap();
    api.apply(ACCOUNT).unwrap();
    let kubeconfig = api.kubeconfig_for("mesh", "agent").unwrap();
    api.stop_api_server().unwrap();
    let away = api.kubectl(&["get", "namespaces"]).unwrap_err().to_string();
    assert!(away.contains("refused"), "{away}");
    api.start_api_server().unwrap();
    let pods = Kubectl::new(kubeconfig).get(&["pods", "-A"]).unwrap();
    assert_eq!(pods["items"].as_array().map(Vec::len), Some(0));
}

#[test]
fn two_side_by_side_know_nothing_of_each_other_and_leave_nothing() {
    let started = Instant::now();
    let one = ControlPlane::start("pair").unwrap();
    let single = started.elapsed();
    let two = ControlPlane::start("pair").unwrap();
    eprintln!("started in {single:?}");
    one.apply(ACCOUNT).unwrap();
    assert!(two.kubectl(&["get", "namespace", "mesh"]).is_err());
    let (scratch, url) = (one.scratch().to_path_buf(), one.url());
    assert!(scratch.is_dir());
    drop(one);
    assert!(!scratch.exists());
    assert!(two.kubectl(&["get", "namespace", "default"]).is_ok());
    let address = url.trim_start_matches("https://").parse().unwrap();
    let gone = std::net::TcpStream::connect_timeout(&address, Duration::from_secs(5));
    assert!(gone.is_err(), "{url} still answers");
}
