//! The entry that the installer writes is the one the plugin reads: two packages, one meaning.
#![expect(
    clippy::unwrap_used,
    reason = "test code: a step that fails is a test that fails"
)]

use std::collections::BTreeSet;

use culvert::install::{AgentAway, EntryOptions};
use culvert_cni::config;
use serde_json::{Value, json};

fn read(options: &EntryOptions) -> config::Entry {
    let mut entry = options.entry();
    entry.insert("cniVersion".to_owned(), json!("1.0.0"));
    entry.insert("name".to_owned(), json!("podnet"));
    config::parse(Value::Object(entry).to_string().as_bytes())
        .unwrap()
        .entry
}

#[test]
fn defaults_agree() {
    let read = read(&EntryOptions::default());
    assert_eq!(
        read.excluded_namespaces,
        BTreeSet::from(["kube-system".to_owned()])
    );
    // The plugin has no namespace excluded of which it is not told.
    let without = config::Entry {
        excluded_namespaces: BTreeSet::new(),
        ..read
    };
    assert_eq!(without, config::Entry::default());
}

#[test]
fn every_key_arrives() {
    let written = EntryOptions {
        socket: "/a".into(),
        budget_seconds: 7,
        agent_away: AgentAway::Strict,
        excluded_namespaces: BTreeSet::from(["b".to_owned(), "c".to_owned()]),
        decision_file: "/d".into(),
        decision_max_age_seconds: 9,
        log_file: "/e".into(),
    };
    let wanted = config::Entry {
        socket: "/a".into(),
        budget_seconds: 7,
        agent_away: config::AgentAway::Strict,
        excluded_namespaces: BTreeSet::from(["b".to_owned(), "c".to_owned()]),
        decision_file: "/d".into(),
        decision_max_age_seconds: 9,
        log_file: "/e".into(),
    };
    assert_eq!(read(&written), wanted);
    assert_eq!(written.entry().len(), 8, "and `type`");
}
