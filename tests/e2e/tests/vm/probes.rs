//! Telling the kubelet by its process, which older kernels do in one place only. Here the kubelet is this very program:
//! there is no other in the guest that connects when it is told to.

use std::sync::Arc;

use culvert::kernel::{
    Node,
    kubelet::{Follower, InForce},
};
use culvert_e2e::traffic::Via;
use culvert_e2e::{LONG, Mesh};
use culvert_lab::{Family, Server};

#[test]
fn only_the_kubelets_probes_are_vouched_for() {
    let mesh = Mesh::new("vm-kubelet").unwrap();
    let pod = mesh.lab.pod("a").unwrap();
    mesh.enrol(&pod, &["--probe-source", "kubelet"]).unwrap();
    let node = mesh.lab.node();
    let servers: Vec<_> = Family::BOTH
        .into_iter()
        .map(|family| {
            (
                family,
                Server::echo(&pod, pod.at(family, 8080).unwrap()).unwrap(),
            )
        })
        .collect();
    let ways = || -> Vec<Via> {
        let way = |(_, server): &(Family, Server)| mesh.via(&pod, node, server).unwrap().0;
        servers.iter().map(way).collect()
    };
    assert_eq!(ways(), [Via::Inbound, Via::Inbound], "before it is found");

    let exe = std::env::current_exe().unwrap();
    let name = exe.file_name().unwrap().to_str().unwrap().to_owned();
    let (tell, told) = std::sync::mpsc::channel();
    let programs = Arc::new(Node::open(mesh.lab.bpffs()).unwrap().unwrap());
    let follow = |names: Vec<String>| {
        let tell = tell.clone();
        Follower::start(Arc::clone(&programs), names, move |force| {
            // The test may have ended.
            let _over = tell.send(force);
        })
        .unwrap()
    };
    let follower = follow(vec![name]);
    let pids = vec![std::process::id()];
    assert_eq!(
        told.recv_timeout(LONG).unwrap(),
        InForce::Processes { pids }
    );
    assert_eq!(ways(), [Via::Nothing, Via::Nothing]);
    drop(follower);
    assert_eq!(
        ways(),
        [Via::Nothing, Via::Nothing],
        "while nobody follows it"
    );

    // Not the kubelet any more.
    let follower = follow(vec!["another-program".to_owned()]);
    let nobody = told.recv_timeout(LONG).unwrap();
    assert!(matches!(nobody, InForce::Nobody { .. }), "{nobody:?}");
    assert_eq!(ways(), [Via::Inbound, Via::Inbound]);
    let counts = programs.maps().probe_counts.get().unwrap();
    assert_eq!((counts.kubelet, counts.node, counts.not_vouched), (4, 0, 4));
    drop(follower);
}
