//! Culvert beside the real Cilium, at its fast settings: no kube-proxy, routing and masquerading in BPF, socket load
//! balancing for the host alone. The tests of the mesh, on such a cluster, and those that only concern Cilium.
#![expect(
    clippy::unwrap_used,
    reason = "test code: a step that fails is a test that fails"
)]

mod beside;

#[path = "../mesh/bed.rs"]
mod bed;
#[path = "../mesh/capture.rs"]
mod capture;
#[path = "../mesh/elsewhere.rs"]
mod elsewhere;
#[path = "../mesh/enrolment.rs"]
mod enrolment;
#[path = "../mesh/probes.rs"]
mod probes;
#[path = "../mesh/starts.rs"]
mod starts;
#[path = "../mesh/traffic.rs"]
mod traffic;
#[path = "../mesh/turns.rs"]
mod turns;

use culvert_cluster::{Cni, Options};

/// The cluster that these tests share.
fn options() -> Options {
    Options {
        name: "cilium".to_owned(),
        cni: Cni::Cilium,
        ..Options::default()
    }
}
