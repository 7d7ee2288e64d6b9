//! NetworkPolicies that cut a pod off from the mesh: peers reach it at TCP port 15008 and it reaches them there, whatever
//! port the application has.
//!
//! Pure. Judges ports alone: whom a rule lets in is for its author to say. Policies of other APIs (Cilium's, Calico's own)
//! are not known here.

use super::selector::{LabelSelector, Labels};
use crate::model::NetworkPolicy;

/// Where ztunnels speak to each other.
pub const HBONE: u16 = 15008;

/// Ports of one rule; none of them means every port.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Ports(pub Vec<Port>);

/// A range of ports, TCP or not.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Port {
    /// TCP.
    pub tcp: bool,
    /// From here ..
    pub from: u16,
    /// .. to here. A port that is named, and not numbered, is an empty range: no container names ztunnel's.
    pub to: u16,
}

impl Ports {
    fn hbone(&self) -> bool {
        let open = |p: &Port| p.tcp && (p.from..=p.to).contains(&HBONE);
        self.0.is_empty() || self.0.iter().any(open)
    }
}

/// What is in a pod's way, one sentence each. `policies` are those of its namespace, by name.
pub fn in_the_way<'a>(
    labels: &Labels,
    policies: impl Iterator<Item = (&'a str, &'a NetworkPolicy)>,
) -> Vec<String> {
    let selects = |s: &LabelSelector| s.matches(labels);
    let chosen: Vec<_> = policies.filter(|(_, p)| selects(&p.pods)).collect();
    let mut found = Vec::new();
    for (way, rules, what) in [
        (
            "ingress",
            (|p| p.inbound.as_deref()) as fn(&NetworkPolicy) -> Option<&[Ports]>,
            "peers of the mesh cannot reach the pod",
        ),
        (
            "egress",
            |p| p.outbound.as_deref(),
            "the pod cannot reach peers of the mesh",
        ),
    ] {
        let of_way: Vec<(&str, &[Ports])> = chosen
            .iter()
            .filter_map(|(name, p)| Some((*name, rules(p)?)))
            .collect();
        // A pod that may speak to nobody at all is meant to; one that may speak at some port meant to be reached.
        let says_something = of_way.iter().any(|(_, rules)| !rules.is_empty());
        let open = of_way
            .iter()
            .any(|(_, rules)| rules.iter().any(Ports::hbone));
        if says_something && !open {
            let names: Vec<&str> = of_way.iter().map(|(name, _)| *name).collect();
            found.push(format!(
                "NetworkPolicy {} allows {way} without TCP port {HBONE}: {what}; add port {HBONE} to a rule of its {way}",
                names.join(", ")
            ));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(from: u16, to: u16) -> Port {
        Port {
            tcp: true,
            from,
            to,
        }
    }

    fn policy(inbound: Option<Vec<Ports>>) -> NetworkPolicy {
        NetworkPolicy {
            pods: LabelSelector::equal("app", "web"),
            inbound,
            outbound: None,
        }
    }

    fn judged(policies: &[NetworkPolicy]) -> usize {
        let labels = [("app".to_owned(), "web".to_owned())].into();
        in_the_way(&labels, policies.iter().map(|p| ("p", p))).len()
    }

    #[test]
    fn ports_that_let_the_mesh_in_and_others() {
        let udp = Port {
            tcp: false,
            from: HBONE,
            to: HBONE,
        };
        let named = tcp(1, 0);
        for (rules, cut_off) in [
            (vec![Ports(vec![tcp(80, 80)])], 1),
            (vec![Ports(vec![udp])], 1),
            (vec![Ports(vec![named])], 1),
            (vec![Ports(vec![tcp(80, 80), tcp(HBONE, HBONE)])], 0),
            (vec![Ports(vec![tcp(15000, 15100)])], 0),
            (vec![Ports(vec![tcp(80, 80)]), Ports::default()], 0),
            (vec![Ports::default()], 0),
            // Nobody is let in at all: meant so.
            (vec![], 0),
        ] {
            assert_eq!(judged(&[policy(Some(rules.clone()))]), cut_off, "{rules:?}");
        }
        assert_eq!(judged(&[policy(None)]), 0, "says nothing about ingress");
    }

    #[test]
    fn policies_add_up_and_only_those_that_select_the_pod_count() {
        let closed = policy(Some(vec![Ports(vec![tcp(80, 80)])]));
        let open = policy(Some(vec![Ports(vec![tcp(HBONE, HBONE)])]));
        let of_others = NetworkPolicy {
            pods: LabelSelector::equal("app", "db"),
            ..closed.clone()
        };
        assert_eq!(judged(&[closed.clone(), open]), 0);
        assert_eq!(judged(&[of_others]), 0);
        let denied = policy(Some(Vec::new()));
        assert_eq!(judged(&[closed.clone(), denied]), 1);
        let both = NetworkPolicy {
            outbound: Some(vec![Ports(vec![tcp(443, 443)])]),
            ..closed
        };
        assert_eq!(judged(&[both]), 2);
    }
}
