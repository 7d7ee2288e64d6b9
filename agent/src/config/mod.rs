//! The daemon's settings: one struct, read from flags, environment, a file and defaults, in that order of strength.
//!
//! Owns what can be set, how it is spelled and what values are refused. Every problem is found in one pass, each with
//! the key, where the value came from and the cure. Nothing is opened here but the file of settings, and nothing of it
//! is acted upon.

mod args;
mod check;
mod choices;
mod collector;
mod resolve;
mod show;
mod values;

use std::{collections::BTreeSet, num::NonZeroUsize, path::PathBuf, time::Duration};

pub use args::AgentArgs;
pub use choices::{AgentAway, DnsScope, LogFormat, OwnConfig, ProbeSource};
pub use collector::Collector;
pub use resolve::{Environment, Loaded, Origin, Problem, Problems};
pub use show::{Setting, settings};
pub use values::{EnablementSelectors, Grace, Listen, LogLevel, Patterns, Value};

use resolve::Resolver;

/// A key, for help texts and documents.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// As a flag (`--NAME`) and in the file. In the environment: `CULVERT_NAME`, upper case, with underscores.
    pub name: &'static str,
    /// What it sets.
    pub help: &'static str,
    /// What values look like.
    pub shape: &'static str,
    /// As a flag it needs no value.
    pub switch: bool,
    /// Other names in the environment that mean the same.
    pub aliases: &'static [Alias],
}

impl Key {
    /// Its name in the environment.
    #[must_use]
    pub fn env(&self) -> String {
        format!("CULVERT_{}", self.name.to_uppercase().replace('-', "_"))
    }
}

/// A name of somebody else's for a setting of ours.
#[derive(Clone, Copy, Debug)]
pub struct Alias {
    /// In the environment.
    pub env: &'static str,
    /// Their way of writing the value to ours.
    pub translate: fn(&str) -> Result<String, String>,
}

