//! Who else writes CNI configurations: a name for people, from what is known of the file.
//!
//! A guess to help whoever reads it, never the ground of a decision.

use std::{fs, path::Path};

use super::active::File;

/// Type of plugin, its owner, the name of the owner's process.
const PARTIES: &[(&str, &str, &str)] = &[
    ("cilium-cni", "Cilium", "cilium-agent"),
    ("istio-cni", "istio-cni", "install-cni"),
    ("linkerd-cni", "linkerd-cni", "install-cni.sh"),
    ("multus", "Multus", "multus-daemon"),
    ("multus-shim", "Multus", "multus-daemon"),
    ("calico", "Calico", "calico-node"),
    ("aws-cni", "the AWS VPC CNI", "aws-k8s-agent"),
    ("azure-vnet", "Azure CNI", "azure-cns"),
    ("flannel", "flannel", "flanneld"),
    ("antrea", "Antrea", "antrea-agent"),
    ("kube-ovn", "Kube-OVN", "kube-ovn-daemon"),
    ("ovn-k8s-cni-overlay", "OVN-Kubernetes", "ovnkube"),
    ("weave-net", "Weave Net", "weaver"),
    ("ptp", "kindnet", "kindnetd"),
];

/// Who is behind what happened to a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Party {
    /// A sentence's part, for people.
    pub who: String,
    /// Whether a project is named, not merely a file.
    pub known: bool,
}

/// Who is behind what happened to the file called `name`, given all that lies in the directory now.
#[must_use]
pub(super) fn name(name: &str, files: &[File], types: &[String]) -> Party {
    if files
        .iter()
        .any(|f| f.is_backup() && f.name.strip_suffix(".cilium_bak") == Some(name))
    {
        return known(format!(
            "{}, which puts configurations of others aside; set cni.exclusive=false (ConfigMap key cni-exclusive) in its \
             settings",
            with_process("Cilium", "cilium-agent")
        ));
    }
    // The last in a chain is the last to have written.
    let listed = |t: &String| PARTIES.iter().find(|(plugin, ..)| *plugin == t.as_str());
    let listed: Vec<_> = types.iter().filter_map(listed).collect();
    let is_secondary = |owner: &str| matches!(owner, "istio-cni" | "linkerd-cni");
    let party = listed
        .iter()
        .find(|(_, owner, _)| is_secondary(owner))
        .or(listed.first());
    match party {
        // `ptp` is kindnet's only where kindnet runs.
        Some(("ptp", _, process)) if process_called(Path::new("/proc"), process).is_none() => {
            unknown(name, types)
        }
        Some((_, owner, process)) => known(format!("{}, by {name}", with_process(owner, process))),
        None => unknown(name, types),
    }
}

fn known(who: String) -> Party {
    Party { who, known: true }
}

fn unknown(name: &str, types: &[String]) -> Party {
    let who = if types.is_empty() {
        format!("whoever writes or removes {name}")
    } else {
        format!("whoever writes {name} (plugins: {})", types.join(", "))
    };
    Party { who, known: false }
}

fn with_process(owner: &str, process: &str) -> String {
    match process_called(Path::new("/proc"), process) {
        Some(pid) => format!("{owner} (process {pid}, {process})"),
        None => owner.to_owned(),
    }
}

/// The lowest process id with this name, if processes of the host can be seen from here.
fn process_called(proc: &Path, wanted: &str) -> Option<u32> {
    // The kernel keeps fifteen bytes of a name.
    let wanted = wanted.get(..wanted.len().min(15))?;
    let entries = fs::read_dir(proc).ok()?.flatten();
    let pids = entries.filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| {
        fs::read_to_string(proc.join(pid.to_string()).join("comm"))
            .is_ok_and(|c| c.trim_end() == wanted)
    })
    .min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_found_by_its_name() {
        let me = fs::read_to_string("/proc/self/comm").unwrap();
        let found = process_called(Path::new("/proc"), me.trim_end());
        assert!(found.is_some_and(|pid| pid <= std::process::id()));
        assert_eq!(process_called(Path::new("/proc"), "no such name"), None);
        assert_eq!(process_called(Path::new("/nowhere"), "x"), None);
    }

    #[test]
    fn the_one_who_added_itself_is_named_not_the_network() {
        let of = |file: &str, types: &[&str]| {
            let types: Vec<_> = types.iter().map(|t| (*t).to_owned()).collect();
            name(file, &[], &types)
        };
        let istio = of("10-a.conflist", &["calico", "istio-cni"]);
        assert!(istio.known && istio.who.starts_with("istio-cni"));
        let calico = of("10-a.conflist", &["calico", "portmap"]);
        assert!(calico.known && calico.who.starts_with("Calico"));
        let unlisted = of("10-a.conflist", &["x", "y"]);
        assert_eq!(
            (unlisted.who.as_str(), unlisted.known),
            ("whoever writes 10-a.conflist (plugins: x, y)", false)
        );
        let removed = of("a", &[]);
        assert_eq!(
            (removed.who.as_str(), removed.known),
            ("whoever writes or removes a", false)
        );
    }
}
