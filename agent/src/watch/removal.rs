//! Upgrade or removal: whether the DaemonSet that the agent belongs to still wants an agent on this node.
//!
//! Judges as the DaemonSet controller does: node selector and required node affinity. When it cannot tell, it says so;
//! what is in place then stays.

use std::collections::BTreeMap;

use k8s_openapi::api::{
    apps::v1::DaemonSet,
    core::v1::{Node, NodeSelectorRequirement, NodeSelectorTerm},
};

use super::error::Error;

/// What the agent is to make of its end.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Standing {
    /// Another agent will follow: leave everything in place.
    Stays,
    /// None will follow, for this reason: take plugin and configuration away.
    Removed(String),
    /// Cannot tell, for this reason: leave everything in place.
    Unknown(String),
}

/// The server did not answer the question.
pub(super) fn unanswered(error: Error) -> Standing {
    if error.code == 401 {
        Standing::Removed("the agent's service account is gone: its token is refused".into())
    } else {
        Standing::Unknown(error.to_string())
    }
}

/// What can be told without knowing the node.
pub(super) fn without_node(daemonset: &DaemonSet) -> Option<Standing> {
    let deleting = daemonset.metadata.deletion_timestamp.is_some();
    deleting.then(|| Standing::Removed("its DaemonSet is being deleted".into()))
}

/// Whether the DaemonSet selects the node.
pub(super) fn on_node(daemonset: &DaemonSet, node: &Node) -> Standing {
    let empty = BTreeMap::new();
    let labels = node.metadata.labels.as_ref().unwrap_or(&empty);
    let Some(spec) = daemonset
        .spec
        .as_ref()
        .and_then(|s| s.template.spec.as_ref())
    else {
        return Standing::Unknown("its DaemonSet has no pod template".into());
    };
    let selected = spec
        .node_selector
        .iter()
        .flatten()
        .all(|(key, value)| labels.get(key) == Some(value));
    let terms = spec
        .affinity
        .as_ref()
        .and_then(|a| a.node_affinity.as_ref())
        .and_then(|a| {
            a.required_during_scheduling_ignored_during_execution
                .as_ref()
        })
        .map(|required| &required.node_selector_terms);
    let name = node.metadata.name.as_deref().unwrap_or_default();
    let wanted = terms.is_none_or(|terms| terms.iter().any(|t| term(t, name, labels)));
    if selected && wanted {
        Standing::Stays
    } else {
        Standing::Removed("its DaemonSet no longer selects this node".into())
    }
}

/// A term without requirements matches nothing.
fn term(term: &NodeSelectorTerm, name: &str, labels: &BTreeMap<String, String>) -> bool {
    let fields: BTreeMap<String, String> = [("metadata.name".into(), name.into())].into();
    let by_label = term.match_expressions.iter().flatten();
    let by_field = term.match_fields.iter().flatten();
    let mut all = by_label
        .map(|r| requirement(r, labels))
        .chain(by_field.map(|r| requirement(r, &fields)))
        .peekable();
    all.peek().is_some() && all.all(|holds| holds)
}

fn requirement(r: &NodeSelectorRequirement, on: &BTreeMap<String, String>) -> bool {
    let value = on.get(&r.key);
    let values = r.values.as_deref().unwrap_or_default();
    let number = |text: &String| text.parse::<i64>().ok();
    let compare = |holds: fn(i64, i64) -> bool| {
        let (Some(have), Some(bound)) = (value.and_then(number), values.first().and_then(number))
        else {
            return false;
        };
        holds(have, bound)
    };
    match r.operator.as_str() {
        "In" => value.is_some_and(|v| values.contains(v)),
        "NotIn" => value.is_none_or(|v| !values.contains(v)),
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => compare(|a, b| a > b),
        "Lt" => compare(|a, b| a < b),
        // Of a later Kubernetes: what cannot be judged is no reason to take anything away.
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn node(labels: serde_json::Value) -> Node {
        serde_json::from_value(json!({"metadata": {"name": "n1", "labels": labels}})).unwrap()
    }

    fn daemonset(spec: serde_json::Value) -> DaemonSet {
        serde_json::from_value(json!({
            "metadata": {"name": "culvert"},
            "spec": {"selector": {}, "template": {"spec": spec}},
        }))
        .unwrap()
    }

    fn affinity(terms: serde_json::Value) -> DaemonSet {
        daemonset(json!({"containers": [], "affinity": {"nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}}))
    }

    #[test]
    fn selects_as_the_daemonset_controller_does() {
        let labelled = node(json!({"os": "linux", "mesh": "yes", "cpus": "8"}));
        let plain = daemonset(json!({"containers": []}));
        assert_eq!(on_node(&plain, &labelled), Standing::Stays);
        let by_label = daemonset(json!({"containers": [], "nodeSelector": {"mesh": "yes"}}));
        assert_eq!(on_node(&by_label, &labelled), Standing::Stays);
        let relabelled = node(json!({"os": "linux", "mesh": "no"}));
        assert!(matches!(
            on_node(&by_label, &relabelled),
            Standing::Removed(_)
        ));
        for (terms, stays) in [
            (
                json!([{"matchExpressions": [{"key": "os", "operator": "In", "values": ["linux"]},
                                             {"key": "gpu", "operator": "DoesNotExist"}]}]),
                true,
            ),
            (
                json!([{"matchExpressions": [{"key": "mesh", "operator": "NotIn", "values": ["yes"]}]}]),
                false,
            ),
            (
                json!([{"matchExpressions": [{"key": "gpu", "operator": "Exists"}]},
                       {"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n1"]}]}]),
                true,
            ),
            (
                json!([{"matchExpressions": [{"key": "cpus", "operator": "Gt", "values": ["4"]}]}]),
                true,
            ),
            (
                json!([{"matchExpressions": [{"key": "cpus", "operator": "Lt", "values": ["8"]}]}]),
                false,
            ),
            (
                json!([{"matchExpressions": [{"key": "os", "operator": "FromTheFuture", "values": ["x"]}]}]),
                true,
            ),
            (json!([{}]), false),
        ] {
            let got = on_node(&affinity(terms.clone()), &labelled);
            assert_eq!(got == Standing::Stays, stays, "{terms}");
        }
    }

    #[test]
    fn a_deleted_daemonset_is_a_removal_and_no_answer_is_none() {
        let mut going = daemonset(json!({"containers": []}));
        assert_eq!(without_node(&going), None);
        going.metadata.deletion_timestamp =
            serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap();
        assert!(matches!(without_node(&going), Some(Standing::Removed(_))));
        assert!(matches!(
            unanswered(Error::slow("read DaemonSet", "a/b")),
            Standing::Unknown(_)
        ));
    }
}
