//! The daemon's tracker and its verifying: what is noticed of a pod that changes, of hands that take away what is ours,
//! and what looking costs with a node full of pods.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "test code: a step that fails is a test that fails"
)]

use std::{
    path::PathBuf,
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use culvert::kernel::{
    LoadOptions, Netns, NetnsCookie, Node, pod,
    track::{Event, Tracker},
    verify::{self, Kind, Problem},
};
use culvert_e2e::{LONG, bpf};
use culvert_lab::{Family, Lab, Ns, Route, Rule, RuleAction};

/// Sysctls are read in turn; this is the most that a round of them may take, and then some for a busy machine.
const A_ROUND: Duration = Duration::from_secs(5 + 5);

/// Attached to the cgroup, each by a link of its own.
const NODE_PROGRAMS: [&str; 3] = ["culvert_connect", "culvert_sockopt", "culvert_vouch"];

fn load(lab: &Lab) -> Arc<Node> {
    let options = LoadOptions {
        bpffs: lab.bpffs().to_path_buf(),
        cgroup_root: Some(lab.cgroup().to_path_buf()),
        dns_cgroup: None,
        probe_source: None,
        at_home: true,
        set_aside: false,
    };
    let (node, _) = lab.node().run(|| Node::load(&options)).unwrap();
    Arc::new(node)
}

fn enrol(lab: &Lab, node: &Node, pod: &Ns, policy: &pod::Policy) -> Arc<Netns> {
    let netns = Netns::open(pod.path()).unwrap();
    lab.node()
        .run(|| pod::attach(node, &netns, policy))
        .unwrap();
    Arc::new(netns)
}

struct Watching {
    tracker: Tracker,
    events: mpsc::Receiver<Event>,
}

impl Watching {
    fn start(lab: &Lab, node: &Arc<Node>) -> Self {
        let (tell, events) = mpsc::channel();
        let node = Arc::clone(node);
        let tracker = lab
            .node()
            .run(|| Tracker::start(node, move |event| drop(tell.send(event))));
        Self {
            tracker: tracker.unwrap(),
            events,
        }
    }

    /// The next event for which `what` has an answer; failures end the test, others are passed over.
    fn next<T>(&self, name: &str, within: Duration, what: impl Fn(&Event) -> Option<T>) -> T {
        let end = Instant::now() + within;
        let mut seen = Vec::new();
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.events.recv_timeout(left) {
                Ok(event) => match what(&event) {
                    Some(answer) => return answer,
                    None => seen.push(event),
                },
                Err(_) => panic!("{name}: not told within {within:?}; told of {seen:?}"),
            }
        }
    }

    fn repaired(&self, name: &str, within: Duration) -> (NetnsCookie, Vec<String>) {
        self.next(name, within, |event| match event {
            Event::Repaired { cookie, repairs } => {
                Some((*cookie, repairs.iter().map(ToString::to_string).collect()))
            }
            _ => None,
        })
    }

    fn followed(&self, name: &str, words: &[&str]) {
        self.next(name, LONG, |event| match event {
            Event::Followed { changes, .. } => {
                let text = changes.join("; ");
                words.iter().all(|w| text.contains(w)).then_some(())
            }
            Event::Repaired { repairs, .. } => panic!("{name}: taken for a repair: {repairs:?}"),
            _ => None,
        });
    }

    /// Nothing is told for a while.
    fn quiet(&self, name: &str) {
        if let Ok(event) = self.events.recv_timeout(Duration::from_millis(1500)) {
            panic!("{name}: {event:?}");
        }
    }
}

fn problems(node: &Node, netns: &Netns) -> Vec<Problem> {
    verify::verify_deep(node, netns).unwrap()
}

