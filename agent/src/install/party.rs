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

/// Who is behind what happened to the file called `name`, given all that lies in the directory now.
#[must_use]
pub(super) fn name(name: &str, files: &[File], types: &[String]) -> String {
    if files
        .iter()
        .any(|f| f.is_backup() && f.name.strip_suffix(".cilium_bak") == Some(name))
    {
        return format!(
            "{}, which puts configurations of others aside; set cni.exclusive=false (ConfigMap key cni-exclusive) in its \
             settings",
            with_process("Cilium", "cilium-agent")
        );
    }
    // The last in a chain is the last to have written.
    let known = |t: &String| PARTIES.iter().find(|(plugin, ..)| *plugin == t.as_str());
    let known: Vec<_> = types.iter().filter_map(known).collect();
    let is_secondary = |owner: &str| matches!(owner, "istio-cni" | "linkerd-cni");
    let party = known
        .iter()
        .find(|(_, owner, _)| is_secondary(owner))
        .or(known.first());
    match party {
        // `ptp` is kindnet's only where kindnet runs.
        Some(("ptp", _, process)) if process_called(Path::new("/proc"), process).is_none() => {
            unknown(name, types)
        }
        Some((_, owner, process)) => format!("{}, by {name}", with_process(owner, process)),
        None => unknown(name, types),
    }
}

fn unknown(name: &str, types: &[String]) -> String {
    if types.is_empty() {
        return format!("whoever writes or removes {name}");
    }
    format!("whoever writes {name} (plugins: {})", types.join(", "))
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
        let types = |t: &[&str]| t.iter().map(|t| (*t).to_owned()).collect::<Vec<_>>();
        assert!(
            name("10-a.conflist", &[], &types(&["calico", "istio-cni"])).starts_with("istio-cni")
        );
        assert!(name("10-a.conflist", &[], &types(&["calico", "portmap"])).starts_with("Calico"));
        assert_eq!(
            name("10-a.conflist", &[], &types(&["x", "y"])),
            "whoever writes 10-a.conflist (plugins: x, y)"
        );
        assert_eq!(name("a", &[], &[]), "whoever writes or removes a");
    }
}
