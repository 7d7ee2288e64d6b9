//! Which source wins, what is refused, and that all of it is said at once.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::{Args as _, FromArgMatches as _};
use proptest::prelude::*;

use super::{
    AgentArgs, AgentAway, Config, DnsScope, Environment, Grace, KEYS, Listen, LogFormat, OwnConfig,
    ProbeSource, Problems, Value, settings,
};

fn named() -> Environment {
    Environment::default().with("NODE_NAME", "node-1")
}

fn load(args: &AgentArgs, environment: &Environment) -> Config {
    Config::load(args, environment).unwrap().config
}

fn refused(args: &AgentArgs, environment: &Environment) -> Vec<(String, String)> {
    let Problems(problems) = Config::load(args, environment).unwrap_err();
    problems
        .into_iter()
        .map(|p| (p.key.clone(), p.to_string()))
        .collect()
}

fn flags(words: &[&str]) -> Result<AgentArgs, clap::Error> {
    let command = AgentArgs::augment_args(clap::Command::new("agent").no_binary_name(true));
    AgentArgs::from_arg_matches(&command.try_get_matches_from(words)?)
}

/// A file of settings that is removed with its guard.
struct File(PathBuf);

impl File {
    fn new(name: &str, text: &str) -> Self {
        let path =
            std::env::temp_dir().join(format!("culvert-config-{}-{name}", std::process::id()));
        fs::write(&path, text).unwrap();
        Self(path)
    }

    fn args(&self) -> AgentArgs {
        AgentArgs {
            config: Some(self.0.clone()),
            ..AgentArgs::default()
        }
    }
}

impl Drop for File {
    fn drop(&mut self) {
        fs::remove_file(&self.0).unwrap_or_default();
    }
}

#[test]
fn defaults_are_whole_and_need_a_node_name_alone() {
    let config = load(&AgentArgs::default(), &named());
    assert_eq!(config.node_name.as_deref(), Some("node-1"));
    assert_eq!(config.metrics_address, Listen::any(15014));
    assert_eq!(config.health_address, Listen::any(8000));
    assert_eq!(config.agent_socket, Path::new("/run/culvert/agent.sock"));
    assert_eq!(config.ztunnel_grace, Grace(Some(Duration::from_secs(10))));
    assert_eq!(config.probe_source, ProbeSource::Kubelet);
    assert_eq!(config.agent_away, AgentAway::Decisions);
    assert_eq!(config.dns_scope, DnsScope::All);
    assert_eq!(config.cni_own_config, OwnConfig::Auto);
    assert_eq!(
        config.excluded_namespaces,
        BTreeSet::from(["kube-system".to_owned()])
    );
    assert!(config.dns_capture && config.ipv6 && config.cni_install && config.cni_chained);
    assert!(!config.disable_safe_upgrade && !config.cni_conf_group_read);

    let without = refused(&AgentArgs::default(), &Environment::default());
    assert_eq!(without.len(), 1, "{without:?}");
    assert!(without[0].1.contains("set NODE_NAME"), "{without:?}");
}

#[test]
fn manifests_need_no_node_name() {
    let args = AgentArgs::default().with("pods", "/srv/pods");
    let config = load(&args, &Environment::default());
    assert!(config.node_name.is_some(), "the host's name stands in");
}

#[test]
fn flags_beat_environment_beats_aliases_beat_the_file_beats_defaults() {
    let file = File::new(
        "order",
        "# settings\nsystem-namespace: from-file\nlog-format: json\nipv6: false\n",
    );
    let environment = named();
    let config = load(&file.args(), &environment);
    assert_eq!(config.system_namespace, "from-file");
    assert_eq!(config.log_format, LogFormat::Json);
    assert!(!config.ipv6);

    let environment = environment.with("SYSTEM_NAMESPACE", "from-alias");
    assert_eq!(
        load(&file.args(), &environment).system_namespace,
        "from-alias"
    );
    let environment = environment.with("CULVERT_SYSTEM_NAMESPACE", "from-env");
    assert_eq!(
        load(&file.args(), &environment).system_namespace,
        "from-env"
    );
    let args = file.args().with("system-namespace", "from-flag");
    let loaded = Config::load(&args, &environment).unwrap();
    assert_eq!(loaded.config.system_namespace, "from-flag");
    let from = |key: &str| {
        let all = settings(&loaded);
        all.iter().find(|s| s.key == key).unwrap().from.to_string()
    };
    assert_eq!(from("system-namespace"), "flag");
    assert_eq!(from("node-name"), "environment NODE_NAME");
    assert_eq!(from("ipv6"), format!("file {}:4", file.0.display()));
    assert_eq!(from("bpffs"), "default");
}

