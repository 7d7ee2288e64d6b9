//! What values mean together, and bounds that are no matter of spelling.

use std::{path::Path, time::Duration};

use super::{
    Config, OwnConfig,
    resolve::Resolver,
    values::{Value as _, is_dns_label, is_dns_subdomain},
};

/// `sun_path`, less the zero byte at its end.
const MAX_SOCKET_PATH: usize = 107;

pub(super) fn check(config: &Config, found: &mut Resolver<'_>) {
    node(config, found);
    names(config, found);
    cni(config, found);
    addresses(config, found);
    for (key, path) in [
        ("zds-socket", &config.zds_socket),
        ("agent-socket", &config.agent_socket),
    ] {
        socket(found, key, path);
    }
    let second = Duration::from_secs(1);
    for (key, value, least, most) in [
        (
            "reconcile-period",
            config.reconcile_period,
            second / 10,
            second * 3600,
        ),
        // The kubelet gives up on a sandbox after two minutes, and other plugins take their part.
        ("plugin-budget", config.plugin_budget, second, second * 100),
        (
            "shutdown-timeout",
            config.shutdown_timeout,
            second / 10,
            second * 600,
        ),
    ] {
        if value < least || value > most {
            let cure = format!(
                "set it to {} at least and {} at most",
                least.show(),
                most.show()
            );
            found.wrong(key, format!("{} is out of bounds", value.show()), cure);
        }
    }
    if config.enrolment_concurrency.get() > 256 {
        found.wrong(
            "enrolment-concurrency",
            "it is too high: each enrolment takes a thread",
            "set it to 256 at most",
        );
    }
}

fn node(config: &Config, found: &mut Resolver<'_>) {
    if let (Some(_), Some(_)) = (&config.pods, &config.kubeconfig) {
        found.wrong(
            "pods",
            "a directory of manifests takes the API server's place, and kubeconfig names an API server",
            "set one of pods and kubeconfig",
        );
    }
    match &config.node_name {
        None => found.wrong(
            "node-name",
            "without it there is no telling which pods are this node's",
            "set NODE_NAME from the field spec.nodeName (downward API), or --node-name",
        ),
        Some(name) if !is_dns_subdomain(name) && config.pods.is_none() => found.wrong(
            "node-name",
            format!("`{name}` can be no node's name"),
            "set it to a name that `kubectl get nodes` lists",
        ),
        Some(_) => {}
    }
}

fn names(config: &Config, found: &mut Resolver<'_>) {
    let namespace = "set it to a name that `kubectl get namespaces` lists";
    if !is_dns_label(&config.system_namespace) {
        let what = format!("`{}` can be no namespace's name", config.system_namespace);
        found.wrong("system-namespace", what, namespace);
    }
    if let Some(name) = &config.daemonset_namespace
        && !is_dns_label(name)
    {
        found.wrong(
            "daemonset-namespace",
            format!("`{name}` can be no namespace's name"),
            namespace,
        );
    }
    if !is_dns_subdomain(&config.daemonset_name) {
        let what = format!("`{}` can be no DaemonSet's name", config.daemonset_name);
        found.wrong(
            "daemonset-name",
            what,
            "set it to a name that `kubectl get daemonsets -A` lists",
        );
    }
}

fn cni(config: &Config, found: &mut Resolver<'_>) {
    if config.cni_own_config == OwnConfig::Always && !config.cni_chained {
        found.wrong(
            "cni-own-config",
            "a list of our own carries a copy of the runtime's plugins, and cni-chained=false asks for none of them",
            "set one of cni-own-config=true and cni-chained=false",
        );
    }
    let names = [
        ("cni-conf-name", &config.cni_conf_name),
        ("cni-own-config-name", &config.cni_own_config_name),
    ];
    for (key, name) in names {
        let Some(name) = name else { continue };
        let path = Path::new(name);
        let known = path
            .extension()
            .is_some_and(|e| e == "conf" || e == "conflist" || e == "json");
        if path.file_name() != Some(path.as_os_str()) || !known {
            found.wrong(
                key,
                format!("`{name}` is no name of a network configuration"),
                "set it to a file's name alone, ending in .conf, .conflist or .json",
            );
        }
    }
    for (key, value) in [
        ("plugin-budget", config.plugin_budget),
        ("decision-max-age", config.decision_max_age),
    ] {
        if value.subsec_nanos() != 0 {
            found.wrong(
                key,
                format!(
                    "{} is no number of seconds, in which the plugin counts",
                    value.show()
                ),
                "leave out the fraction",
            );
        }
    }
    if config.plugin_budget < Duration::from_secs(15) {
        found.warn(format!(
            "plugin-budget is {}: a ztunnel that restarts may take 15s to come back, and pods that start meanwhile fail \
             and are tried again by the kubelet",
            config.plugin_budget.show()
        ));
    }
}

fn addresses(config: &Config, found: &mut Resolver<'_>) {
    let (metrics, health) = (config.metrics_address, config.health_address);
    let meet = metrics.ip.is_none() || health.ip.is_none() || metrics.ip == health.ip;
    if metrics.port == health.port && metrics.port != 0 && meet {
        found.wrong(
            "health-address",
            format!("metrics are served at {metrics} already"),
            "give it another port",
        );
    }
}

fn socket(found: &mut Resolver<'_>, key: &str, path: &Path) {
    if path.as_os_str().len() > MAX_SOCKET_PATH {
        found.wrong(
            key,
            format!("{} is too long for a unix socket", path.display()),
            format!("set it to a path of at most {MAX_SOCKET_PATH} bytes"),
        );
    }
}
