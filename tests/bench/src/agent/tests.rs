//! That each part runs on the real thing and that growth is seen. Needs root.

use super::{Options, Output, Part, measure};

fn options(only: &[Part]) -> Options {
    Options {
        quick: true,
        only: only.to_vec(),
        pods: Some(3),
        namespaces: Some(5),
        flips: Some(1),
        adds: Some(4),
        idle: Some(1),
        pods_churned: Some(6),
        output: Output::Json,
        to: None,
        binaries: None,
        strict: false,
    }
}

#[test]
fn the_agent_is_measured_and_growth_is_named() {
    let mut results = measure(&options(&[])).unwrap();
    let text = results.text();
    for part in [
        "ADD of a mesh pod",
        "all enrolled",
        "pods added and removed",
    ] {
        assert!(text.contains(part), "{text}");
    }
    let json = results.json();
    assert_eq!(json["targets"].as_array().unwrap().len(), 7, "{json}");
    assert_eq!(json["add"]["mesh"]["samples"], 4, "{json}");
    let churn = results.churn.as_mut().unwrap();
    assert!(churn.grown().iter().all(|g| g.contains("memory")), "{text}");
    churn.after.pins += 1;
    assert!(results.grown().iter().any(|g| g.contains("pins")));
}
