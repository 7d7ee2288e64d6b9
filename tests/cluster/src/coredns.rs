//! CoreDNS as a cluster's DNS: one pod, behind the service that kubelets' pods are told to ask. It answers a few names of
//! its own, so that a test can tell who answered; it knows nothing of the cluster's services.

use std::net::Ipv4Addr;

use anyhow::Result;

use crate::cluster::Cluster;
use crate::image::Image;
use crate::parts::Part;

/// The service's address.
pub const KUBE_DNS: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const IMAGE: &str = "culvert.test/coredns:1";

/// Installs it and waits until it answers probes. Every name has this address, and none of IPv6.
///
/// # Errors
/// When CoreDNS has not been built (the error says how to), or does not become ready.
pub fn install(cluster: &Cluster, answer: Ipv4Addr) -> Result<()> {
    let image = Image::new(IMAGE)
        .program("bin/coredns", cluster.parts().get(Part::Coredns)?)?
        .entrypoint(&["/bin/coredns"]);
    cluster.add_image(&image)?;
    cluster.apply(&manifests(answer))?;
    let args = [
        "wait",
        "--for=condition=Ready",
        "pod/coredns",
        "-n",
        "kube-system",
        "--timeout=180s",
    ];
    cluster.kubectl(&args).map(drop)
}

fn manifests(answer: Ipv4Addr) -> String {
    format!(
        r#"
apiVersion: v1
kind: ConfigMap
metadata: {{name: coredns, namespace: kube-system}}
data:
  Corefile: |
    .:53 {{
      errors
      ready
      template IN A . {{
        answer "{{{{ .Name }}}} 5 IN A {answer}"
      }}
      template IN AAAA . {{
        rcode NOERROR
      }}
    }}
---
apiVersion: v1
kind: Pod
metadata: {{name: coredns, namespace: kube-system, labels: {{k8s-app: kube-dns}}}}
spec:
  dnsPolicy: Default
  terminationGracePeriodSeconds: 1
  containers:
  - name: coredns
    image: {IMAGE}
    args: [-conf, /etc/coredns/Corefile]
    readinessProbe: {{httpGet: {{path: /ready, port: 8181}}, periodSeconds: 1, timeoutSeconds: 20}}
    volumeMounts: [{{name: config, mountPath: /etc/coredns}}]
  volumes:
  - {{name: config, configMap: {{name: coredns}}}}
---
apiVersion: v1
kind: Service
metadata: {{name: kube-dns, namespace: kube-system}}
spec:
  selector: {{k8s-app: kube-dns}}
  clusterIP: {KUBE_DNS}
  ports:
  - {{name: dns, port: 53, protocol: UDP}}
  - {{name: dns-tcp, port: 53, protocol: TCP}}
"#
    )
}