#[test]
fn every_istio_name_is_taken() {
    let names = [
        ("AMBIENT_DNS_CAPTURE", "false", "dns-capture", "false"),
        ("AMBIENT_IPV6", "0", "ipv6", "false"),
        (
            "AMBIENT_ENABLEMENT_SELECTOR",
            "- podSelector:\n    matchLabels: {a: b}\n",
            "enablement-selectors",
            r#"[{"podSelector":{"matchLabels":{"a":"b"}}}]"#,
        ),
        (
            "EXCLUDE_NAMESPACES",
            "kube-system, istio-system",
            "excluded-namespaces",
            "istio-system,kube-system",
        ),
        ("SYSTEM_NAMESPACE", "mesh", "system-namespace", "mesh"),
        (
            "CNI_CONF_NAME",
            "10-calico.conflist",
            "cni-conf-name",
            "10-calico.conflist",
        ),
        ("CNI_CONF_GROUP_READ", "true", "cni-conf-group-read", "true"),
        ("CHAINED_CNI_PLUGIN", "False", "cni-chained", "false"),
        ("ISTIO_OWNED_CNI_CONFIG", "false", "cni-own-config", "false"),
        (
            "ISTIO_OWNED_CNI_CONFIG_FILENAME",
            "02-x.conflist",
            "cni-own-config-name",
            "02-x.conflist",
        ),
        (
            "AMBIENT_DISABLE_SAFE_UPGRADE",
            "T",
            "disable-safe-upgrade",
            "true",
        ),
        (
            "MOUNTED_CNI_NET_DIR",
            "/host/etc/cni/net.d",
            "cni-conf-dir",
            "/host/etc/cni/net.d",
        ),
        (
            "ZTUNNEL_UDS_ADDRESS",
            "/run/z.sock",
            "zds-socket",
            "/run/z.sock",
        ),
        ("MONITORING_PORT", "15015", "metrics-address", ":15015"),
        ("LOG_LEVEL", "default:warn,cni:debug", "log-level", "warn"),
    ];
    let environment = names
        .iter()
        .fold(named(), |env, (name, text, ..)| env.with(name, text));
    let loaded = Config::load(&AgentArgs::default(), &environment).unwrap();
    let all = settings(&loaded);
    for (name, _, key, value) in names {
        let setting = all.iter().find(|s| s.key == key).unwrap();
        assert_eq!(setting.value, value, "{name}");
        assert_eq!(setting.from.to_string(), format!("environment {name}"));
    }
    assert_eq!(loaded.warnings, Vec::<String>::new());
}

#[test]
fn ours_wins_and_a_difference_is_told() {
    let same = named()
        .with("CULVERT_IPV6", "false")
        .with("AMBIENT_IPV6", "0");
    let loaded = Config::load(&AgentArgs::default(), &same).unwrap();
    assert_eq!(loaded.warnings, Vec::<String>::new());

    let different = named()
        .with("CULVERT_IPV6", "false")
        .with("AMBIENT_IPV6", "1");
    let loaded = Config::load(&AgentArgs::default(), &different).unwrap();
    assert!(!loaded.config.ipv6);
    assert_eq!(
        loaded.warnings,
        [
            "ipv6: `false` (environment CULVERT_IPV6) is used, not `true` (environment AMBIENT_IPV6): set one of them"
        ]
    );
}