macro_rules! settings {
    ($( $(#[doc = $help:literal])+ $field:ident: $type:ty = $default:expr, $name:literal $(, or $alias:literal $(by $translate:path)?)*; )+) => {
        /// Every setting of `culvert agent`.
        #[derive(Clone, Debug, PartialEq)]
        pub struct Config {
            $( $(#[doc = $help])+ pub $field: $type, )+
        }

        /// Every key there is.
        pub const KEYS: &[Key] = &[
            $( Key {
                name: $name,
                help: concat!($($help),+),
                shape: <$type as Value>::SHAPE,
                switch: <$type as Value>::SWITCH,
                aliases: &[$( Alias { env: $alias, translate: settings!(@by $($translate)?) } ),*],
            }, )+
        ];

        impl Config {
            fn resolve(from: &mut Resolver<'_>) -> Self {
                let mut keys = KEYS.iter();
                // Fields are evaluated in the order of the keys.
                Self { $( $field: from.take::<$type>(keys.next(), || $default), )+ }
            }

            fn texts(&self) -> Vec<String> {
                vec![$( self.$field.show() ),+]
            }
        }
    };
    (@by) => { values::same };
    (@by $translate:path) => { $translate };
}

settings! {
    /// Name of this node's Node object; by default, with --pods alone, the host's name.
    node_name: Option<String> = None, "node-name", or "NODE_NAME";
    /// Directory on a bpffs where programs and maps are pinned.
    bpffs: PathBuf = crate::kernel::pins::DEFAULT.into(), "bpffs";
    /// Directory of the cgroup v2 hierarchy to attach to; by default its root, found by looking.
    cgroup_root: Option<PathBuf> = None, "cgroup-root";
    /// Directory of the cgroup v2 hierarchy that holds all pods, for the DNS programs; by default `kubepods`, found by
    /// looking.
    dns_cgroup: Option<PathBuf> = None, "dns-cgroup";
    /// Directory of the agent's socket, its list of captured pods and its lock (one agent to a directory); does not survive a
    /// reboot.
    run_dir: PathBuf = "/run/culvert".into(), "run-dir";
    /// Unix socket at which ztunnel asks for the node's pods.
    zds_socket: PathBuf = "/var/run/ztunnel/ztunnel.sock".into(), "zds-socket", or "ZTUNNEL_UDS_ADDRESS";
    /// Unix socket for the plugin and `culvert status`; by default agent.sock in the run directory.
    agent_socket: PathBuf = culvert_cni::api::SOCKET.into(), "agent-socket";
    /// File that tells the plugin what it may decide while the agent is away; survives a reboot.
    decision_file: PathBuf = culvert_cni::decisions::FILE.into(), "decision-file";
    /// How long the plugin trusts that file.
    decision_max_age: Duration = Duration::from_secs(24 * 60 * 60), "decision-max-age";
    /// Put the CNI plugin and its configuration in place, and keep them there.
    cni_install: bool = true, "cni-install";
    /// The plugin to install; by default culvert-cni beside this program.
    plugin_binary: Option<PathBuf> = None, "plugin-binary";
    /// Where the plugin writes its log, on the host.
    plugin_log: PathBuf = "/var/log/culvert-cni.log".into(), "plugin-log";
    /// Directory where the container runtime looks for plugins, as seen from here.
    cni_bin_dir: PathBuf = "/opt/cni/bin".into(), "cni-bin-dir";
    /// Directory of the container runtime's network configurations, as seen from here.
    cni_conf_dir: PathBuf = "/etc/cni/net.d".into(), "cni-conf-dir", or "MOUNTED_CNI_NET_DIR";
    /// Configuration file to work with; by default the one the runtime picks.
    cni_conf_name: Option<String> = None, "cni-conf-name", or "CNI_CONF_NAME";
    /// Append the plugin to a list of plugins; false writes a configuration of its own, for Multus and the like.
    cni_chained: bool = true, "cni-chained", or "CHAINED_CNI_PLUGIN";
    /// Keep a list of our own that sorts before the runtime's; auto does so beside a CNI that rewrites its file.
    cni_own_config: OwnConfig = OwnConfig::Auto, "cni-own-config", or "ISTIO_OWNED_CNI_CONFIG";
    /// Name of that list; by default one that sorts before the runtime's: 00-culvert.conflist.
    cni_own_config_name: Option<String> = None, "cni-own-config-name", or "ISTIO_OWNED_CNI_CONFIG_FILENAME";
    /// Let the group read the configuration that is written: mode 0640, not 0600.
    cni_conf_group_read: bool = false, "cni-conf-group-read", or "CNI_CONF_GROUP_READ";
    /// Namespaces whose pods are never enrolled.
    excluded_namespaces: BTreeSet<String> = BTreeSet::from(["kube-system".to_owned()]), "excluded-namespaces", or "EXCLUDE_NAMESPACES";
    /// Namespace of ztunnel and istiod.
    system_namespace: String = "istio-system".to_owned(), "system-namespace", or "SYSTEM_NAMESPACE";
    /// Who belongs to the mesh: YAML, a list of {podSelector, namespaceSelector}; by default the label istio.io/dataplane-mode.
    enablement_selectors: EnablementSelectors = EnablementSelectors::default(), "enablement-selectors", or "AMBIENT_ENABLEMENT_SELECTOR";
    /// Runtime classes whose pods have a kernel of their own and cannot be captured, beside gvisor*, runsc* and kata*. Classes
    /// go by their names: one called otherwise whose handler is such a runtime has to be named here.
    sandboxed_runtime_classes: Patterns = Patterns::default(), "sandboxed-runtime-classes";
    /// Send the pods' DNS queries to ztunnel, unless an annotation says otherwise.
    dns_capture: bool = true, "dns-capture", or "AMBIENT_DNS_CAPTURE";
    /// Which queries: all to port 53, or those to the resolvers in the pod's resolv.conf.
    dns_scope: DnsScope = DnsScope::All, "dns-scope";
    /// Capture IPv6 as well.
    ipv6: bool = true, "ipv6", or "AMBIENT_IPV6";
    /// Whose connections from the node to enrolled pods count as probes and pass by ztunnel.
    probe_source: ProbeSource = ProbeSource::Kubelet, "probe-source";
    /// Names of executables that are, or contain, a kubelet.
    kubelet_names: BTreeSet<String> = crate::kernel::kubelet::NAMES.map(str::to_owned).into(), "kubelet-names";
    /// How long new connections wait for a ztunnel that is away before they are refused; 0 refuses at once.
    ztunnel_grace: Grace = Grace(Some(Duration::from_secs(10))), "ztunnel-grace";
    /// What the plugin lets start while the agent is away, beside excluded namespaces: nothing, or what the last decisions put outside the mesh.
    agent_away: AgentAway = AgentAway::Decisions, "agent-away";
    /// How long the plugin tries to reach the agent and have a pod enrolled.
    plugin_budget: Duration = Duration::from_secs(25), "plugin-budget";
    /// Directory of Pod and Namespace manifests, or one file of them, to use in place of an API server.
    pods: Option<PathBuf> = None, "pods";
    /// Kubeconfig to use in place of the pod's service account.
    kubeconfig: Option<PathBuf> = None, "kubeconfig";
    /// How many pods are enrolled at once.
    enrolment_concurrency: NonZeroUsize = NonZeroUsize::MIN.saturating_add(7), "enrolment-concurrency";
    /// How often every pod is compared with what it should be, without any change being announced.
    reconcile_period: Duration = Duration::from_secs(5), "reconcile-period";
    /// How long the agent may take to finish what it has begun when told to stop.
    shutdown_timeout: Duration = Duration::from_secs(10), "shutdown-timeout";
    /// Where /metrics and /loglevel are served; the level is changed by PUT from the node's loopback alone.
    metrics_address: Listen = Listen::any(15014), "metrics-address", or "MONITORING_PORT" by values::port_to_listen;
    /// Where /healthz and /readyz are served.
    health_address: Listen = Listen::any(8000), "health-address";
    /// What is logged: off, error, warn, info, debug, trace, or filters such as `info,culvert::zds=debug`.
    log_level: LogLevel = LogLevel::info(), "log-level", or "LOG_LEVEL" by values::istio_log_level;
    /// How it is logged.
    log_format: LogFormat = LogFormat::Text, "log-format";
    /// Collector that gets traces by OTLP over gRPC; by default none are made.
    otlp_endpoint: Option<Collector> = None, "otlp-endpoint", or "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", or "OTEL_EXPORTER_OTLP_ENDPOINT";
    /// Name of the agent's own DaemonSet: its absence or deletion at shutdown means removal, not upgrade.
    daemonset_name: String = "culvert".to_owned(), "daemonset-name";
    /// Its namespace.
    daemonset_namespace: Option<String> = None, "daemonset-namespace", or "POD_NAMESPACE";
    /// Take the plugin and its configuration away at every shutdown, even one for an upgrade.
    disable_safe_upgrade: bool = false, "disable-safe-upgrade", or "AMBIENT_DISABLE_SAFE_UPGRADE";
}

impl Config {
    /// Reads everything; fails with every problem there is.
    pub fn load(args: &AgentArgs, environment: &Environment) -> Result<Loaded, Problems> {
        let mut resolver = Resolver::new(args, environment);
        let mut config = Self::resolve(&mut resolver);
        if resolver.is_default("agent-socket") {
            config.agent_socket = config.run_dir.join("agent.sock");
        }
        if config.node_name.is_none() && config.pods.is_some() {
            config.node_name = nix::unistd::gethostname()
                .ok()
                .and_then(|name| name.into_string().ok());
        }
        check::check(&config, &mut resolver);
        resolver.finish(config)
    }
}

#[cfg(test)]
mod tests;
