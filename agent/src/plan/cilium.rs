//! What Cilium was asked for, and does, that the mesh cannot live with: from its ConfigMap and a look at the node to
//! findings, each with what follows from it and its cure.
//!
//! Pure. A key that is not there says nothing: Cilium's chart writes those that count.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};

/// The ConfigMap's namespace and name.
pub const CONFIG: (&str, &str) = ("kube-system", "cilium-config");

/// The keys that are looked at; no others are kept.
pub const KEYS: [&str; 5] = [
    "cni-exclusive",
    "bpf-lb-sock",
    "bpf-lb-sock-hostns-only",
    "kube-proxy-replacement",
    "enable-ztunnel",
];

/// The keys of [`KEYS`] that are set.
pub type Settings = BTreeMap<String, String>;

/// What is wrong.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Setting {
    /// Cilium captures for a ztunnel itself.
    Ztunnel,
    /// Cilium puts aside whatever other CNI configuration there is.
    CniExclusive,
    /// Cilium's socket load balancing answers pods.
    SocketLb,
}

/// One thing that is wrong.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Finding {
    /// Which.
    pub setting: Setting,
    /// What was seen.
    pub seen: String,
    /// What follows from it.
    pub effect: String,
    /// How to mend it.
    pub cure: String,
}

impl Finding {
    /// Two programs would capture the same pods: the agent does not begin.
    #[must_use]
    pub fn is_fatal(&self) -> bool {
        self.setting == Setting::Ztunnel
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}; {}", self.seen, self.effect, self.cure)
    }
}

/// Keeps what is looked at.
#[must_use]
pub fn settings(mut data: BTreeMap<String, String>) -> Settings {
    data.retain(|key, _| KEYS.contains(&key.as_str()));
    data
}

/// Judges. `config` is none where there is no such ConfigMap; `socket_lb` says whether the node runs Cilium's socket
/// load balancing, where that could be seen.
///
/// Masquerading in BPF, the replacement of kube-proxy, host routing and chaining are not looked at: they break a mesh
/// whose probes are rewritten to another source, and nothing is rewritten here.
#[must_use]
pub fn judge(config: Option<&Settings>, socket_lb: Option<bool>) -> Vec<Finding> {
    let nothing = Settings::new();
    let config = config.unwrap_or(&nothing);
    let on = |key: &str| config.get(key).is_some_and(|v| truth(v));
    let mut findings = Vec::new();
    if on("enable-ztunnel") {
        findings.push(Finding {
            setting: Setting::Ztunnel,
            seen: "Cilium captures pods for a ztunnel itself (enable-ztunnel is true)".into(),
            effect: "two programs would capture the same pods, with the same marks and at the same socket".into(),
            cure: format!("set encryption.enabled=false in Cilium's chart, or {}", patch("enable-ztunnel", "false")),
        });
    }
    if on("cni-exclusive") {
        findings.push(Finding {
            setting: Setting::CniExclusive,
            seen: "Cilium wants to be the only CNI (cni-exclusive is true)".into(),
            effect: "it renames our configuration to *.cilium_bak; pods that start until it is back start outside the \
                     mesh and are enrolled a moment later"
                .into(),
            cure: format!("set cni.exclusive=false in Cilium's chart, or {}", patch("cni-exclusive", "false")),
        });
    }
    let asked = on("bpf-lb-sock") || on("kube-proxy-replacement");
    let host_only = on("bpf-lb-sock-hostns-only");
    let effect = "the address of a Service is replaced by a pod's inside connect(), before ztunnel can see it: policies for \
                  the Service and its waypoint are passed by";
    if asked && !host_only {
        findings.push(Finding {
            setting: Setting::SocketLb,
            seen:
                "Cilium's socket load balancing serves pods (bpf-lb-sock-hostns-only is not true)"
                    .into(),
            effect: effect.into(),
            cure: format!(
                "set socketLB.hostNamespaceOnly=true in Cilium's chart, or {}",
                patch("bpf-lb-sock-hostns-only", "true")
            ),
        });
    } else if !asked && !config.is_empty() && socket_lb == Some(true) {
        findings.push(Finding {
            setting: Setting::SocketLb,
            seen: "Cilium's socket load balancing is at work on this node (cil_sock4_connect at the root cgroup) though \
                   its configuration does not ask for it"
                .into(),
            effect: effect.into(),
            cure: "restart Cilium's agent on this node: `kubectl -n kube-system rollout restart daemonset cilium`; or set \
                   socketLB.hostNamespaceOnly=true in its chart"
                .into(),
        });
    }
    findings
}

