//! The one door to the kernel: bpf(2), setns(2), rtnetlink, `/proc/sys`, bpffs.
//!
//! Nothing outside this module enters a namespace, touches a map or writes a sysctl; nothing inside it
//! knows Kubernetes. Every operation is idempotent and says in its error what cures it.

pub mod cgroup;
pub mod discover;
pub mod dns;
pub mod earlier;
pub mod ears;
pub mod error;
pub mod events;
pub mod inspect;
pub mod kubelet;
pub mod limits;
pub mod listeners;
pub mod maps;
pub mod memory;
mod netconf;
mod netlink;
pub mod netns;
pub mod node;
pub mod object;
pub mod open_files;
mod own_proc;
pub mod pins;
pub mod pod;
pub mod preflight;
pub mod privileges;
mod process;
pub mod procfs;
pub mod resolv_conf;
pub mod sockdiag;
mod strays;
mod sys;
mod sysctl;
pub mod track;
pub mod verify;

pub use error::{Cause, Error, Result};
pub use netns::{Netns, NetnsCookie};
pub use node::{LoadOptions, LoadReport, Node};
