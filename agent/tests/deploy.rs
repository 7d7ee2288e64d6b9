//! What a cluster gets says what the code needs: roles, capabilities, settings, metrics; and the pages on both are made
//! from the code. It renders nothing: kustomize and helm are tested on an API server.
//!
//! `CULVERT_BLESS=1 cargo test -p culvert --test deploy` writes the pages anew; read the diff.
#![expect(
    clippy::panic,
    clippy::unwrap_used,
    reason = "test code: a step that fails is a test that fails"
)]

mod pages;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use culvert::{
    config::KEYS,
    kernel::privileges::NEEDED,
    watch::rbac::{RULES, Scope},
};
use serde_json::Value;

/// Where the base lives.
const HOME: &str = "culvert-system";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &str) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn objects(path: &str) -> Vec<Value> {
    serde_saphyr::from_multiple(&read(path)).unwrap()
}

/// One verb on one resource: namespace (none: everywhere), group, resource, name (none: all), verb.
type Right = (Option<String>, String, String, Option<String>, String);

fn rights(
    namespace: Option<&str>,
    group: &str,
    resource: &str,
    names: &[&str],
    verbs: &[&str],
) -> BTreeSet<Right> {
    let names: Vec<Option<&str>> = match names {
        [] => vec![None],
        names => names.iter().copied().map(Some).collect(),
    };
    let mut all = BTreeSet::new();
    for name in names {
        for verb in verbs {
            all.insert((
                namespace.map(str::to_owned),
                group.to_owned(),
                resource.to_owned(),
                name.map(str::to_owned),
                (*verb).to_owned(),
            ));
        }
    }
    all
}

fn strings(value: &Value) -> Vec<&str> {
    let list = value.as_array().map(Vec::as_slice).unwrap_or_default();
    list.iter().filter_map(Value::as_str).collect()
}

#[test]
fn roles_grant_what_the_agent_needs_and_nothing_else() {
    let mut granted = BTreeSet::new();
    let mut bound = BTreeSet::new();
    for object in objects("deploy/base/rbac.yaml") {
        let namespace = object["metadata"]["namespace"].as_str();
        match object["kind"].as_str().unwrap() {
            "Role" | "ClusterRole" => {
                for rule in object["rules"].as_array().unwrap() {
                    for group in strings(&rule["apiGroups"]) {
                        for resource in strings(&rule["resources"]) {
                            let (names, verbs) =
                                (strings(&rule["resourceNames"]), strings(&rule["verbs"]));
                            granted.extend(rights(namespace, group, resource, &names, &verbs));
                        }
                    }
                }
            }
            "RoleBinding" | "ClusterRoleBinding" => {
                assert_eq!(object["roleRef"]["name"], "culvert");
                assert_eq!(object["subjects"].as_array().unwrap().len(), 1);
                assert_eq!(object["subjects"][0]["name"], "culvert");
                assert_eq!(object["subjects"][0]["namespace"], HOME);
                bound.insert(namespace.map(str::to_owned));
            }
            "ServiceAccount" => {}
            other => panic!("{other} among the roles"),
        }
    }
    let mut needed = BTreeSet::new();
    for rule in &RULES {
        let namespace = match rule.scope {
            Scope::Cluster => None,
            Scope::Own => Some(HOME),
            Scope::Namespace(name) => Some(name),
        };
        needed.extend(rights(
            namespace,
            rule.group,
            rule.resource,
            rule.names,
            rule.verbs,
        ));
    }
    let too_many: Vec<_> = granted.difference(&needed).collect();
    let too_few: Vec<_> = needed.difference(&granted).collect();
    assert!(
        too_many.is_empty() && too_few.is_empty(),
        "deploy/base/rbac.yaml grants without need {too_many:?}, and lacks {too_few:?} of agent/src/watch/rbac.rs"
    );
    let namespaces: BTreeSet<_> = needed
        .into_iter()
        .map(|(namespace, ..)| namespace)
        .collect();
    assert_eq!(bound, namespaces, "a role without a binding grants nothing");
}