fn patch(key: &str, value: &str) -> String {
    let (namespace, name) = CONFIG;
    format!(
        "`kubectl -n {namespace} patch configmap {name} --type merge -p '{{\"data\":{{\"{key}\":\"{value}\"}}}}'` and restart \
         its agents"
    )
}

/// As Cilium reads them; older versions say `strict` where newer say `true`.
fn truth(value: &str) -> bool {
    matches!(
        value.trim(),
        "1" | "t" | "T" | "true" | "TRUE" | "True" | "strict"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(pairs: &[(&str, &str)], socket_lb: Option<bool>) -> Vec<Setting> {
        let data = pairs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        let judged = judge(Some(&settings(data.collect())), socket_lb);
        judged.into_iter().map(|f| f.setting).collect()
    }

    #[test]
    fn each_setting_and_its_neighbours() {
        use Setting::{CniExclusive, SocketLb, Ztunnel};
        let good = [
            ("cni-exclusive", "false"),
            ("kube-proxy-replacement", "true"),
            ("bpf-lb-sock", "true"),
            ("bpf-lb-sock-hostns-only", "true"),
            ("enable-ztunnel", "false"),
            ("enable-bpf-masquerade", "true"),
            ("enable-host-legacy-routing", "false"),
            ("cni-chaining-mode", "aws-cni"),
            ("datapath-mode", "netkit"),
        ];
        assert_eq!(of(&good, Some(true)), []);
        for (change, expected) in [
            (("cni-exclusive", "true"), CniExclusive),
            (("bpf-lb-sock-hostns-only", "false"), SocketLb),
            (("enable-ztunnel", "true"), Ztunnel),
        ] {
            let changed = good.map(|(k, v)| if k == change.0 { change } else { (k, v) });
            assert_eq!(of(&changed, Some(true)), [expected], "{change:?}");
        }
        // The replacement of kube-proxy switches socket load balancing on, whatever its own key says.
        assert_eq!(
            of(
                &[("kube-proxy-replacement", "true"), ("bpf-lb-sock", "false")],
                None
            ),
            [SocketLb]
        );
        assert_eq!(
            of(&[("kube-proxy-replacement", "strict")], None),
            [SocketLb]
        );
        assert_eq!(of(&[("kube-proxy-replacement", "false")], None), []);
        // What the node does counts where the configuration says otherwise.
        assert_eq!(
            of(&[("kube-proxy-replacement", "false")], Some(true)),
            [SocketLb]
        );
        assert_eq!(of(&[("kube-proxy-replacement", "false")], Some(false)), []);
    }

    #[test]
    fn without_cilium_there_is_nothing_to_say() {
        assert_eq!(judge(None, None), []);
        assert_eq!(judge(None, Some(false)), []);
        assert_eq!(of(&[], None), []);
    }

    #[test]
    fn a_finding_names_effect_and_cure() {
        let config = [("enable-ztunnel".to_owned(), "true".to_owned())].into();
        let findings = judge(Some(&config), None);
        assert!(findings.iter().all(Finding::is_fatal));
        let text = findings[0].to_string();
        for part in [
            "two programs",
            "encryption.enabled=false",
            "kubectl -n kube-system patch",
        ] {
            assert!(text.contains(part), "{text}");
        }
    }
}
