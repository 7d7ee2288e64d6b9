//! NetworkPolicies of all namespaces, cut down to whom they select and which ports they leave open.
//!
//! Judges nothing; [`crate::plan::network_policy`] does.

use std::collections::BTreeMap;

use k8s_openapi::{api::networking::v1 as api, apimachinery::pkg::util::intstr::IntOrString};

use super::{follow::Sink, view::View};
use crate::{
    model::NetworkPolicy,
    plan::network_policy::{Port, Ports},
};

/// Where they go.
pub(super) struct Policies {
    view: View,
    list: BTreeMap<String, BTreeMap<String, NetworkPolicy>>,
}

impl Policies {
    pub(super) fn new(view: View) -> Self {
        Self {
            view,
            list: BTreeMap::new(),
        }
    }
}

impl Sink for Policies {
    type Object = api::NetworkPolicy;

    fn begin(&mut self) {
        self.list.clear();
    }

    fn listed(&mut self, object: api::NetworkPolicy) {
        if let Some((namespace, name, policy)) = policy(object) {
            self.list.entry(namespace).or_default().insert(name, policy);
        }
    }

    fn complete(&mut self) {
        self.view.replace_policies(std::mem::take(&mut self.list));
    }

    fn changed(&mut self, object: api::NetworkPolicy) -> bool {
        policy(object)
            .is_some_and(|(namespace, name, policy)| self.view.set_policy(namespace, name, policy))
    }

    fn gone(&mut self, object: api::NetworkPolicy) {
        let meta = object.metadata;
        if let (Some(namespace), Some(name)) = (meta.namespace, meta.name) {
            self.view.remove_policy(&namespace, &name);
        }
    }
}

fn policy(object: api::NetworkPolicy) -> Option<(String, String, NetworkPolicy)> {
    let spec = object.spec?;
    // One that the API server took and we cannot read is left out: nothing but a warning depends on it.
    let pods = spec.pod_selector.unwrap_or_default();
    let pods = serde_json::from_value(serde_json::to_value(pods).ok()?).ok()?;
    let inbound: Option<Vec<Ports>> = spec.ingress.map(|rules| {
        let rules = rules.into_iter();
        rules.map(|rule| ports(rule.ports)).collect()
    });
    let outbound: Option<Vec<Ports>> = spec.egress.map(|rules| {
        let rules = rules.into_iter();
        rules.map(|rule| ports(rule.ports)).collect()
    });
    // As the API server fills it in.
    let types = spec.policy_types.unwrap_or_else(|| {
        let egress = outbound.is_some().then(|| "Egress".to_owned());
        ["Ingress".to_owned()].into_iter().chain(egress).collect()
    });
    let names = |way: &str| types.iter().any(|t| t == way);
    let policy = NetworkPolicy {
        pods,
        inbound: names("Ingress").then(|| inbound.unwrap_or_default()),
        outbound: names("Egress").then(|| outbound.unwrap_or_default()),
    };
    Some((object.metadata.namespace?, object.metadata.name?, policy))
}

fn ports(ports: Option<Vec<api::NetworkPolicyPort>>) -> Ports {
    let port = |p: api::NetworkPolicyPort| {
        let number = |n: i32| u16::try_from(n).ok();
        let (from, to) = match p.port {
            None => (0, u16::MAX),
            Some(IntOrString::Int(n)) => {
                let from = number(n).unwrap_or(u16::MAX);
                (from, p.end_port.and_then(number).unwrap_or(from))
            }
            Some(IntOrString::String(_)) => (1, 0),
        };
        Port {
            tcp: p.protocol.is_none_or(|p| p == "TCP"),
            from,
            to,
        }
    };
    Ports(ports.into_iter().flatten().map(port).collect())
}
