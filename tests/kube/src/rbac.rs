//! Roles and bindings made from `culvert::watch::rbac::RULES`, whole or with gaps.

use std::collections::BTreeMap;

use anyhow::Result;
use culvert::watch::rbac::{RULES, Rule, Scope};
use serde_json::{Value, json};

use crate::HOME;

/// Namespace, account, roles and bindings; a verb of a rule is granted where `granted` says so.
pub fn manifests(granted: impl Fn(&Rule, &str) -> bool) -> Result<String> {
    let (home, account) = HOME;
    let mut scopes: BTreeMap<Option<&str>, Vec<Value>> = BTreeMap::new();
    for rule in &RULES {
        let verbs: Vec<&str> = rule
            .verbs
            .iter()
            .copied()
            .filter(|v| granted(rule, v))
            .collect();
        let namespace = match rule.scope {
            Scope::Cluster => None,
            Scope::Own => Some(home),
            Scope::Namespace(namespace) => Some(namespace),
        };
        // Roles are there also when empty: what was granted before has to go.
        let rules = scopes.entry(namespace).or_default();
        if !verbs.is_empty() {
            let mut granted =
                json!({"apiGroups": [rule.group], "resources": [rule.resource], "verbs": verbs});
            if !rule.names.is_empty() {
                granted["resourceNames"] = json!(rule.names);
            }
            rules.push(granted);
        }
    }
    let mut documents = vec![
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": home}}),
        json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": account, "namespace": home}}),
    ];
    for (namespace, rules) in scopes {
        let kind = if namespace.is_some() {
            "Role"
        } else {
            "ClusterRole"
        };
        let mut meta = json!({"name": account});
        if let Some(namespace) = namespace {
            meta["namespace"] = namespace.into();
        }
        let api = "rbac.authorization.k8s.io";
        let version = format!("{api}/v1");
        documents
            .push(json!({"apiVersion": version, "kind": kind, "metadata": meta, "rules": rules}));
        documents.push(json!({
            "apiVersion": version, "kind": format!("{kind}Binding"), "metadata": meta,
            "roleRef": {"apiGroup": api, "kind": kind, "name": account},
            "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": home}],
        }));
    }
    let texts: Result<Vec<String>, _> = documents.iter().map(serde_json::to_string).collect();
    Ok(texts?.join("\n"))
}
