//! A real Kubernetes on this machine, for tests first and for `cargo xtask cluster` second: etcd, API server and all,
//! built from released Go modules, without Docker and without a registry. It starts them, hands out credentials and
//! removes every trace; it must not know what the tests install there.
//!
//! [`ControlPlane`] is etcd and an API server alone, for what only talks to the API:
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! let api = culvert_cluster::ControlPlane::start("example")?;
//! api.apply("apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: agent, namespace: kube-system}\n")?;
//! let kubeconfig = api.kubeconfig_for("kube-system", "agent")?;
//! println!("{}", api.kubectl(&["get", "namespaces"])?);
//! # drop(kubeconfig);
//! # Ok(()) }
//! ```
//!
//! Environment: `CULVERT_CLUSTER_DIR` says where binaries, images and running clusters lie, by default `target/cluster`;
//! `CULVERT_KEEP=1` keeps the files of what has ended.

mod api;
mod cgroups;
mod cluster;
mod control_plane;
mod controllers;
mod image;
mod kubeconfig;
mod kubectl;
mod node;
mod parts;
mod pki;
mod place;
mod plan;
mod server;
mod services;
mod state;
mod sweep;
mod tool;

pub use api::Api;
pub use cluster::{Cluster, Cni, Options};
pub use control_plane::ControlPlane;
pub use image::{BUSYBOX, Image};
pub use kubectl::Kubectl;
pub use node::Node;
pub use parts::{Part, Parts};
pub use services::Service;
