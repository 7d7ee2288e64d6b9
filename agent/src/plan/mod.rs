//! Deciding what to do, apart from doing it: pure functions from desired and observed state to operations.
//!
//! Knows no system call, no clock and no file; [`crate::kernel`] carries the operations out.

pub mod annotations;
pub mod cilium;
pub mod condition;
pub mod membership;
pub mod netns;
pub mod network_policy;
pub mod pod;
pub mod selector;
pub mod settings;
