//! Label selectors as Kubernetes understands them: read, checked, matched, and printed for a request.
//!
//! Knows no API; what a selector means must not differ by a hair from what the API server makes of it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use serde::{Deserialize, Serialize};

/// Labels of an object.
pub type Labels = BTreeMap<String, String>;

/// All requirements of a `LabelSelector`; without any it matches everything.
#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(try_from = "Written")]
pub struct LabelSelector(Vec<Requirement>);

/// One requirement.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Requirement {
    key: String,
    test: Test,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Test {
    In(BTreeSet<String>),
    NotIn(BTreeSet<String>),
    Exists,
    DoesNotExist,
}

/// The form in which people write it.
#[derive(Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
struct Written {
    #[serde(skip_serializing_if = "Option::is_none")]
    match_labels: Option<Labels>,
    #[serde(skip_serializing_if = "Option::is_none")]
    match_expressions: Option<Vec<Expression>>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Expression {
    key: String,
    operator: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    values: Option<BTreeSet<String>>,
}

impl LabelSelector {
    /// Matches objects on which `key` is `value`.
    #[must_use]
    pub fn equal(key: &str, value: &str) -> Self {
        Self(vec![Requirement {
            key: key.into(),
            test: Test::In([value.into()].into()),
        }])
    }

    /// Matches objects on which `key` is missing or not `value`.
    #[must_use]
    pub fn not_equal(key: &str, value: &str) -> Self {
        Self(vec![Requirement {
            key: key.into(),
            test: Test::NotIn([value.into()].into()),
        }])
    }

    /// Whether an object with these labels is selected.
    #[must_use]
    pub fn matches(&self, labels: &Labels) -> bool {
        self.0.iter().all(|r| {
            let value = labels.get(&r.key);
            match &r.test {
                Test::In(values) => value.is_some_and(|v| values.contains(v)),
                Test::NotIn(values) => value.is_none_or(|v| !values.contains(v)),
                Test::Exists => value.is_some(),
                Test::DoesNotExist => value.is_none(),
            }
        })
    }

    /// Whether every object is selected.
    #[must_use]
    pub fn is_everything(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether only objects that carry some label are selected, so that their owners have asked for it.
    #[must_use]
    pub fn wants_a_label(&self) -> bool {
        !self.matches(&Labels::new())
    }
}

/// As the `labelSelector` parameter of a request.
impl fmt::Display for LabelSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, Requirement { key, test }) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str(",")?;
            }
            let (word, values) = match test {
                Test::In(values) => ("in", values),
                Test::NotIn(values) => ("notin", values),
                Test::Exists => {
                    f.write_str(key)?;
                    continue;
                }
                Test::DoesNotExist => {
                    write!(f, "!{key}")?;
                    continue;
                }
            };
            write!(f, "{key} {word} (")?;
            for (i, value) in values.iter().enumerate() {
                if i > 0 {
                    f.write_str(",")?;
                }
                f.write_str(value)?;
            }
            f.write_str(")")?;
        }
        Ok(())
    }
}

/// Why a selector cannot be used.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SelectorError {
    /// Not one of the four operators.
    #[error(
        "operator {operator:?} for label {key:?} is unknown: use In, NotIn, Exists or DoesNotExist"
    )]
    Operator {
        /// The label.
        key: String,
        /// What was written.
        operator: String,
    },
    /// `In` or `NotIn` without values.
    #[error("operator {operator} for label {key:?} needs at least one value: add `values`")]
    NoValues {
        /// The label.
        key: String,
        /// The operator.
        operator: String,
    },
    /// `Exists` or `DoesNotExist` with values.
    #[error(
        "operator {operator} for label {key:?} takes no values: remove `values`, or use In or NotIn"
    )]
    Values {
        /// The label.
        key: String,
        /// The operator.
        operator: String,
    },
    /// Not a label's key.
    #[error(
        "{0:?} is no label key: use [prefix/]name of letters, digits, '-', '_' and '.', at most 63 each way"
    )]
    Key(String),
    /// Not a label's value.
    #[error(
        "{value:?} is no value for label {key:?}: use at most 63 letters, digits, '-', '_' and '.'"
    )]
    Value {
        /// The label.
        key: String,
        /// What was written.
        value: String,
    },
}

impl TryFrom<Written> for LabelSelector {
    type Error = SelectorError;

    fn try_from(written: Written) -> Result<Self, SelectorError> {
        let equal = written.match_labels.into_iter().flatten().map(|(key, v)| {
            let test = Test::In([v].into());
            Ok(Requirement { key, test })
        });
        let expressions = written.match_expressions.into_iter().flatten();
        let all = equal.chain(expressions.map(Requirement::try_from));
        let all: Vec<Requirement> = all.collect::<Result<_, _>>()?;
        all.iter().try_for_each(Requirement::check)?;
        Ok(Self(all))
    }
}

impl TryFrom<Expression> for Requirement {
    type Error = SelectorError;

