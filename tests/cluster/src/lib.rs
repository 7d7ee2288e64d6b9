//! A real Kubernetes on this machine, for tests first and for `cargo xtask cluster` second: etcd, API server and all,
//! built from released Go modules, without Docker and without a registry. It starts them, hands out credentials and
//! removes every trace. Of what the tests install there it knows [`Mesh`] alone: Culvert and a stand-in ztunnel.
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
//! [`Cluster`] is the whole, with nodes that run pods; [`Cluster::shared`] is one for all tests of a process, each of which
//! takes a [`Namespace`] there. A test that breaks nodes has one of its own ([`Cluster::up`]).
//!
//! Environment: `CULVERT_CLUSTER` names the running cluster that tests are to share; `CULVERT_CLUSTER_DIR` says where binaries, images and running clusters lie, by default `target/cluster`
//! (what failed tests leave is always in `target/cluster/failed`); `CULVERT_KEEP=1` keeps the files of what has ended.

mod apart;
mod api;
mod build;
mod built;
mod cgroups;
mod cilium;
mod cluster;
mod control_plane;
mod controllers;
pub mod coredns;
mod evidence;
mod image;
mod kubeconfig;
mod kubectl;
mod mesh;
mod namespace;
mod node;
mod nodes;
mod parts;
mod pki;
mod place;
mod plan;
mod server;
mod services;
mod shared;
mod state;
mod sweep;
mod tool;
mod workload;

pub use apart::Apart;
pub use api::Api;
pub use built::culvert_image;
pub use cluster::{Cluster, Cni, Options};
pub use control_plane::ControlPlane;
pub use image::{BUSYBOX, Image};
pub use kubectl::{IN_TIME, Kubectl};
pub use mesh::{AGENT, Mesh, PROXY, STRICT};
pub use namespace::Namespace;
pub use node::Node;
pub use parts::{Part, Parts};
pub use services::Service;
pub use workload::{POD, pod};
