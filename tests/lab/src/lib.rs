//! The lab on which the privileged tests, the demo and the benchmarks stand: a node and its pods built from network
//! namespaces, a cgroup and a bpffs directory of their own, and the tools to send traffic and to watch it.
//!
//! It builds everything itself over netlink and system calls, and executes no `ip`, `iptables` or `mount`, because it also
//! runs in virtual machines whose image holds nothing but static binaries. It knows the `culvert` binary by its command
//! line alone: it must never link the agent, or tests would check the agent with the agent.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! let lab = culvert_lab::Lab::new("example")?;
//! let pod = lab.pod("client")?;
//! pod.run(|| println!("{:?}", std::net::TcpStream::connect("10.77.0.1:80")));
//! lab.attach(&pod, &[])?;
//! # Ok(()) }
//! ```
//!
//! Environment: `CULVERT_KEEP=1` keeps the namespaces, pins and cgroup of a lab for inspection, `CULVERT_BIN`,
//! `CULVERT_CNI_BIN` and `ZTUNNEL_STANDIN_BIN` name binaries elsewhere than beside the running one.

mod agent;
mod another;
mod bpffs;
mod capture;
mod cgroup;
mod client;
mod creds;
mod culvert;
mod family;
mod hook;
mod lab;
mod links;
mod netlink;
mod ns;
mod packet;
mod packet_socket;
mod paths;
mod pidns;
mod pod;
mod process;
mod routing;
mod server;
mod serving;
pub mod sockopt;
mod stop;
mod sweep;
mod zds;
mod zds_messages;
mod zds_socket;
mod ztunnel;

pub use agent::{Agent, AgentOptions};
pub use another::another_build;
pub use capture::Capture;
pub use client::{Connect, Connecting, connect, roundtrip};
pub use creds::Creds;
pub use culvert::{CulvertOutput, culvert_binary, plugin_binary};
pub use family::Family;
pub use hook::{HookPoint, Hooks};
pub use lab::Lab;
pub use nix::sys::signal::Signal;
pub use ns::Ns;
pub use packet::{Packet, Protocol, TcpFlags};
pub use pidns::PidNs;
pub use pod::PodBuilder;
pub use process::Child;
pub use routing::{Route, Rule, RuleAction};
pub use server::{Server, ServerBuilder};
pub use serving::Connection;
pub use stop::Stop;
pub use zds::Zds;
pub use ztunnel::{Ztunnel, ZtunnelOptions};