#[test]
fn what_somebody_takes_away_is_put_back_and_said() {
    let lab = Lab::new("trackrepair").unwrap();
    let node = load(&lab);
    let pod = lab.pod("a").unwrap();
    let other = lab.pod("b").unwrap();
    let policy = pod::Policy {
        virtual_interfaces: vec!["tap0".to_owned()],
        ..pod::Policy::default()
    };
    lab.add_interface(&pod, "tap0").unwrap();
    let netns = enrol(&lab, &node, &pod, &policy);
    let bystander = enrol(&lab, &node, &other, &pod::Policy::default());
    let watching = Watching::start(&lab, &node);
    watching.tracker.watch(Arc::clone(&netns));
    watching.tracker.watch(bystander);
    watching.quiet("pods that are whole");

    for family in Family::BOTH {
        let turn = Rule {
            fwmark: Some((0x111, 0xff5)),
            pref: Some(0),
            ..Rule::fwmark(family, 0, 15001)
        };
        pod.del_rule(&turn).unwrap();
        let (cookie, repairs) = watching.repaired("a rule", LONG);
        assert_eq!(cookie, netns.cookie());
        assert!(
            repairs.iter().any(|r| r.contains("0x111/0xff5")),
            "{repairs:?}"
        );
        assert_eq!(problems(&node, &netns), Vec::new(), "{family:?}");
    }

    // All rules of ours at once, those of the virtual interface with them: the map still knows it.
    while let Some(rule) = ours_by_interface(&pod) {
        pod.del_rule(&rule).unwrap();
    }
    let refuse = Rule {
        fwmark: Some((0x110, 0xff4)),
        pref: Some(0),
        action: RuleAction::Unreachable,
        ..Rule::fwmark(Family::V4, 0, 0)
    };
    pod.del_rule(&refuse).unwrap();
    watching.repaired("the virtual interface's rules", LONG);
    culvert_e2e::eventually("the pod is whole", || {
        Ok(problems(&node, &netns).is_empty() && ours_by_interface(&pod).is_some())
    })
    .unwrap();
    while watching.events.recv_timeout(Duration::from_secs(2)).is_ok() {}

    let default: ipnet::IpNet = "0.0.0.0/0".parse().unwrap();
    let lo = Route {
        table: 15001,
        local: true,
        metric: Some(50),
        ..Route::dev(default, "lo")
    };
    pod.del_route(&lo).unwrap();
    let (_, repairs) = watching.repaired("a route", LONG);
    assert!(
        repairs.iter().any(|r| r.contains("metric 50 table 15001")),
        "{repairs:?}"
    );

    for key in [
        "net/ipv4/tcp_fwmark_accept",
        "net/ipv4/fwmark_reflect",
        "net/ipv6/fwmark_reflect",
    ] {
        pod.set_sysctl(key, "0").unwrap();
        assert_eq!(problems(&node, &netns)[0].kind, Kind::Sysctl, "{key}");
        let (cookie, repairs) = watching.repaired("a sysctl", A_ROUND);
        assert_eq!(cookie, netns.cookie());
        assert!(repairs.iter().any(|r| r.contains(key)), "{repairs:?}");
        assert_eq!(pod.sysctl(key).unwrap(), "1");
    }
    watching.quiet("afterwards");

    // A pod that is let go is let go of, and nothing is put back in it.
    lab.node().run(|| pod::detach(&node, &netns)).unwrap();
    let gone = watching.next("a pod that was detached", LONG, |event| match event {
        Event::Gone { cookie } => Some(*cookie),
        _ => None,
    });
    assert_eq!(gone, netns.cookie());
    assert_eq!(pod.sysctl("net/ipv4/tcp_fwmark_accept").unwrap(), "0");
    assert!(watching.tracker.alive());
}

/// A rule of ours for a virtual interface, as it can be deleted.
fn ours_by_interface(pod: &Ns) -> Option<Rule> {
    Family::BOTH.into_iter().find_map(|family| {
        let rules = pod.rules(family).unwrap();
        rules.iter().any(|r| r.contains("tap0")).then(|| Rule {
            fwmark: None,
            iif: Some("tap0".to_owned()),
            pref: Some(0),
            ..Rule::fwmark(family, 0, 15001)
        })
    })
}