#[test]
fn every_problem_is_listed_with_key_origin_and_cure() {
    let file = File::new(
        "problems",
        "ztunnel-grace: soon\nprobe-sauce: node\nreconcile-period: 1ms\nexcluded-namespaces: [ok, Not_OK]\n",
    );
    let environment = Environment::default()
        .with("CULVERT_DNS_CAPTURE", "maybe")
        .with("MONITORING_PORT", "metrics")
        .with("CULVERT_ZDS_SOCKET", "relative.sock")
        .with("CULVERT_RUN_DIR", &format!("/{}", "x".repeat(120)));
    let args = file
        .args()
        .with("log-level", "loud")
        .with("enablement-selectors", "podSelector: {}")
        .with("health-address", ":15014");
    let problems = refused(&args, &environment);
    let expected = [
        ("probe-sauce", "did you mean `probe-source`?"),
        ("ztunnel-grace", "`soon` is no duration"),
        ("excluded-namespaces", "`Not_OK` can be no namespace's name"),
        ("dns-capture", "`maybe` is neither true nor false"),
        ("metrics-address", "`metrics` is no port number"),
        ("zds-socket", "not an absolute path"),
        ("log-level", "`loud` is neither one of off, error"),
        ("enablement-selectors", "no list"),
        ("node-name", "set NODE_NAME"),
        ("agent-socket", "too long for a unix socket"),
        ("reconcile-period", "set it to 100ms at least"),
        ("health-address", "give it another port"),
    ];
    for (key, text) in expected {
        let found = problems
            .iter()
            .find(|(k, _)| k == key)
            .unwrap_or_else(|| panic!("{key} is missing in {problems:#?}"));
        assert!(found.1.contains(text), "{found:?} should say {text:?}");
        assert!(found.1.contains("; "), "no cure: {found:?}");
    }
    assert_eq!(problems.len(), expected.len(), "{problems:#?}");
    let whole = Config::load(&args, &environment).unwrap_err().to_string();
    assert!(whole.starts_with("12 settings are wrong:\n  "), "{whole}");
    assert!(
        whole.contains(&format!("{}:1", file.0.display())),
        "the line is named: {whole}"
    );
}

#[test]
fn a_file_that_cannot_be_used_says_why() {
    let missing = AgentArgs {
        config: Some("/nonexistent/culvert.yaml".into()),
        ..AgentArgs::default()
    };
    let problems = refused(&missing, &named());
    assert!(problems[0].1.contains("No such file"), "{problems:?}");
    for (name, text, expected) in [
        ("torn", "ipv6: [1,", "config.yaml"),
        ("list", "- ipv6: true\n", "config.yaml"),
        ("twice", "ipv6: true\nipv6: false\n", "config.yaml"),
        ("binary", "\u{0}\u{1}", "config.yaml"),
    ] {
        let file = File::new(&format!("{name}-{expected}"), text);
        let problems = refused(&file.args(), &named());
        assert_eq!(problems.len(), 1, "{name}: {problems:?}");
        assert!(problems[0].1.contains("each key once"), "{problems:?}");
    }
    let huge = File::new("huge", &"# x\n".repeat(400_000));
    let problems = refused(&huge.args(), &named());
    assert!(problems[0].1.contains("larger than"), "{problems:?}");
    let not_text = File::new("latin1", "");
    fs::write(&not_text.0, b"ipv6: \xff\n").unwrap();
    let problems = refused(&not_text.args(), &named());
    assert!(problems[0].1.contains("cannot be read"), "{problems:?}");

    for (name, text) in [
        ("empty", ""),
        ("comment", "# nothing\n"),
        ("document", "---\n"),
    ] {
        let file = File::new(name, text);
        assert!(load(&file.args(), &named()).ipv6, "{name}");
    }
}

#[test]
fn the_file_takes_yaml_s_own_types() {
    let file = File::new(
        "types",
        "ipv6: false\nenrolment-concurrency: 3\nztunnel-grace: forever\nplugin-budget: 20\n\
         excluded-namespaces: []\nsystem-namespace: null\nmetrics-address: 15015\n\
         enablement-selectors:\n- podSelector: {matchLabels: {mesh: on-purpose}}\n",
    );
    let config = load(&file.args(), &named());
    assert!(!config.ipv6);
    assert_eq!(config.enrolment_concurrency.get(), 3);
    assert_eq!(config.ztunnel_grace, Grace(None));
    assert_eq!(config.plugin_budget, Duration::from_secs(20));
    assert_eq!(config.excluded_namespaces, BTreeSet::new());
    assert_eq!(config.system_namespace, "istio-system");
    assert_eq!(config.metrics_address, Listen::any(15015));
    let selectors = config.enablement_selectors.0.unwrap();
    assert_eq!(
        selectors[0]["podSelector"]["matchLabels"]["mesh"],
        "on-purpose"
    );
}

#[test]
fn flags_are_parsed() {
    let args = flags(&[
        "--ipv6=false",
        "--cni-conf-group-read",
        "--ztunnel-grace",
        "0",
        "--config",
        "/etc/culvert.yaml",
        "--print-config",
    ])
    .unwrap();
    assert!(args.print_config);
    assert_eq!(args.config.as_deref(), Some(Path::new("/etc/culvert.yaml")));
    let args = AgentArgs {
        config: None,
        ..args
    };
    let config = load(&args, &named());
    assert!(!config.ipv6 && config.cni_conf_group_read);
    assert_eq!(config.ztunnel_grace, Grace(Some(Duration::ZERO)));
    assert!(flags(&["--no-such-flag"]).is_err());
    assert!(
        flags(&["--ztunnel-grace", "soon"]).is_ok(),
        "a wrong value is reported with all the others"
    );
}

