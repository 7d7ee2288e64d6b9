//! Which network namespace is the node's own: that of the agent that came last, whoever made the maps.
#![expect(
    clippy::unwrap_used,
    reason = "test code: a step that fails is a test that fails"
)]

use culvert::kernel::{LoadOptions, Netns, Node, pod};
use culvert_lab::{Lab, Ns};

fn load(lab: &Lab, from: &Ns, at_home: bool) -> Node {
    let options = LoadOptions {
        bpffs: lab.bpffs().to_path_buf(),
        cgroup_root: Some(lab.cgroup().to_path_buf()),
        dns_cgroup: None,
        probe_source: None,
        at_home,
        set_aside: false,
    };
    from.run(|| Node::load(&options)).unwrap().0
}

#[test]
fn an_agent_that_adopts_maps_is_at_home_where_it_runs() {
    let lab = Lab::new("home").unwrap();
    let elsewhere = lab.pod("elsewhere").unwrap();
    let home = |node: &Node| node.config().unwrap().node_cookie;

    // Whoever made the maps was somewhere else.
    assert_eq!(home(&load(&lab, &elsewhere, false)), elsewhere.cookie());
    assert_eq!(home(&load(&lab, lab.node(), false)), elsewhere.cookie());
    let node = load(&lab, lab.node(), true);
    assert_eq!(home(&node), lab.node().cookie());

    // Called from within a pod, it is not led astray.
    let netns = Netns::open(elsewhere.path()).unwrap();
    let policy = pod::Policy::default();
    lab.node()
        .run(|| pod::attach(&node, &netns, &policy))
        .unwrap();
    assert_eq!(home(&load(&lab, &elsewhere, true)), lab.node().cookie());
}
