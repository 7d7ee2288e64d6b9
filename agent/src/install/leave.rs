//! What happens to the plugin's place when the agent is told to stop: an upgrade leaves it, a removal takes it away.
//!
//! Pure. Who asks the API server hands in what it said; whatever cannot be told is no reason to take anything away.

use std::collections::BTreeMap;

/// What the API server said to a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer<T> {
    /// It is this.
    Is(T),
    /// There is no such object (404).
    Gone,
    /// Our own token counts no more (401): the service account is gone, and with it what it was made for.
    Unauthorized,
    /// No answer, or one that says nothing about the object: time-outs, 403, 5xx.
    Unknown,
}

/// Our DaemonSet, as far as it matters.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct DaemonSet {
    /// `metadata.deletionTimestamp` is set.
    pub deleting: bool,
    /// `spec.template.spec.nodeSelector`.
    pub node_selector: BTreeMap<String, String>,
    /// `requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms`: one of them has to match. None for no affinity.
    pub affinity: Option<Vec<Term>>,
}

/// All of its requirements have to be met; one without any matches nothing.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Term {
    /// `matchExpressions`: about labels.
    pub labels: Vec<Requirement>,
    /// `matchFields`: about `metadata.name`, the only field there is.
    pub fields: Vec<Requirement>,
}

/// One requirement of a [`Term`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Requirement {
    /// The label or field.
    pub key: String,
    /// `In`, `NotIn`, `Exists`, `DoesNotExist`, `Gt`, `Lt`.
    pub operator: String,
    /// What it is compared with.
    pub values: Vec<String>,
}

/// This node.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Node {
    /// `metadata.name`.
    pub name: String,
    /// `metadata.labels`.
    pub labels: BTreeMap<String, String>,
}

/// All there is to decide by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// The administrator wants everything gone at every stop.
    pub disable_safe_upgrade: bool,
    /// Our DaemonSet.
    pub daemon_set: Answer<DaemonSet>,
    /// Our node.
    pub node: Answer<Node>,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leave {
    /// Leave the plugin and its configuration in place.
    Keep,
    /// Take them away. Running pods stay captured all the same.
    Remove,
}

/// Decides, and says why in words for the log.
#[must_use]
pub fn leave_or_remove(facts: &Facts) -> (Leave, &'static str) {
    if facts.disable_safe_upgrade {
        return (Leave::Remove, "safe upgrades are switched off");
    }
    let daemon_set = match &facts.daemon_set {
        Answer::Unauthorized => {
            return (
                Leave::Remove,
                "our token is no longer accepted: the service account is gone",
            );
        }
        Answer::Gone => return (Leave::Remove, "the DaemonSet is gone"),
        Answer::Unknown => {
            return (
                Leave::Keep,
                "cannot tell whether the DaemonSet is still there",
            );
        }
        Answer::Is(daemon_set) if daemon_set.deleting => {
            return (Leave::Remove, "the DaemonSet is being deleted");
        }
        Answer::Is(daemon_set) => daemon_set,
    };
    match &facts.node {
        Answer::Unauthorized => (
            Leave::Remove,
            "our token is no longer accepted: the service account is gone",
        ),
        // A node that was taken out of the cluster may come back with all that is on its disk.
        Answer::Gone => (
            Leave::Keep,
            "cannot tell whether the DaemonSet selects this node: there is no such node",
        ),
        Answer::Unknown => (
            Leave::Keep,
            "cannot tell whether the DaemonSet still selects this node",
        ),
        Answer::Is(node) if selects(daemon_set, node) => (
            Leave::Keep,
            "the DaemonSet is there and selects this node: an upgrade or a restart",
        ),
        Answer::Is(_) => (Leave::Remove, "the DaemonSet no longer selects this node"),
    }
}

fn selects(daemon_set: &DaemonSet, node: &Node) -> bool {
    let selected = daemon_set
        .node_selector
        .iter()
        .all(|(k, v)| node.labels.get(k) == Some(v));
    let preferred = |terms: &Vec<Term>| {
        terms.iter().any(|term| {
            let named = |r: &Requirement| (r.key == "metadata.name").then(|| node.name.clone());
            let some = !term.labels.is_empty() || !term.fields.is_empty();
            some && term
                .labels
                .iter()
                .all(|r| r.met_by(node.labels.get(&r.key)))
                && term.fields.iter().all(|r| r.met_by(named(r).as_ref()))
        })
    };
    selected && daemon_set.affinity.as_ref().is_none_or(preferred)
}

