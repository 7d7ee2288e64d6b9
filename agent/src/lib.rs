//! Culvert's node agent as a library: the kernel door, the plans, and the daemon on top.
//!
//! Arrows run one way: `main` uses [`reconcile`], which alone uses [`watch`], [`plan`] and [`kernel`]; `plan` knows
//! neither kernel nor clock, `watch` knows no kernel, and `kernel` knows no Kubernetes.

pub mod admin;
pub mod cni_server;
pub mod config;
pub mod daemon;
pub mod install;
pub mod kernel;
pub mod model;
pub mod plan;
pub mod reconcile;
pub mod traces;
pub mod watch;
pub mod zds;
