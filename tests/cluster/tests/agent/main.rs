//! What may happen to the agent and to a node, on a real cluster: traffic of enrolled pods goes on, nothing is sent in the
//! clear, and afterwards all is as it should be. One test at a time: each disturbs the whole cluster.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "test code: a step that fails is a test that fails"
)]

#[path = "../mesh/bed.rs"]
mod bed;
#[path = "../mesh/capture.rs"]
mod capture;
mod chain;
mod disturbed;
mod guards;
mod installation;
mod refused;
mod removed;
mod traffic;
#[path = "../mesh/turns.rs"]
mod turns;
mod upgraded;
#[path = "../mesh/variant.rs"]
mod variant;

use std::sync::{Mutex, MutexGuard, PoisonError};

use culvert_cluster::{Cni, Options};

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Holds off the other tests.
fn alone() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The cluster that these tests take turns on: with a container runtime that speaks CNI 1.1, unlike that of the others.
fn options() -> Options {
    Options {
        name: "agent".to_owned(),
        cni: Cni::Newest,
        ..Options::default()
    }
}
