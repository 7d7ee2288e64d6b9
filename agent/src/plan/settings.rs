//! What decides, beside pods and namespaces, who is in the mesh: selectors, excluded namespaces, switches.
//!
//! Read from YAML; says what is wrong with it, and never falls back to something else in silence.

use std::collections::BTreeSet;

use serde::Deserialize;

use super::selector::{LabelSelector, Labels};
use crate::model::keys;

/// A pod is selected if both match.
#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Selector {
    /// On the pod's labels.
    pub pod_selector: LabelSelector,
    /// On its namespace's labels.
    pub namespace_selector: LabelSelector,
}

/// The settings; each default is that of istio-cni, where it has the setting.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Settings {
    /// A pod that one of these selects is in the mesh.
    pub selectors: Vec<Selector>,
    /// Namespaces whose pods are never in the mesh, whatever their labels say.
    pub excluded_namespaces: BTreeSet<String>,
    /// Where ztunnel runs.
    pub system_namespace: String,
    /// Capture DNS, unless the pod's annotation says otherwise.
    pub dns: bool,
    /// Capture IPv6.
    pub ipv6: bool,
    /// Runtime classes that keep a pod's sockets away from this kernel, beside the known ones; a `*` at the end
    /// stands for any ending.
    pub sandboxed_runtime_classes: Vec<String>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            selectors: default_selectors(),
            excluded_namespaces: ["kube-system".into()].into(),
            system_namespace: "istio-system".into(),
            dns: true,
            ipv6: true,
            sandboxed_runtime_classes: Vec::new(),
        }
    }
}

/// A pod labelled `ambient`, or one not labelled `none` in a namespace labelled `ambient`.
#[must_use]
pub fn default_selectors() -> Vec<Selector> {
    let ambient = || LabelSelector::equal(keys::DATAPLANE_MODE, keys::AMBIENT);
    vec![
        Selector {
            pod_selector: ambient(),
            namespace_selector: LabelSelector::default(),
        },
        Selector {
            pod_selector: LabelSelector::not_equal(keys::DATAPLANE_MODE, keys::NONE),
            namespace_selector: ambient(),
        },
    ]
}

/// Reads the YAML list that istio-cni takes as `AMBIENT_ENABLEMENT_SELECTOR`.
pub fn parse_selectors(yaml: &str) -> Result<Vec<Selector>, String> {
    if yaml.trim().is_empty() {
        return Ok(Vec::new());
    }
    serde_saphyr::from_str(yaml).map_err(|e| {
        format!("not a YAML list of {{podSelector, namespaceSelector}} with matchLabels and matchExpressions: {e}")
    })
}

impl Settings {
    /// Label selectors, one for each request, that find all pods asking for the mesh by labels of their own.
    #[must_use]
    pub fn opt_in_selectors(&self) -> BTreeSet<String> {
        self.selectors
            .iter()
            .filter(|s| s.pod_selector.wants_a_label())
            .map(|s| s.pod_selector.to_string())
            .collect()
    }

    /// Whether a pod of this runtime class has its sockets in another kernel than the node's.
    #[must_use]
    pub fn is_sandboxed(&self, runtime_class: &str) -> bool {
        const KNOWN: [&str; 3] = ["gvisor*", "runsc*", "kata*"];
        let own = self.sandboxed_runtime_classes.iter().map(String::as_str);
        KNOWN
            .into_iter()
            .chain(own)
            .any(|pattern| match pattern.strip_suffix('*') {
                Some(start) => runtime_class.starts_with(start),
                None => runtime_class == pattern,
            })
    }

    /// Whether a pod with nothing of its own could be in the mesh there, or a pod there has asked for it: where this
    /// is false, pods may start without the agent.
    #[must_use]
    pub fn could_be_in(&self, namespace: &str, labels: &Labels, opted_in: usize) -> bool {
        !self.excluded_namespaces.contains(namespace)
            && (opted_in > 0
                || self.selectors.iter().any(|s| {
                    s.namespace_selector.matches(labels) && !s.pod_selector.wants_a_label()
                }))
    }
}
