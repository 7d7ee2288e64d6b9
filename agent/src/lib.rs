//! Culvert's node agent as a library: the kernel door, the plans, and the commands on top.
//!
//! Arrows run one way: commands use [`kernel`] and [`plan`]; `plan` knows neither kernel nor clock, and
//! `kernel` knows no Kubernetes.

pub mod kernel;
pub mod plan;
