//! The agent's ZDS server and real ztunnel processes: what they serve, hand-offs, refusals, and who is let in.
#![expect(
    clippy::unwrap_used,
    reason = "test code: a step that fails is a test that fails"
)]

use std::{
    collections::BTreeSet,
    fs,
    os::{fd::OwnedFd, unix::fs::PermissionsExt as _},
    path::PathBuf,
    sync::Arc,
};

use culvert::{
    model::PodUid,
    zds::{Acked, AddError, Options, PeerState, Removed, Server, Workload},
};
use culvert_e2e::eventually;
use culvert_lab::{Creds, Lab, Ns, Server as App, Ztunnel, ZtunnelOptions};
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::runtime::Runtime;

/// A lab whose ztunnels are told by the agent's server.
struct Node {
    runtime: Runtime,
    server: Server,
    path: PathBuf,
    lab: Lab,
}

impl Node {
    fn new(name: &str) -> Self {
        let lab = Lab::new(name).unwrap();
        let path = lab.scratch().join("agent/zds.sock");
        let runtime = Runtime::new().unwrap();
        let (server, _events) = {
            let _within = runtime.enter();
            Server::bind(&path, Options::default()).unwrap()
        };
        Self {
            runtime,
            server,
            path,
            lab,
        }
    }

    /// A ztunnel process that has had its snapshot.
    fn ztunnel(&self) -> Ztunnel {
        let ztunnel = Ztunnel::launch_at(&self.lab, &self.path, &ZtunnelOptions::new()).unwrap();
        eventually("ztunnel has its snapshot", || {
            let status = self.server.status();
            let synced = |peer: &culvert::zds::PeerStatus| {
                peer.pid == ztunnel.pid() && peer.state == PeerState::Synced
            };
            Ok(status.peers.iter().any(synced))
        })
        .unwrap();
        ztunnel
    }

    fn add(&self, pod: &Ns) -> Result<Acked, AddError> {
        let netns: OwnedFd = pod.fd().try_clone_to_owned().unwrap();
        let adding = self
            .server
            .add(PodUid::from(pod.name()), workload(pod), Arc::new(netns));
        self.runtime.block_on(adding)
    }

    fn remove(&self, pod: &Ns) -> Removed {
        let uid = PodUid::from(pod.name());
        self.runtime.block_on(self.server.remove(&uid))
    }
}

fn workload(pod: &Ns) -> Workload {
    Workload {
        name: pod.name().into(),
        namespace: "default".into(),
        service_account: pod.name().into(),
    }
}

fn served(ztunnel: &Ztunnel) -> BTreeSet<String> {
    let stats = ztunnel.stats().unwrap();
    let pods = stats["pods"].as_array().unwrap();
    pods.iter()
        .map(|pod| pod["uid"].as_str().unwrap().to_owned())
        .collect()
}

fn names<const N: usize>(names: [&str; N]) -> BTreeSet<String> {
    names.map(str::to_owned).into()
}

#[test]
fn a_ztunnel_serves_what_the_agent_says_through_restarts_of_both_kinds() {
    let mut node = Node::new("zds-serves");
    let [a, b, c] = ["a", "b", "c"].map(|name| node.lab.pod(name).unwrap());
    assert_eq!(node.add(&a).unwrap_err(), AddError::NoZtunnel);
    node.server.expect(PodUid::from("b"), workload(&b)).unwrap();
    node.server.open();
    let first = node.ztunnel();
    assert_eq!(served(&first), names(["a"]));
    let acked = node.add(&b).unwrap();
    assert_eq!(acked.pid, first.pid());
    assert_eq!(served(&first), names(["a", "b"]));

    // A rolling update: the newer serves all and gets what is new; what goes, goes from both.
    let second = node.ztunnel();
    assert_eq!(served(&second), names(["a", "b"]));
    assert_eq!(node.add(&c).unwrap().pid, second.pid());
    assert_eq!(served(&first), names(["a", "b"]));
    assert_eq!(node.remove(&a).acked.len(), 2);
    assert_eq!(served(&first), names(["b"]));
    assert_eq!(served(&second), names(["b", "c"]));

    // The newer is killed: the older takes over what only the newer knew.
    second.kill().unwrap();
    eventually("the older ztunnel takes over", || {
        Ok(served(&first) == names(["b", "c"]))
    })
    .unwrap();
    assert_eq!(node.add(&c).unwrap().pid, first.pid());

    // Another agent, which knows of one pod less: ztunnel connects again and lets go of it.
    node.server = {
        let _within = node.runtime.enter();
        drop(std::mem::replace(
            &mut node.server,
            Server::bind(&node.lab.scratch().join("other.sock"), Options::default())
                .unwrap()
                .0,
        ));
        eventually("the socket is gone", || Ok(!node.path.exists())).unwrap();
        Server::bind(&node.path, Options::default()).unwrap().0
    };
    node.server.expect(PodUid::from("c"), workload(&c)).unwrap();
    node.server.open();
    eventually("ztunnel keeps what it is to keep and no more", || {
        Ok(served(&first) == names(["c"]))
    })
    .unwrap();
    assert_eq!(node.add(&c).unwrap().pid, first.pid());
    assert_eq!(served(&first), names(["c"]));
}

#[test]
fn a_pod_whose_port_is_taken_is_refused_and_served_later() {
    let node = Node::new("zds-refused");
    node.server.open();
    let ztunnel = node.ztunnel();
    let pod = node.lab.pod("a").unwrap();
    let squatter = App::echo(&pod, "[::]:15008".parse().unwrap()).unwrap();
    let refused = node.add(&pod).unwrap_err();
    assert!(
        matches!(&refused, AddError::Nacked(why) if !why.is_empty()),
        "{refused}"
    );
    assert_eq!(node.server.status().peers[0].nacked, 1);
    drop(squatter);
    // Nobody calls again: the server does, and ztunnel.
    eventually("ztunnel serves the pod", || {
        let peer = &node.server.status().peers[0];
        Ok((peer.served, peer.nacked) == (1, 0))
    })
    .unwrap();
    assert_eq!(served(&ztunnel), names(["a"]));
    assert_eq!(node.remove(&pod).acked, [ztunnel.pid()]);
    assert_eq!(served(&ztunnel), names([]));
}

#[test]
fn only_user_0_is_let_in_and_needs_no_capability() {
    let node = Node::new("zds-users");
    node.server.open();
    // The lab's scratch directory is for root alone.
    let address = SockAddr::unix(&node.path).unwrap();
    let connect = |creds| {
        node.lab.node().run_as(creds, || {
            let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None).unwrap();
            socket.connect(&address).map(|()| socket)
        })
    };
    let root = connect(Creds::RootNoCaps).unwrap();
    eventually("it is let in", || Ok(node.server.status().peers.len() == 1)).unwrap();
    drop(root);
    assert!(connect(Creds::Nobody).is_err(), "the file's mode");
    // Even when somebody has opened the file to all.
    for dir in node.path.ancestors().skip(1) {
        if dir.starts_with(node.lab.scratch()) {
            fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
        }
    }
    fs::set_permissions(&node.path, fs::Permissions::from_mode(0o666)).unwrap();
    let nobody = connect(Creds::Nobody).unwrap();
    eventually("it is refused", || Ok(node.server.status().refused == 1)).unwrap();
    drop(nobody);
}