impl Requirement {
    fn met_by(&self, value: Option<&String>) -> bool {
        let number = |text: &String| text.parse::<i64>().ok();
        // One value, and both have to be numbers.
        let compared = |test: fn(i64, i64) -> bool| match (value.and_then(number), &self.values[..])
        {
            (Some(is), [wanted]) => number(wanted).is_some_and(|wanted| test(is, wanted)),
            _ => false,
        };
        match self.operator.as_str() {
            "In" => value.is_some_and(|v| self.values.contains(v)),
            "NotIn" => value.is_none_or(|v| !self.values.contains(v)),
            "Exists" => value.is_some(),
            "DoesNotExist" => value.is_none(),
            "Gt" => compared(|is, wanted| is > wanted),
            "Lt" => compared(|is, wanted| is < wanted),
            // An operator of a later Kubernetes: what cannot be told is no reason to remove.
            _ => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect()
    }

    fn requirement(key: &str, operator: &str, values: &[&str]) -> Requirement {
        Requirement {
            key: key.into(),
            operator: operator.into(),
            values: values.iter().map(|v| (*v).to_owned()).collect(),
        }
    }

    fn node() -> Answer<Node> {
        Answer::Is(Node {
            name: "n1".into(),
            labels: map(&[("os", "linux"), ("mesh", "on"), ("cores", "8")]),
        })
    }

    fn decide(daemon_set: Answer<DaemonSet>, node: Answer<Node>) -> Leave {
        leave_or_remove(&Facts {
            disable_safe_upgrade: false,
            daemon_set,
            node,
        })
        .0
    }

    #[test]
    fn an_upgrade_keeps_and_a_removal_removes() {
        use Leave::{Keep, Remove};
        let there = || Answer::Is(DaemonSet::default());
        let deleting = Answer::Is(DaemonSet {
            deleting: true,
            ..DaemonSet::default()
        });
        let cases = [
            (there(), node(), Keep),
            (Answer::Gone, node(), Remove),
            (Answer::Gone, Answer::Unknown, Remove),
            (deleting.clone(), node(), Remove),
            (deleting, Answer::Unknown, Remove),
            (Answer::Unauthorized, Answer::Unauthorized, Remove),
            (there(), Answer::Unauthorized, Remove),
            (Answer::Unknown, node(), Keep),
            (Answer::Unknown, Answer::Unknown, Keep),
            (there(), Answer::Unknown, Keep),
            (there(), Answer::Gone, Keep),
        ];
        for (daemon_set, node, wanted) in cases {
            assert_eq!(
                decide(daemon_set.clone(), node.clone()),
                wanted,
                "{daemon_set:?} {node:?}"
            );
        }
        let facts = Facts {
            disable_safe_upgrade: true,
            daemon_set: there(),
            node: node(),
        };
        assert_eq!(leave_or_remove(&facts).0, Remove);
    }

    #[test]
    fn the_nodes_own_labels_tell_whether_it_is_selected() {
        let selector = |pairs: &[(&str, &str)]| DaemonSet {
            node_selector: map(pairs),
            ..DaemonSet::default()
        };
        assert_eq!(
            decide(
                Answer::Is(selector(&[("os", "linux"), ("mesh", "on")])),
                node()
            ),
            Leave::Keep
        );
        assert_eq!(
            decide(Answer::Is(selector(&[("mesh", "off")])), node()),
            Leave::Remove
        );
        assert_eq!(
            decide(Answer::Is(selector(&[("other", "x")])), node()),
            Leave::Remove
        );
    }

    #[test]
    fn affinity_is_that_of_the_scheduler() {
        let cases: Vec<(Vec<Term>, bool)> = {
            let labels = |r: Vec<Requirement>| Term {
                labels: r,
                fields: Vec::new(),
            };
            let fields = |r: Vec<Requirement>| Term {
                labels: Vec::new(),
                fields: r,
            };
            vec![
                (
                    vec![labels(vec![requirement("mesh", "In", &["on", "half"])])],
                    true,
                ),
                (
                    vec![labels(vec![requirement("mesh", "In", &["off"])])],
                    false,
                ),
                (
                    vec![labels(vec![requirement("mesh", "NotIn", &["off"])])],
                    true,
                ),
                (
                    vec![labels(vec![requirement("none", "NotIn", &["off"])])],
                    true,
                ),
                (
                    vec![labels(vec![requirement("mesh", "NotIn", &["on"])])],
                    false,
                ),
                (vec![labels(vec![requirement("mesh", "Exists", &[])])], true),
                (
                    vec![labels(vec![requirement("none", "Exists", &[])])],
                    false,
                ),
                (
                    vec![labels(vec![requirement("none", "DoesNotExist", &[])])],
                    true,
                ),
                (
                    vec![labels(vec![requirement("mesh", "DoesNotExist", &[])])],
                    false,
                ),
                (vec![labels(vec![requirement("cores", "Gt", &["4"])])], true),
                (
                    vec![labels(vec![requirement("cores", "Gt", &["8"])])],
                    false,
                ),
                (vec![labels(vec![requirement("cores", "Lt", &["9"])])], true),
                (vec![labels(vec![requirement("mesh", "Gt", &["1"])])], false),
                (
                    vec![fields(vec![requirement("metadata.name", "In", &["n1"])])],
                    true,
                ),
                (
                    vec![fields(vec![requirement("metadata.name", "In", &["n2"])])],
                    false,
                ),
                // All requirements of a term, any term of the list, no term without requirements.
                (
                    vec![labels(vec![
                        requirement("mesh", "Exists", &[]),
                        requirement("none", "Exists", &[]),
                    ])],
                    false,
                ),
                (
                    vec![
                        labels(vec![requirement("none", "Exists", &[])]),
                        labels(vec![requirement("mesh", "Exists", &[])]),
                    ],
                    true,
                ),
                (vec![Term::default()], false),
                (vec![], false),
                (
                    vec![labels(vec![requirement("mesh", "FromTheFuture", &["x"])])],
                    true,
                ),
            ]
        };
        for (terms, selected) in cases {
            let daemon_set = DaemonSet {
                affinity: Some(terms.clone()),
                ..DaemonSet::default()
            };
            let wanted = if selected { Leave::Keep } else { Leave::Remove };
            assert_eq!(decide(Answer::Is(daemon_set), node()), wanted, "{terms:?}");
        }
    }
}
