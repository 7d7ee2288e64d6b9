//! Culvert on a real Kubernetes: real kubelets, a real container runtime, a real CNI chain, two nodes. One cluster for all
//! of it; what breaks nodes or the agent has clusters of its own, in `agent`.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "test code: a step that fails is a test that fails"
)]

mod bed;
mod capture;
mod elsewhere;
mod enrolment;
mod privileges;
mod probes;
mod starts;
mod traffic;
mod turns;
mod variant;

use culvert_cluster::{Cni, Options};

/// The cluster that these tests share.
fn options() -> Options {
    Options {
        name: "mesh".to_owned(),
        cni: Cni::Bridge,
        ..Options::default()
    }
}
