//! What the tests of the mesh share: a server on each node which is a client too, and everybody asking everybody.

use std::net::{IpAddr, SocketAddr};

use culvert_cluster::{Cluster, Namespace};
use serde_json::Value;

/// A server on each node, which is a client too.
pub(crate) fn webs() -> String {
    ["node1", "node2"]
        .map(|node| {
            format!(
                r#"
apiVersion: v1
kind: Pod
metadata: {{name: web-{node}, labels: {{app: web}}}}
spec:
  nodeName: {node}
  terminationGracePeriodSeconds: 1
  containers:
  - name: web
    image: culvert.test/busybox:1
    command: [sh, -c, "mkdir /www; echo {node} > /www/index.html; exec httpd -f -p 8080 -h /www"]
    readinessProbe: {{httpGet: {{path: /, port: 8080}}, periodSeconds: 1}}
    livenessProbe: {{tcpSocket: {{port: 8080}}, periodSeconds: 1}}
"#
            )
        })
        .join("---")
}

/// Every pod asks every pod, by both families; the answer has to be the right one's.
pub(crate) fn everybody_asks_everybody(cluster: &Cluster, namespace: &Namespace<'_>) -> usize {
    let pods = cluster
        .admin()
        .get(&["pods", "-n", namespace.name()])
        .unwrap();
    let pods: &[Value] = pods["items"].as_array().unwrap();
    let mut asked = 0;
    for (client, server) in pods.iter().flat_map(|c| pods.iter().map(move |s| (c, s))) {
        let client = client["metadata"]["name"].as_str().unwrap();
        for address in server["status"]["podIPs"].as_array().unwrap() {
            let address: IpAddr = address["ip"].as_str().unwrap().parse().unwrap();
            let url = format!("http://{}/", SocketAddr::new(address, 8080));
            let ask = ["curl", "-sSfg", "--max-time", "20", &url];
            let answer = namespace.exec(client, &ask).unwrap();
            assert_eq!(answer.trim(), server["spec"]["nodeName"].as_str().unwrap());
            asked += 1;
        }
    }
    asked
}
