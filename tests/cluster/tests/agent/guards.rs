//! What tests take away or change for a while on the cluster that they share, put back whatever becomes of the test. What
//! is to be known about a failure is written down before that.

use culvert_cluster::{AGENT, IN_TIME, Mesh, Node, Service};

use crate::bed::Bed;
use crate::installation::of_agent;

/// Puts something back, and says so when that fails: in a failing test nothing more can be done.
fn back(bed: &Bed, what: &str, put: impl FnOnce() -> anyhow::Result<()>) {
    bed.keep_if_failing();
    if let Err(error) = put() {
        eprintln!("putting {what} back: {error:#}");
    }
}

/// Culvert, as it is to be.
pub(crate) struct Culvert<'a>(pub(crate) &'a Bed);

impl Drop for Culvert<'_> {
    fn drop(&mut self) {
        back(self.0, "Culvert", || Mesh::install_again(self.0.cluster));
    }
}

/// The label of nodes that the DaemonSet is to pass over, once it has been told.
pub(crate) const OFF: &str = "culvert.test/off";

/// An agent on each node, none passed over by [`OFF`].
pub(crate) struct OnEveryNode<'a>(pub(crate) &'a Bed);

impl OnEveryNode<'_> {
    /// Labels a node, or takes the label away (`OFF-`).
    pub(crate) fn label(&self, node: &str, label: &str) {
        let args = ["label", "node", node, "--overwrite", label];
        self.0.cluster.kubectl(&args).unwrap();
    }

    /// From now on nodes with the label have no agent.
    pub(crate) fn pass_over_labelled(&self) {
        let unlabelled = serde_json::json!({"nodeSelectorTerms": [
            {"matchExpressions": [{"key": OFF, "operator": "DoesNotExist"}]},
        ]});
        let affinity = serde_json::json!({"nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": unlabelled,
        }});
        let patch = serde_json::json!({"spec": {"template": {"spec": {"affinity": affinity}}}});
        let patch = ["patch", "daemonset", AGENT.0, "-p", &patch.to_string()];
        of_agent(self.0, &patch);
    }
}

impl Drop for OnEveryNode<'_> {
    fn drop(&mut self) {
        back(self.0, "agents on every node", || {
            let unlabel = ["label", "nodes", "--all", &format!("{OFF}-")];
            let unlabelled = self.0.cluster.kubectl(&unlabel);
            Mesh::install_again(self.0.cluster).and(unlabelled.map(drop))
        });
    }
}

/// The API server is off.
pub(crate) struct ApiServerOff<'a>(&'a Bed);

impl<'a> ApiServerOff<'a> {
    pub(crate) fn begin(bed: &'a Bed) -> Self {
        let off = Self(bed);
        bed.cluster.stop_api_server().unwrap();
        off
    }
}

impl Drop for ApiServerOff<'_> {
    fn drop(&mut self) {
        // Nobody can be asked before.
        let started = self.0.cluster.start_api_server();
        back(self.0, "the API server", || started);
    }
}

/// Agents with tokens that are worth something: where a test leaves others, they are replaced by new ones.
pub(crate) struct Tokens<'a>(pub(crate) &'a Bed);

impl Drop for Tokens<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        back(self.0, "the agents' tokens", || {
            let label = format!("app.kubernetes.io/name={}", AGENT.0);
            let delete = ["delete", "pod", "-n", AGENT.1, "-l", &label, IN_TIME];
            Mesh::install_again(self.0.cluster)?;
            self.0.cluster.kubectl(&delete)?;
            self.0.mesh.wait_for_rollout(AGENT.0, AGENT.1)
        });
    }
}

/// A service of a node is off.
pub(crate) struct ServiceOff<'a>(&'a Bed, Node, Service);

impl<'a> ServiceOff<'a> {
    pub(crate) fn begin(bed: &'a Bed, node: &Node, service: Service) -> Self {
        let off = Self(bed, node.clone(), service);
        bed.cluster.stop_service(node, service).unwrap();
        off
    }
}

impl Drop for ServiceOff<'_> {
    fn drop(&mut self) {
        back(self.0, "a service of a node", || {
            self.0.cluster.start_service(&self.1, self.2)
        });
    }
}

/// A node is off.
pub(crate) struct PowerOff<'a>(&'a Bed, Node);

impl<'a> PowerOff<'a> {
    pub(crate) fn begin(bed: &'a Bed, node: &Node) -> Self {
        let off = Self(bed, node.clone());
        bed.cluster.power_off(node).unwrap();
        off
    }
}

impl Drop for PowerOff<'_> {
    fn drop(&mut self) {
        let services = [Service::Kubelet, Service::KubeProxy];
        back(self.0, "a node", || {
            self.0.cluster.power_on(&self.1, &services)
        });
    }
}
