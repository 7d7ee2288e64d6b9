//! What the agent may do at the API server, with the reason for each line: the chart's roles and a test are made from it.

use std::fmt;

/// Where a rule is needed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scope {
    /// Everywhere: a `ClusterRole`.
    Cluster,
    /// In the agent's own namespace only: a `Role` there.
    Own,
    /// In this namespace only: a `Role` there.
    Namespace(&'static str),
}

/// One rule.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rule {
    /// Where.
    pub scope: Scope,
    /// API group; empty for the core.
    pub group: &'static str,
    /// Resource, with its subresource.
    pub resource: &'static str,
    /// Only objects of these names; all where there are none.
    pub names: &'static [&'static str],
    /// Verbs.
    pub verbs: &'static [&'static str],
    /// What for.
    pub why: &'static str,
}

/// All that is needed, and nothing else.
pub const RULES: [Rule; 8] = [
    Rule {
        scope: Scope::Cluster,
        group: "",
        resource: "pods",
        names: &[],
        verbs: &["get", "list", "watch"],
        why: "pods of this node; those of all nodes, metadata only, that ask for the mesh by a label; the pod of an ADD \
              that the watch has not shown yet",
    },
    Rule {
        scope: Scope::Cluster,
        group: "",
        resource: "pods/status",
        names: &[],
        verbs: &["patch"],
        why: "annotation ambient.istio.io/redirection, from which istiod knows that a pod speaks HBONE; condition \
              culvert.dev/Captured of pods that cannot be enrolled",
    },
    Rule {
        scope: Scope::Cluster,
        group: "",
        resource: "namespaces",
        names: &[],
        verbs: &["list", "watch"],
        why: "labels that put a namespace's pods into the mesh",
    },
    Rule {
        scope: Scope::Cluster,
        group: "networking.k8s.io",
        resource: "networkpolicies",
        names: &[],
        verbs: &["list", "watch"],
        why: "policies that cut pods off from the mesh, which is said in an event",
    },
    Rule {
        scope: Scope::Cluster,
        group: "events.k8s.io",
        resource: "events",
        names: &[],
        verbs: &["create", "patch"],
        why: "events on pods and nodes: refusals, failures, repairs",
    },
    Rule {
        scope: Scope::Cluster,
        group: "",
        resource: "nodes",
        names: &[],
        verbs: &["get"],
        why: "on SIGTERM: whether the DaemonSet still selects this node, by the node's labels",
    },
    Rule {
        scope: Scope::Own,
        group: "apps",
        resource: "daemonsets",
        names: &["culvert"],
        verbs: &["get"],
        why: "on SIGTERM: whether this is an upgrade or a removal",
    },
    Rule {
        scope: Scope::Namespace("kube-system"),
        group: "",
        resource: "configmaps",
        names: &["cilium-config"],
        verbs: &["get", "list", "watch"],
        why: "settings of Cilium that the mesh depends on",
    },
];

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let group = if self.group.is_empty() {
            "core"
        } else {
            self.group
        };
        write!(
            f,
            "{group} {}: {} ({})",
            self.resource,
            self.verbs.join(", "),
            self.why
        )
    }
}
