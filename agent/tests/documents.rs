//! The pages that list settings and metrics say what the code has: both are made from it.
//!
//! `CULVERT_BLESS=1 cargo test -p culvert --test documents` writes them anew; read the diff.
#![expect(
    clippy::unwrap_used,
    reason = "test code: a step that fails is a test that fails"
)]

mod pages;

use std::{collections::BTreeSet, fmt::Write as _};

use culvert::{
    admin::Metrics,
    config::{AgentArgs, Config, Environment, KEYS, settings},
};

/// A metric as its text shows it.
#[derive(Default)]
struct Shown {
    name: String,
    kind: String,
    help: String,
    /// Names of labels, each with the values there are.
    labels: Vec<(String, BTreeSet<String>)>,
}

fn shown(text: &str) -> Vec<Shown> {
    let mut all: Vec<Shown> = Vec::new();
    for line in text.lines() {
        if let Some((name, help)) = line.strip_prefix("# HELP ").and_then(|l| l.split_once(' ')) {
            all.push(Shown {
                name: name.to_owned(),
                help: help.to_owned(),
                ..Shown::default()
            });
        } else if let Some((name, kind)) =
            line.strip_prefix("# TYPE ").and_then(|l| l.split_once(' '))
        {
            let metric = all.last_mut().unwrap();
            assert_eq!(metric.name, name);
            kind.clone_into(&mut metric.kind);
        } else if let Some((_, rest)) = line.split_once('{') {
            let metric = all.last_mut().unwrap();
            for pair in rest.split_once('}').unwrap().0.split(',') {
                let (name, value) = pair.split_once('=').unwrap();
                // Bounds of histograms are no label that anybody chooses by.
                if name == "le" {
                    continue;
                }
                let value = value.trim_matches('"').to_owned();
                match metric.labels.iter_mut().find(|(n, _)| n == name) {
                    Some((_, values)) => drop(values.insert(value)),
                    None => metric.labels.push((name.to_owned(), [value].into())),
                }
            }
        }
    }
    all
}

#[test]
fn the_page_of_metrics() {
    let mut metrics = shown(&Metrics::new().encode().unwrap());
    metrics.sort_by(|a, b| a.name.cmp(&b.name));
    let mut page = String::from(
        "# Metrics\n\n\
         Served as OpenMetrics text at `/metrics` of `--metrics-address` (default `:15014`). Every series exists from the \
         start.\nStable: name, labels and meaning stay from release to release. Unstable: for debugging, may change or go.\n\n\
         Names without the prefix `culvert_` are those that Istio's node agent and Prometheus's own libraries use, with the same meaning.\n\n\
         | metric | type | labels | stable | meaning |\n|---|---|---|---|---|\n",
    );
    for metric in &metrics {
        let (stable, help) = match metric.help.split_once("] ") {
            Some(("[STABLE", help)) => ("yes", help),
            Some(("[UNSTABLE", help)) => ("no", help),
            _ => panic!("{} does not say whether it is stable", metric.name),
        };
        let suffix = match metric.kind.as_str() {
            "counter" => "_total",
            "info" => "_info",
            _ => "",
        };
        let labels: Vec<String> = metric
            .labels
            .iter()
            .map(|(name, values)| {
                let values: Vec<&str> = values.iter().map(String::as_str).collect();
                if metric.kind == "info" {
                    format!("`{name}`")
                } else {
                    format!("`{name}`: {}", values.join(", "))
                }
            })
            .collect();
        writeln!(
            page,
            "| `{}{suffix}` | {} | {} | {stable} | {} |",
            metric.name,
            metric.kind,
            labels.join("; "),
            help.trim_end_matches('.')
        )
        .unwrap();
    }
    pages::same("--test documents", "metrics.md", &page);
}

#[test]
fn names_follow_the_custom_of_prometheus() {
    let metrics = shown(&Metrics::new().encode().unwrap());
    let mut names = BTreeSet::new();
    for metric in &metrics {
        assert!(names.insert(&metric.name), "{} is there twice", metric.name);
        assert!(
            metric
                .name
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_'),
            "{}",
            metric.name
        );
        assert!(
            !metric.name.ends_with("_total"),
            "{}: the suffix comes by itself",
            metric.name
        );
        assert!(
            !metric.help.ends_with(".."),
            "{}: {}",
            metric.name,
            metric.help
        );
        if metric.kind == "histogram" {
            assert!(
                metric.name.ends_with("_seconds"),
                "{} has no unit",
                metric.name
            );
        }
    }
    // What dashboards for Istio's node agent ask for.
    for name in [
        "ztunnel_connected",
        "nodeagent_reconcile_events",
        "istio_cni_install_ready",
        "istio_cni_installs",
        "istio_cni_plugin_requests",
    ] {
        assert!(names.contains(&name.to_owned()), "{name}");
    }
}

#[test]
fn the_page_of_settings() {
    let environment = Environment::default().with("NODE_NAME", "node");
    let loaded = Config::load(&AgentArgs::default(), &environment).unwrap();
    let mut page = String::from(
        "# Settings of `culvert agent`\n\n\
         The strongest source that names a setting wins: its flag (`--KEY`), its variable in the environment, the variable \
         of Istio's node agent that\nmeans the same, the file given with `--config` (YAML, `KEY: VALUE`), the default. An \
         empty variable counts as not set. All problems are\nreported at once; `culvert agent --print-config` shows the \
         values in force and where each comes from.\n\n\
         | key | variables | values | default | meaning |\n|---|---|---|---|---|\n",
    );
    for (key, setting) in KEYS.iter().zip(settings(&loaded)) {
        let variables =
            std::iter::once(key.env()).chain(key.aliases.iter().map(|a| a.env.to_owned()));
        let variables: Vec<String> = variables.map(|v| format!("`{v}`")).collect();
        let default = match setting.value.as_str() {
            "" => String::new(),
            // It was needed to load anything.
            "node" if key.name == "node-name" => String::new(),
            value => format!("`{value}`"),
        };
        writeln!(
            page,
            "| `{}` | {} | {} | {default} | {} |",
            key.name,
            variables.join(", "),
            key.shape.replace('|', " \\| "),
            key.help.trim().trim_end_matches('.')
        )
        .unwrap();
    }
    pages::same("--test documents", "settings.md", &page);
}
