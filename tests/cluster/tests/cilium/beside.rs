//! What only concerns Cilium: that its fast settings are in force, and that its agent starts anew and is configured anew
//! while traffic flows and pods start.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use culvert_cluster::AGENT;

use crate::agent::{NotExclusive, restart_with, status};
use crate::bed::{Bed, LONG, counted_once_each, talker};
use crate::capture::{Capture, seen_on};
use crate::flow::Traffic;
use crate::turns::{CHANGED, ON_IT};

/// How long Cilium's agents may take on both nodes, side by side, to compile their programs and to answer.
const ANSWERS: Duration = Duration::from_secs(300);

/// The only test on the cluster for a while. One alone may wait for this: two would wait for each other.
struct Alone(());

impl Alone {
    /// Waits until the others have ended; this one has its turn already.
    fn wait() -> Self {
        let on_it = ON_IT.lock().unwrap();
        let mut on_it = CHANGED
            .wait_while(on_it, |on_it| *on_it != Some(1))
            .unwrap();
        *on_it = None;
        Self(())
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        *ON_IT.lock().unwrap_or_else(PoisonError::into_inner) = Some(1);
        CHANGED.notify_all();
    }
}

/// What Cilium's agent says of itself under a heading, with one blank between two words.
fn said(status: &str, heading: &str) -> String {
    let mut lines = status.lines().map(str::trim);
    let line = lines.find_map(|line| line.strip_prefix(heading));
    let line = line.unwrap_or_else(|| panic!("no {heading} in {status}"));
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Asked for is not yet so: Cilium falls back by itself where it finds something missing.
#[test]
fn ciliums_fast_settings_are_in_force() {
    let bed = Bed::new("fast", &[]);
    for node in bed.cluster.nodes() {
        let status = status(bed.cluster, &node).unwrap();
        for (heading, wanted) in [
            ("KubeProxyReplacement:", "True"),
            ("Routing:", "Network: Native Host: BPF"),
            ("Masquerading:", "BPF"),
            ("Socket LB:", "Enabled"),
            ("Socket LB Coverage:", "Hostns-only"),
        ] {
            let said = said(&status, heading);
            assert!(
                said.starts_with(wanted),
                "{}: {heading} {said}",
                node.name()
            );
        }
    }
}

/// Starts Cilium's agent anew with `cni-exclusive` of that value and does something while it is away and starts. All the
/// while new connections are made.
fn restarted(traffic: &Traffic, value: &str, meanwhile: impl FnOnce()) {
    let bed = &traffic.bed;
    let made = || bed.told("load", "good").unwrap();
    let (began, before) = (Instant::now(), made());
    restart_with(bed.cluster, "cni-exclusive", value).unwrap();
    meanwhile();
    for node in bed.cluster.nodes() {
        let waiting = Instant::now();
        while let Err(error) = status(bed.cluster, &node) {
            assert!(waiting.elapsed() < ANSWERS, "{}: {error:#}", node.name());
            std::thread::sleep(Duration::from_millis(500));
        }
    }
    let (took, made) = (began.elapsed(), made() - before);
    eprintln!("cni-exclusive={value}: {made} new connections in {took:?}");
    // Some twenty a second on an idle machine; two compilers and a capture take most of this one's time.
    assert!(made > took.as_secs(), "{made} in {took:?}");
    traffic.goes_on();
}

#[test]
fn ciliums_agent_starts_anew_and_takes_the_cni_directory_while_pods_start_and_talk() {
    let traffic = Traffic::start("exclusive");
    let bed = &traffic.bed;
    let _alone = Alone::wait();
    let _not_exclusive = NotExclusive(bed);
    let six = bed.addresses("b")[1];
    bed.start(&[talker("talker6", "node1", six)]);
    bed.wait_for_more_lines("talker6");
    let before = bed.starts();
    let goes_on = || {
        bed.wait_for_more_lines("talker6");
        let starts = bed.starts();
        for (container, start) in &before {
            assert_eq!(starts[container], *start, "{container}");
        }
    };

    // Cilium's default takes away every CNI configuration that is not its own. Pods may start outside then; the agent says
    // so and who it is, and has them in the mesh a moment later.
    restarted(&traffic, "true", || traffic.new_pods_start("exclusive"));
    let events = ["get", "events", "-A", "-o", "json"];
    let told = |text: &str| {
        text.contains("CulvertCiliumExclusive") && text.contains("set cni.exclusive=false")
    };
    let events = bed
        .cluster
        .admin()
        .wait_until("the event", LONG, &events, told);
    events.unwrap();
    goes_on();

    // As it is meant to be: while Cilium's agent is away and while it starts, nothing is sent in the clear.
    let captures = Capture::start(bed.cluster, "exclusive");
    restarted(&traffic, "false", || {
        bed.mesh.wait_for_rollout(AGENT.0, AGENT.1).unwrap();
    });
    restarted(&traffic, "false", || {
        bed.start(&[
            traffic.sender("one", "node1", "exclusive-secret"),
            traffic.sender("two", "node2", "exclusive-secret"),
        ]);
        for name in ["one", "two"] {
            bed.wait_for_membership(name, true);
        }
    });
    for name in ["one", "two"] {
        let tries = bed.tries(name, "send");
        counted_once_each(bed.counted(name, "hbone_out"), &[tries]);
        assert_eq!(bed.counted(name, "passthrough_out"), 0, "{name}");
    }
    assert_eq!(seen_on(captures, &["exclusive-secret"]), [0]);
    goes_on();
}