#[test]
fn what_the_pod_does_itself_is_followed() {
    let lab = Lab::new("trackfollow").unwrap();
    let node = load(&lab);
    let pod = lab.pod("a").unwrap();
    let netns = enrol(&lab, &node, &pod, &pod::Policy::default());
    // An address that came while nobody watched.
    pod.add_addr("eth0", "10.77.200.9/16".parse().unwrap())
        .unwrap();
    assert!(
        problems(&node, &netns)
            .iter()
            .any(|p| p.kind == Kind::Address)
    );
    let watching = Watching::start(&lab, &node);
    watching.tracker.watch(Arc::clone(&netns));
    watching.followed("from before", &["address 10.77.200.9 came"]);

    for family in Family::BOTH {
        let address: ipnet::IpNet = match family {
            Family::V4 => "10.77.200.1/16".parse().unwrap(),
            Family::V6 => "fd77::200:1/64".parse().unwrap(),
        };
        pod.add_addr("eth0", address).unwrap();
        let ip = address.addr();
        watching.followed("a new address", &[&format!("address {ip} came")]);
        pod.del_addr("eth0", address).unwrap();
        watching.followed("an address that goes", &[&format!("address {ip} went")]);
    }
    lab.add_interface(&pod, "eth1").unwrap();
    watching.followed("an interface", &["table 15001"]);
    pod.set_down("eth1").unwrap();
    pod.set_up("eth1").unwrap();
    culvert_e2e::eventually(
        "the pod is whole",
        || Ok(problems(&node, &netns).is_empty()),
    )
    .unwrap();
    pod.del_link("eth1").unwrap();
    culvert_e2e::eventually(
        "the pod is whole",
        || Ok(problems(&node, &netns).is_empty()),
    )
    .unwrap();
    while let Ok(event) = watching.events.recv_timeout(Duration::from_millis(1500)) {
        assert!(matches!(event, Event::Followed { .. }), "{event:?}");
    }

    // Forgotten, it is let be.
    watching.tracker.forget(netns.cookie());
    pod.add_addr("eth0", "10.77.200.2/16".parse().unwrap())
        .unwrap();
    watching.quiet("forgotten");
    assert!(
        problems(&node, &netns)
            .iter()
            .any(|p| p.kind == Kind::Address)
    );
}

#[test]
fn what_is_missing_is_found_and_named() {
    let lab = Lab::new("verify").unwrap();
    let node = load(&lab);
    let pod = lab.pod("a").unwrap();
    let netns = enrol(&lab, &node, &pod, &pod::Policy::default());
    let quick = || verify::verify_quick(&node, &[&netns]).unwrap();
    let kinds = |found: Vec<Problem>| {
        found
            .into_iter()
            .map(|p| (p.cookie, p.kind))
            .collect::<Vec<_>>()
    };
    assert_eq!(quick(), Vec::new());
    assert_eq!(problems(&node, &netns), Vec::new());

    // The pod's link.
    std::fs::remove_file(lab.bpffs().join("pods").join(pod.cookie().to_string())).unwrap();
    let expected = vec![(Some(netns.cookie()), Kind::Link)];
    assert_eq!(kinds(quick()), expected);
    assert_eq!(kinds(problems(&node, &netns)), expected);
    enrol(&lab, &node, &pod, &pod::Policy::default());
    assert_eq!(quick(), Vec::new());

    // Its entry.
    let pods = bpf::Map::pinned(&lab.bpffs().join("maps/PODS")).unwrap();
    let entry = pods.get(&pod.cookie().to_ne_bytes()).unwrap();
    pods.delete(&pod.cookie().to_ne_bytes()).unwrap();
    let expected = vec![(Some(netns.cookie()), Kind::Entry)];
    assert_eq!(kinds(quick()), expected);
    assert_eq!(kinds(problems(&node, &netns)), expected);
    pods.set(&pod.cookie().to_ne_bytes(), &entry).unwrap();
    assert_eq!(quick(), Vec::new());

    // The node's programs.
    for name in NODE_PROGRAMS {
        let pin = lab.bpffs().join("links").join(name);
        let away = lab.bpffs().join("links/away");
        std::fs::rename(&pin, &away).unwrap();
        let found = quick();
        assert!(found[0].what.contains(name), "{found:?}");
        assert_eq!(kinds(found), vec![(None, Kind::Program)]);
        std::fs::rename(&away, &pin).unwrap();
    }
    let steer = bpf::Map::pinned(&lab.bpffs().join("maps/STEER")).unwrap();
    steer.delete(&0_u32.to_ne_bytes()).unwrap();
    assert_eq!(kinds(quick()), vec![(None, Kind::Program)]);
    // Attached, but not to what this node is served by.
    let other = Lab::new("verifyother").unwrap();
    let away = load(&other);
    let links: Vec<PathBuf> = NODE_PROGRAMS
        .iter()
        .map(|name| other.bpffs().join("links").join(name))
        .collect();
    for link in &links {
        let ours = lab.bpffs().join("links").join(link.file_name().unwrap());
        std::fs::remove_file(&ours).unwrap();
        std::fs::rename(link, &ours).unwrap();
    }
    drop(away);
    let found = quick();
    let texts: Vec<&str> = found.iter().map(|p| p.what.as_str()).collect();
    let elsewhere = texts
        .iter()
        .filter(|t| t.contains("its cgroup does not run it"));
    assert_eq!(elsewhere.count(), NODE_PROGRAMS.len(), "{texts:?}");
    drop(load(&lab));
    assert_eq!(quick(), Vec::new());
}

