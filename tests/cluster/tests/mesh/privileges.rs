//! The least that the agent may do: without any one of its capabilities it ends and names it, it has no others, and at the
//! API server it may do what its roles list and nothing else. What is taken away is read from what is installed.

use std::collections::BTreeSet;

use culvert_cluster::{AGENT, Kubectl};
use serde_json::Value;

use crate::bed::Bed;
use crate::variant::{Variants, daemonset, second_agent};

/// A verb on a resource, of one object by its name or of all.
type Right = (String, String, String);

/// For all objects.
const ALL: &str = "*";

fn capabilities(daemonset: &Value) -> Vec<String> {
    let added = &daemonset["spec"]["template"]["spec"]["containers"][0]["securityContext"];
    let added = added["capabilities"]["add"].as_array().unwrap();
    let name = |one: &Value| one.as_str().unwrap().to_owned();
    added.iter().map(name).collect()
}

#[test]
fn an_agent_without_any_one_of_its_capabilities_ends_and_names_it() {
    let bed = Bed::new("capabilities", &[]);
    let daemonset = daemonset(&bed);
    let listed = capabilities(&daemonset);
    assert!(!listed.is_empty());
    let name = |capability: &str| format!("no-{}", capability.to_lowercase().replace('_', "-"));
    let without = |capability: &String| {
        let mut pod = second_agent(&daemonset, &name(capability));
        let container = &mut pod["spec"]["containers"][0];
        let added = container["securityContext"]["capabilities"]["add"].as_array_mut();
        added.unwrap().retain(|one| one != capability);
        pod
    };
    let pods: Vec<Value> = listed.iter().map(without).collect();
    let variants = Variants::start(&bed, &pods);
    for capability in &listed {
        let said = variants.ended(&name(capability));
        assert!(
            said.contains(&format!("missing: CAP_{capability} (")),
            "{said}"
        );
        assert!(
            said.contains(&format!("add CAP_{capability} (in a pod: ")),
            "{said}"
        );
        for other in listed.iter().filter(|other| *other != capability) {
            assert!(!said.contains(other), "without {capability}: {said}");
        }
    }
    // The others of the cluster, which are older, run with exactly those.
    for node in bed.cluster.nodes() {
        let status = ["sh", "-c", "cat /proc/$(pgrep -o -x culvert)/status"];
        let status = bed.cluster.run_on(&node, &status).unwrap();
        for set in ["CapEff:", "CapPrm:", "CapBnd:"] {
            let line = status.lines().find_map(|line| line.strip_prefix(set));
            let bits = u64::from_str_radix(line.unwrap().trim(), 16).unwrap();
            assert_eq!(
                usize::try_from(bits.count_ones()).unwrap(),
                listed.len(),
                "{status}"
            );
        }
    }
}

/// What `kubectl auth can-i --list` says in a namespace.
fn may(kubectl: &Kubectl, namespace: &str) -> BTreeSet<Right> {
    let list = ["auth", "can-i", "--list", "--no-headers", "-n", namespace];
    let list = kubectl.run(&list).unwrap();
    let mut rights = BTreeSet::new();
    for line in list.lines() {
        // Resource or nothing, then [paths], [names], [verbs].
        let columns: Vec<&str> = line.split(['[', ']']).map(str::trim).collect();
        let [resource, paths, _, names, _, verbs, _] = columns[..] else {
            panic!("not as kubectl prints it: {line}");
        };
        let words = |text: &str| -> Vec<String> {
            let words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
            if words.is_empty() {
                vec![ALL.to_owned()]
            } else {
                words
            }
        };
        let resources = if resource.is_empty() {
            words(paths)
        } else {
            vec![resource.to_owned()]
        };
        for resource in &resources {
            for name in words(names) {
                for verb in words(verbs) {
                    rights.insert((resource.clone(), name.clone(), verb));
                }
            }
        }
    }
    rights
}

/// What a role lists.
fn lists(role: &Value) -> BTreeSet<Right> {
    let texts = |value: &Value| -> Vec<String> {
        let texts = value.as_array().map(Vec::as_slice).unwrap_or_default();
        texts
            .iter()
            .map(|one| one.as_str().unwrap().to_owned())
            .collect()
    };
    let mut rights = BTreeSet::new();
    for rule in role["rules"].as_array().unwrap() {
        let names = Some(texts(&rule["resourceNames"])).filter(|names| !names.is_empty());
        for group in texts(&rule["apiGroups"]) {
            for resource in texts(&rule["resources"]) {
                let resource = match group.as_str() {
                    "" => resource,
                    group => match resource.split_once('/') {
                        Some((resource, part)) => format!("{resource}.{group}/{part}"),
                        None => format!("{resource}.{group}"),
                    },
                };
                for name in names.clone().unwrap_or_else(|| vec![ALL.to_owned()]) {
                    for verb in texts(&rule["verbs"]) {
                        rights.insert((resource.clone(), name.clone(), verb));
                    }
                }
            }
        }
    }
    rights
}

#[test]
fn the_agents_token_is_good_for_what_its_roles_list_and_nothing_else() {
    let bed = Bed::new("rights", &[]);
    let roles = [
        "clusterroles,roles",
        "-A",
        "-l",
        "app.kubernetes.io/name=culvert",
    ];
    let roles = bed.cluster.admin().get(&roles).unwrap();
    let roles = roles["items"].as_array().unwrap();
    let everywhere = roles.iter().filter(|role| role["kind"] == "ClusterRole");
    assert!(everywhere.count() > 0, "{roles:?}");
    let agent = bed.cluster.kubeconfig_for(AGENT.1, "culvert").unwrap();
    // Whatever anybody may do who has a token.
    let anybody = bed.cluster.kubeconfig_for(bed.name(), "default").unwrap();
    let (agent, anybody) = (Kubectl::new(agent), Kubectl::new(anybody));
    for namespace in [AGENT.1, "kube-system", "default", bed.name()] {
        let here = |role: &&Value| {
            let of = &role["metadata"]["namespace"];
            of.is_null() || of == namespace
        };
        let listed: BTreeSet<Right> = roles.iter().filter(here).flat_map(lists).collect();
        let (ours, theirs) = (may(&agent, namespace), may(&anybody, namespace));
        assert!(
            !theirs.is_empty() && theirs.is_subset(&ours),
            "{namespace}: {theirs:?}"
        );
        let more: BTreeSet<Right> = ours.difference(&theirs).cloned().collect();
        assert_eq!(more, listed, "{namespace}");
    }
}
