//! Whether the API server lets the agent do what it has to: asked for each right of [`super::rbac`], all at once.
//!
//! Asks as whoever the configuration says; changes nothing.

use std::fmt;

use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec,
};
use kube::{Client, api::PostParams};

use super::{
    error::{Error, Result},
    rbac::{RULES, Rule, Scope},
};

/// One rule, and which of its verbs are refused.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Right {
    /// The rule.
    pub rule: &'static Rule,
    /// Where it was asked for; none = everywhere.
    pub namespace: Option<String>,
    /// What is refused.
    pub refused: Vec<&'static str>,
}

impl fmt::Display for Right {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.refused.join(", "), self.rule.resource)?;
        if !self.rule.group.is_empty() {
            write!(f, ".{}", self.rule.group)?;
        }
        if let Some(namespace) = &self.namespace {
            write!(f, " in namespace {namespace}")?;
        }
        write!(f, " ({})", self.rule.why)
    }
}

/// Asks for every right. `own` is the agent's namespace.
pub async fn rights(client: &Client, own: &str) -> Result<Vec<Right>> {
    let reviews = kube::Api::<SelfSubjectAccessReview>::all(client.clone());
    let mut rights = Vec::new();
    for rule in &RULES {
        let namespace = match rule.scope {
            Scope::Cluster => None,
            Scope::Own => Some(own.to_owned()),
            Scope::Namespace(namespace) => Some(namespace.to_owned()),
        };
        let (resource, subresource) = match rule.resource.split_once('/') {
            Some((resource, subresource)) => (resource, Some(subresource)),
            None => (rule.resource, None),
        };
        let mut refused = Vec::new();
        for verb in rule.verbs {
            let asked = SelfSubjectAccessReview {
                spec: SelfSubjectAccessReviewSpec {
                    resource_attributes: Some(ResourceAttributes {
                        group: Some(rule.group.to_owned()),
                        name: rule.names.first().map(|name| (*name).to_owned()),
                        namespace: namespace.clone(),
                        resource: Some(resource.to_owned()),
                        subresource: subresource.map(str::to_owned),
                        verb: Some((*verb).to_owned()),
                        ..ResourceAttributes::default()
                    }),
                    ..SelfSubjectAccessReviewSpec::default()
                },
                ..SelfSubjectAccessReview::default()
            };
            let answer = reviews.create(&PostParams::default(), &asked).await;
            let answer = answer.map_err(|e| Error::kube("ask for rights on", rule.resource, &e))?;
            if !answer.status.is_some_and(|status| status.allowed) {
                refused.push(*verb);
            }
        }
        rights.push(Right {
            rule,
            namespace,
            refused,
        });
    }
    Ok(rights)
}