#[test]
fn settings_of_every_command_count_as_flags_of_the_agent() {
    let command = clap::Command::new("culvert")
        .arg(
            clap::Arg::new("bpffs")
                .long("bpffs")
                .global(true)
                .default_value("/d"),
        )
        .subcommand(AgentArgs::augment_args(clap::Command::new("agent")));
    for (words, expected) in [
        (["culvert", "--bpffs=/x", "agent"].as_slice(), "/x"),
        (&["culvert", "agent", "--bpffs=/y"], "/y"),
        (&["culvert", "agent"], crate::kernel::pins::DEFAULT),
    ] {
        let matches = command.clone().try_get_matches_from(words).unwrap();
        let args = AgentArgs::from_arg_matches(matches.subcommand().unwrap().1).unwrap();
        assert_eq!(load(&args, &named()).bpffs, Path::new(expected));
    }
}

#[test]
fn a_variable_that_looks_like_ours_is_warned_of() {
    let environment = named()
        .with("CULVERT_PROBE_SORCE", "node")
        .with("CULVERT_METRICS_SERVICE_HOST", "10.0.0.1")
        .with("CULVERT_METRICS_PORT", "tcp://10.0.0.1:15014")
        .with("CULVERT_METRICS_PORT_15014_TCP_ADDR", "10.0.0.1");
    let loaded = Config::load(&AgentArgs::default(), &environment).unwrap();
    assert_eq!(
        loaded.warnings,
        [
            "environment CULVERT_PROBE_SORCE is no setting and is ignored: did you mean CULVERT_PROBE_SOURCE?"
        ]
    );
}

#[test]
fn an_empty_variable_is_no_setting() {
    let environment = named()
        .with("CULVERT_IPV6", "")
        .with("CULVERT_KUBECONFIG", "");
    let config = load(&AgentArgs::default(), &environment);
    assert!(config.ipv6);
    assert_eq!(config.kubeconfig, None);
}

#[test]
fn keys_are_told_apart() {
    let mut names: Vec<String> = KEYS.iter().map(super::Key::env).collect();
    names.extend(
        KEYS.iter()
            .flat_map(|k| k.aliases)
            .map(|a| a.env.to_owned()),
    );
    names.sort_unstable();
    let count = names.len();
    names.dedup();
    assert_eq!(names.len(), count, "two keys share a name");
    for key in KEYS {
        assert!(
            !key.help.trim().is_empty() && !key.shape.is_empty(),
            "{}",
            key.name
        );
    }
}

#[test]
fn what_is_shown_can_be_given_again() {
    let environment = named().with("CULVERT_ZTUNNEL_GRACE", "1m 30s");
    let first = Config::load(&AgentArgs::default(), &environment).unwrap();
    let again = settings(&first)
        .into_iter()
        .filter(|s| !s.value.is_empty())
        .fold(AgentArgs::default(), |args, s| args.with(s.key, s.value));
    assert_eq!(load(&again, &Environment::default()), first.config);
}

proptest! {
    #[test]
    fn no_text_panics_and_what_is_taken_is_shown_as_it_was_meant(text in "\\PC{0,40}") {
        fn check<T: Value + PartialEq + std::fmt::Debug>(text: &str) -> Result<(), TestCaseError> {
            if let Ok(value) = T::parse(text) {
                prop_assert_eq!(T::parse(&value.show()), Ok(value));
            }
            Ok(())
        }
        check::<bool>(&text)?;
        check::<String>(&text)?;
        check::<PathBuf>(&text)?;
        check::<Duration>(&text)?;
        check::<Listen>(&text)?;
        check::<Grace>(&text)?;
        check::<super::LogLevel>(&text)?;
        check::<BTreeSet<String>>(&text)?;
        check::<super::EnablementSelectors>(&text)?;
        prop_assert!(super::values::istio_log_level(&text).is_ok() || text.contains(':'));
    }

    #[test]
    fn no_file_panics(text in "(\\PC|\n|: |- ){0,60}") {
        let file = File::new("fuzz", &text);
        let _ = Config::load(&file.args(), &named());
    }
}
