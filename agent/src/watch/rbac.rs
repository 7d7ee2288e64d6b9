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
    /// Verbs.
    pub verbs: &'static [&'static str],
    /// What for.
    pub why: &'static str,
}

/// All that is needed, and nothing else.
pub const RULES: [Rule; 7] = [
    Rule {
        scope: Scope::Cluster,
        group: "",
        resource: "pods",
        verbs: &["get", "list", "watch"],
        why: "pods of this node; those of all nodes, metadata only, that ask for the mesh by a label; the pod of an ADD \
              that the watch has not shown yet",
    },
    Rule {
        scope: Scope::Cluster,
        group: "",
        resource: "pods/status",
        verbs: &["patch"],
        why: "annotation ambient.istio.io/redirection, from which istiod knows that a pod speaks HBONE",
    },
    Rule {
        scope: Scope::Cluster,
        group: "",
        resource: "namespaces",
        verbs: &["list", "watch"],
        why: "labels that put a namespace's pods into the mesh",
    },
    Rule {
        scope: Scope::Cluster,
        group: "events.k8s.io",
        resource: "events",
        verbs: &["create", "patch"],
        why: "events on pods and nodes: refusals, failures, repairs",
    },
    Rule {
        scope: Scope::Cluster,
        group: "",
        resource: "nodes",
        verbs: &["get"],
        why: "on SIGTERM: whether the DaemonSet still selects this node, by the node's labels",
    },
    Rule {
        scope: Scope::Own,
        group: "apps",
        resource: "daemonsets",
        verbs: &["get"],
        why: "on SIGTERM: whether this is an upgrade or a removal",
    },
    Rule {
        scope: Scope::Namespace("kube-system"),
        group: "",
        resource: "configmaps",
        verbs: &["get"],
        why: "cilium-config: settings of Cilium that the mesh depends on",
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