    fn try_from(e: Expression) -> Result<Self, SelectorError> {
        let Expression {
            key,
            operator,
            values,
        } = e;
        let values = values.unwrap_or_default();
        let takes_values = match operator.as_str() {
            "In" | "NotIn" => true,
            "Exists" | "DoesNotExist" => false,
            _ => return Err(SelectorError::Operator { key, operator }),
        };
        if takes_values && values.is_empty() {
            return Err(SelectorError::NoValues { key, operator });
        }
        if !takes_values && !values.is_empty() {
            return Err(SelectorError::Values { key, operator });
        }
        let test = match operator.as_str() {
            "In" => Test::In(values),
            "NotIn" => Test::NotIn(values),
            "Exists" => Test::Exists,
            _ => Test::DoesNotExist,
        };
        Ok(Self { key, test })
    }
}

impl Requirement {
    /// The API server refuses what this refuses, and it would do so at every request.
    fn check(&self) -> Result<(), SelectorError> {
        let (prefix, name) = match self.key.split_once('/') {
            Some((prefix, name)) => (Some(prefix), name),
            None => (None, self.key.as_str()),
        };
        let prefix_ok = prefix.is_none_or(|p| !p.is_empty() && p.len() <= 253 && plain(p, 253));
        if !prefix_ok || name.is_empty() || !plain(name, 63) {
            return Err(SelectorError::Key(self.key.clone()));
        }
        if let Test::In(values) | Test::NotIn(values) = &self.test
            && let Some(bad) = values.iter().find(|v| !plain(v, 63))
        {
            return Err(SelectorError::Value {
                key: self.key.clone(),
                value: bad.clone(),
            });
        }
        Ok(())
    }
}

/// Empty, or letters, digits, '-', '_' and '.' that begin and end with a letter or digit.
fn plain(s: &str, longest: usize) -> bool {
    let edge = |c: Option<char>| c.is_none_or(|c| c.is_ascii_alphanumeric());
    s.len() <= longest
        && edge(s.chars().next())
        && edge(s.chars().next_back())
        && s.chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(yaml: &str) -> Result<LabelSelector, String> {
        serde_saphyr::from_str(yaml).map_err(|e| e.to_string())
    }

    fn labels(all: &[(&str, &str)]) -> Labels {
        all.iter()
            .map(|(k, v)| ((*k).into(), (*v).into()))
            .collect()
    }

    #[test]
    fn each_operator_matches_as_kubernetes_does() {
        let all = "{matchLabels: {app: web}, matchExpressions: [{key: tier, operator: In, values: [a, b]}, \
                   {key: mode, operator: NotIn, values: [none]}, {key: team, operator: Exists}, \
                   {key: legacy, operator: DoesNotExist}]}";
        let selector = read(all).unwrap();
        let good = [("app", "web"), ("tier", "b"), ("team", "")];
        assert!(selector.matches(&labels(&good)));
        for bad in [
            ("app", "db"),
            ("tier", "c"),
            ("mode", "none"),
            ("legacy", "x"),
        ] {
            let mut l = labels(&good);
            l.insert(bad.0.into(), bad.1.into());
            assert!(!selector.matches(&l), "{bad:?}");
        }
        for missing in ["app", "tier", "team"] {
            let mut l = labels(&good);
            l.remove(missing);
            assert!(!selector.matches(&l), "{missing}");
        }
        assert_eq!(
            selector.to_string(),
            "app in (web),tier in (a,b),mode notin (none),team,!legacy"
        );
    }

    #[test]
    fn nothing_written_selects_everything() {
        let selector = read("{}").unwrap();
        assert!(selector.is_everything() && selector.matches(&Labels::new()));
        assert!(!selector.wants_a_label());
    }

    #[test]
    fn what_the_api_server_would_refuse_is_refused_with_a_cure() {
        for (yaml, cure) in [
            (
                "{matchExpressions: [{key: a, operator: Is, values: [b]}]}",
                "use In, NotIn",
            ),
            (
                "{matchExpressions: [{key: a, operator: In}]}",
                "add `values`",
            ),
            (
                "{matchExpressions: [{key: a, operator: NotIn, values: []}]}",
                "add `values`",
            ),
            (
                "{matchExpressions: [{key: a, operator: Exists, values: [b]}]}",
                "remove `values`",
            ),
            ("{matchLabels: {'a b': c}}", "is no label key"),
            ("{matchLabels: {'/a': c}}", "is no label key"),
            ("{matchLabels: {a: 'b,c'}}", "is no value"),
            ("{matchLabel: {a: b}}", "matchLabel"),
        ] {
            let error = read(yaml).unwrap_err();
            assert!(error.contains(cure), "{yaml}: {error}");
        }
    }

    fn pairs() -> impl Strategy<Value = Labels> {
        prop::collection::btree_map("[a-c]", "[x-z]{0,1}", 0..4)
    }

    proptest! {
        #[test]
        fn equal_and_not_equal_are_opposites(labels in pairs(), key in "[a-c]", value in "[x-z]") {
            let equal = LabelSelector::equal(&key, &value);
            let not = LabelSelector::not_equal(&key, &value);
            prop_assert_ne!(equal.matches(&labels), not.matches(&labels));
            prop_assert!(equal.wants_a_label() && !not.wants_a_label());
        }
    }
}