#[test]
fn looking_after_a_full_node_is_quiet() {
    let lab = Lab::new("trackmany").unwrap();
    let node = load(&lab);
    let pods: Vec<Ns> = (0..250)
        .map(|n| lab.pod(&format!("p{n}")).unwrap())
        .collect();
    let enrolled: Vec<Arc<Netns>> = pods
        .iter()
        .map(|pod| enrol(&lab, &node, pod, &pod::Policy::default()))
        .collect();
    let all: Vec<&Netns> = enrolled.iter().map(AsRef::as_ref).collect();
    assert_eq!(verify::verify_quick(&node, &all).unwrap(), Vec::new());

    let watching = Watching::start(&lab, &node);
    for netns in &enrolled {
        watching.tracker.watch(Arc::clone(netns));
    }
    watching.quiet("250 pods that are whole");
    // Tests run side by side in this process: this one's thread is in this lab's namespace, but for the moments in which
    // it enters a pod's.
    let inode = lab.node().inode().unwrap().to_string();
    let mut thread = None;
    culvert_e2e::eventually("the tracker's thread is seen", || {
        thread = std::fs::read_dir("/proc/self/task")?
            .flatten()
            .map(|task| task.path())
            .find(|task| {
                std::fs::read_to_string(task.join("comm")).is_ok_and(|c| c.trim() == "tracker")
                    && std::fs::read_link(task.join("ns/net"))
                        .is_ok_and(|l| l.to_string_lossy().contains(&inode))
            });
        Ok(thread.is_some())
    })
    .unwrap();
    let thread = thread.unwrap();
    let wakes = || -> u64 {
        let status = std::fs::read_to_string(thread.join("status")).unwrap();
        let line = status
            .lines()
            .find_map(|l| l.strip_prefix("voluntary_ctxt_switches:"));
        line.unwrap().trim().parse().unwrap()
    };
    // What it costs is in the benchmark; here it counts that it sleeps, however many pods there are.
    let before = wakes();
    std::thread::sleep(Duration::from_secs(8));
    let woken = wakes() - before;
    eprintln!("tracker of 250 idle pods: woken {woken} times in 8 s");
    assert!(woken < 250, "{woken}");

    // Still awake: one of the many is answered at once.
    pods[137]
        .add_addr("eth0", "10.77.200.1/16".parse().unwrap())
        .unwrap();
    watching.followed("one of many", &["10.77.200.1"]);
    let turn = Rule {
        fwmark: Some((0x111, 0xff5)),
        pref: Some(0),
        ..Rule::fwmark(Family::V4, 0, 15001)
    };
    for pod in &pods {
        pod.del_rule(&turn).unwrap();
    }
    let mut repaired = std::collections::BTreeSet::new();
    while repaired.len() < pods.len() {
        repaired.insert(watching.repaired("a rule in each of 250 pods", LONG).0);
    }
}