#[test]
fn containers_have_the_capabilities_that_the_agent_needs_and_no_other() {
    let needed: Vec<&str> = NEEDED
        .iter()
        .map(|need| need.name.trim_start_matches("CAP_"))
        .collect();
    let daemonset = objects("deploy/base/daemonset.yaml").remove(0);
    let context = &daemonset["spec"]["template"]["spec"]["containers"][0]["securityContext"];
    assert_eq!(strings(&context["capabilities"]["add"]), needed);
    assert_eq!(strings(&context["capabilities"]["drop"]), ["ALL"]);
    let scc = objects("deploy/overlays/openshift/scc.yaml").remove(0);
    assert_eq!(strings(&scc["allowedCapabilities"]), needed);
}

#[test]
fn every_setting_in_a_manifest_is_one_of_the_agents() {
    let known: BTreeMap<String, &str> = KEYS.iter().map(|key| (key.env(), key.name)).collect();
    let helpers = read("deploy/chart/templates/_helpers.tpl");
    let mut set = BTreeSet::new();
    for (at, _) in helpers.match_indices("set $set \"") {
        let name = helpers[at + "set $set \"".len()..]
            .split('"')
            .next()
            .unwrap();
        assert!(
            known.values().any(|key| *key == name),
            "the chart sets {name}"
        );
        set.insert(name);
    }
    assert!(set.len() >= 15, "{set:?}");
    // Each of them is refused among the chart's `settings`, with the name of a value that there is.
    let values: Value = serde_saphyr::from_str(&read("deploy/chart/values.yaml")).unwrap();
    let (_, list) = helpers
        .split_once(r#"define "culvert.values" -}}"#)
        .unwrap();
    let (list, _) = list.split_once("{{").unwrap();
    let refused: BTreeMap<String, String> = serde_saphyr::from_str(list).unwrap();
    for (key, value) in &refused {
        assert!(known.values().any(|known| known == key), "{key}");
        let found = value.split('.').try_fold(&values, |at, name| at.get(name));
        assert!(found.is_some(), "there is no value {value}");
    }
    for name in set {
        assert!(
            refused.contains_key(name),
            "settings.{name} is taken beside its value"
        );
    }
    let cilium = read("deploy/overlays/cilium/kustomization.yaml");
    let set: Vec<&str> = cilium
        .split([' ', ',', '{'])
        .filter(|word| word.starts_with("CULVERT_"))
        .collect();
    assert!(!set.is_empty());
    for name in set {
        assert!(known.contains_key(name), "{name}");
    }
}

#[test]
fn uninstalling_by_hand_is_told_each_platforms_directories() {
    let page = read("docs/uninstall.md");
    for name in [
        "cilium",
        "gke",
        "k3d",
        "k3s",
        "microk8s",
        "minikube",
        "openshift",
    ] {
        let overlay = read(&format!("deploy/overlays/{name}/kustomization.yaml"));
        let row = page
            .lines()
            .find(|line| line.contains(&format!("| `{name}` |")));
        for (volume, option, usual) in [
            ("cni-bin", "--cni-bin-dir", "/opt/cni/bin"),
            ("cni-conf", "--cni-conf-dir", "/etc/cni/net.d"),
        ] {
            let patched = overlay.split_once(&format!("name: {volume}, hostPath: {{path: "));
            let path = patched.map_or(usual, |(_, rest)| rest.split(',').next().unwrap());
            let said = row.and_then(|row| row.split_once(&format!("{option} ")));
            let said = said.map_or(usual, |(_, rest)| rest.split([' ', '`']).next().unwrap());
            assert_eq!(said, path, "{name}");
        }
    }
}

#[test]
fn defaults_of_the_chart_are_those_of_the_agent() {
    use culvert::config::{AgentArgs, Config, Environment, settings};
    let loaded = Config::load(
        &AgentArgs::default(),
        &Environment::default().with("NODE_NAME", "n"),
    )
    .unwrap();
    let defaults: BTreeMap<&str, String> = KEYS
        .iter()
        .map(|key| key.name)
        .zip(settings(&loaded).into_iter().map(|setting| setting.value))
        .collect();
    let values: Value = serde_saphyr::from_str(&read("deploy/chart/values.yaml")).unwrap();
    for (group, value, key) in [
        ("agent", "systemNamespace", "system-namespace"),
        ("agent", "dnsCapture", "dns-capture"),
        ("agent", "dnsScope", "dns-scope"),
        ("agent", "ipv6", "ipv6"),
        ("agent", "probeSource", "probe-source"),
        ("agent", "ztunnelGrace", "ztunnel-grace"),
        ("agent", "agentAway", "agent-away"),
        ("agent", "metricsPort", "metrics-address"),
        ("agent", "healthPort", "health-address"),
        ("agent", "logLevel", "log-level"),
        ("agent", "logFormat", "log-format"),
        ("agent", "otlpEndpoint", "otlp-endpoint"),
        ("agent", "disableSafeUpgrade", "disable-safe-upgrade"),
        ("cni", "install", "cni-install"),
        ("cni", "confName", "cni-conf-name"),
        ("cni", "chained", "cni-chained"),
        ("cni", "ownConfig", "cni-own-config"),
        ("cni", "ownConfigName", "cni-own-config-name"),
        ("cni", "confGroupRead", "cni-conf-group-read"),
    ] {
        let chart = match &values[group][value] {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        assert_eq!(
            chart,
            defaults[key].trim_start_matches(':'),
            "{group}.{value}"
        );
    }
    let excluded = strings(&values["agent"]["excludedNamespaces"]).join(",");
    assert_eq!(excluded, defaults["excluded-namespaces"]);
}

#[test]
fn alerts_ask_for_metrics_that_there_are() {
    let metrics = read("docs/metrics.md");
    let rules = read("deploy/chart/templates/monitoring.yaml");
    let asked: Vec<&str> = rules
        .lines()
        .filter_map(|line| line.trim().strip_prefix("expr: "))
        .map(|expr| expr.split([' ', '{']).next().unwrap())
        .filter(|name| !name.starts_with("kube_"))
        .collect();
    assert!(asked.len() >= 2, "{asked:?}");
    for name in asked {
        assert!(metrics.contains(&format!("| `{name}` |")), "{name}");
    }
}

#[test]
fn the_page_of_privileges() {
    let mut page = String::from(
        "# What the agent may do, and what for\n\n\
         ## On the node\n\n\
         The container is not privileged. It has these capabilities and no other; `culvert preflight` names each that is \
         missing, and so does the\nagent in its last line of log before it ends. It drops all others if it was given more.\n\n\
         | capability | without it fails |\n|---|---|\n",
    );
    for need in NEEDED {
        writeln!(page, "| {} | {} |", need.name, need.why).unwrap();
    }
    page += "\nCAP_BPF and CAP_PERFMON are part of CAP_SYS_ADMIN, which entering another network namespace takes. No \
             CAP_DAC_OVERRIDE: files and\nsockets are root's.\n\n\
             Beside them:\n\n\
             | what | why |\n|---|---|\n\
             | `hostNetwork` | it starts before the cluster's network works; its namespace is the node's, from which the kubelet's probes come |\n\
             | `hostPID` | pods' network namespaces are reached by the processes in them; kubelet and ztunnel are known by theirs |\n\
             | seccomp `RuntimeDefault` | enough: what it forbids without CAP_SYS_ADMIN and CAP_SYS_PTRACE it allows with them |\n\
             | AppArmor `Unconfined` | the default profile of container runtimes forbids looking at other processes and writing below `/proc/sys` |\n\
             | read-only root file system | it writes to host paths alone |\n\
             | `/proc/sys` stays read-only | three sysctls in pods' namespaces are written by way of a procfs that is mounted nowhere |\n\n\
             Host paths:\n\n\
             | path | why |\n|---|---|\n\
             | `/sys/fs/bpf` | programs and maps are pinned to the **host's** bpffs: pods stay captured while no agent runs |\n\
             | `/sys/fs/cgroup`, read-only | programs attach to the **root** of the host's cgroup v2 hierarchy, of which a container sees a part |\n\
             | `/opt/cni/bin`, `/etc/cni/net.d` | the plugin and its configuration, see [install.md](install.md) |\n\
             | `/run/culvert` | the socket at which the plugin asks |\n\
             | `/var/lib/culvert` | the decision file, which survives a reboot |\n\
             | `/var/run/ztunnel` | the socket at which ztunnel asks for its pods |\n\n\
             A node needs a kernel with what `culvert preflight` probes for (mainline has it all since 6.1), cgroup v2 mounted (beside v1 \
             will do) and a bpffs\nat `/sys/fs/bpf` (systemd mounts it; else `mount -t bpf bpf /sys/fs/bpf`).\n\n\
             ## At the API server\n\n\
             | where | API group | resource | names | verbs | what for |\n|---|---|---|---|---|---|\n";
    for rule in &RULES {
        let scope = match rule.scope {
            Scope::Cluster => "everywhere".to_owned(),
            Scope::Own => "own namespace".to_owned(),
            Scope::Namespace(name) => format!("`{name}`"),
        };
        let group = if rule.group.is_empty() {
            "core"
        } else {
            rule.group
        };
        writeln!(
            page,
            "| {scope} | {group} | {} | {} | {} | {} |",
            rule.resource,
            rule.names.join(", "),
            rule.verbs.join(", "),
            rule.why
        )
        .unwrap();
    }
    page += "\nThe agent asks for each of them when it starts and names those it lacks, with what they are for: in its log, at \
             `/readyz`\n(task `rights`) and in an event on its node, until they are granted. It works on as far as it goes \
             without.\n";
    pages::same("--test deploy", "privileges.md", &page);
}

#[test]
fn the_page_of_values() {
    let mut page = String::from(
        "# Values of the Helm chart\n\n\
         `deploy/chart/values.yaml`, line by line. `values.schema.json` beside it refuses names that are not here and values that \
         contradict.\nSettings of the agent that have no value of their own go under `settings`, by their names in \
         [settings.md](settings.md).\n\n\
         | value | default | meaning |\n|---|---|---|\n",
    );
    let text = read("deploy/chart/values.yaml");
    let values: Value = serde_saphyr::from_str(&text).unwrap();
    let mut path: Vec<(usize, &str)> = Vec::new();
    let mut meaning: Option<&str> = None;
    let mut told = BTreeSet::new();
    for line in text.lines() {
        let trimmed = line.trim_start();
        if let Some(text) = trimmed.strip_prefix("# -- ") {
            meaning = Some(text);
            continue;
        }
        let Some((key, _)) = trimmed
            .split_once(':')
            .filter(|_| !trimmed.starts_with('#'))
        else {
            continue;
        };
        let depth = line.len() - trimmed.len();
        while path.last().is_some_and(|(above, _)| *above >= depth) {
            path.pop();
        }
        path.push((depth, key));
        let Some(meaning) = meaning.take() else {
            continue;
        };
        let names: Vec<&str> = path.iter().map(|(_, name)| *name).collect();
        let value = names.iter().fold(&values, |value, name| &value[*name]);
        let name = names.join(".");
        writeln!(
            page,
            "| `{name}` | `{value}` | {} |",
            meaning.replace('|', "\\|")
        )
        .unwrap();
        told.insert(name);
    }
    // Everything that can be set is told, itself or as a part of what is.
    let schema: Value = serde_json::from_str(&read("deploy/chart/values.schema.json")).unwrap();
    let mut settable = Vec::new();
    leaves(&schema, "", &mut settable);
    for name in settable.iter().filter(|name| *name != "global") {
        let above = name.match_indices('.').map(|(at, _)| &name[..at]);
        assert!(
            above.chain([name.as_str()]).any(|name| told.contains(name)),
            "values.yaml says nothing about {name}"
        );
    }
    pages::same("--test deploy", "values.md", &page);
}

/// Names of all properties that have none below them.
fn leaves(schema: &Value, path: &str, found: &mut Vec<String>) {
    match schema["properties"].as_object() {
        Some(properties) => {
            for (name, below) in properties {
                let path = match path {
                    "" => name.clone(),
                    path => format!("{path}.{name}"),
                };
                leaves(below, &path, found);
            }
        }
        None => found.push(path.to_owned()),
    }
}
