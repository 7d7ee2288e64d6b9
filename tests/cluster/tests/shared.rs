//! The cluster that tests share: that a namespace of one's own works, in parallel, and that port-forward does.

use culvert_cluster::{Cluster, Namespace, Options};

const SERVER: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: web}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: web
    image: culvert.test/busybox:1
    command: [sh, -c, "mkdir /www; echo hello > /www/index.html; exec httpd -f -p 8080 -h /www"]
    readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1, timeoutSeconds: 20}
"#;

fn serve<'a>(cluster: &'a Cluster, name: &str) -> anyhow::Result<Namespace<'a>> {
    let namespace = cluster.namespace(name, &["culvert.test/shared=yes"])?;
    namespace.apply(SERVER)?;
    namespace.wait_until_ready()?;
    Ok(namespace)
}

fn options() -> Options {
    Options {
        name: "shared".to_owned(),
        ..Options::default()
    }
}

#[test]
fn a_test_has_its_namespace_to_itself() {
    let cluster = Cluster::shared(&options()).unwrap();
    let namespace = serve(cluster, "own").unwrap();
    let pods = namespace.kubectl(&["get", "pods", "-o", "name"]).unwrap();
    assert_eq!(pods, "pod/web\n");
    let hello = namespace
        .exec("web", &["curl", "-sSf", "http://127.0.0.1:8080/"])
        .unwrap();
    assert_eq!(hello, "hello\n");
    let labels = ["get", "namespace", "own", "--show-labels"];
    assert!(
        cluster
            .kubectl(&labels)
            .unwrap()
            .contains("culvert.test/shared=yes")
    );
}

#[test]
fn port_forward_reaches_a_pod() {
    let cluster = Cluster::shared(&options()).unwrap();
    let namespace = serve(cluster, "forward").unwrap();
    let answer = namespace.get_forwarded("web", 8080).unwrap();
    assert!(answer.ends_with("hello\n"), "{answer}");
}
