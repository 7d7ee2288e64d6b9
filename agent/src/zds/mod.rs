//! The conversation with ztunnel: which pods' namespaces it is to serve, over a SOCK_SEQPACKET socket.
//!
//! Knows neither Kubernetes nor the kernel's maps. `messages` is the wire format, `conversation` what may be said when,
//! `registry` who is told, `socket` how packets travel, `server` the tasks that join them.

mod conversation;
#[doc(hidden)]
pub mod fuzz;
pub mod messages;
mod registry;
mod server;
mod socket;

pub use conversation::{PeerState, Reason, Workload};
pub use registry::{AddError, Removed};
pub use server::{Acked, Event, Options, PeerStatus, Server, Status};
pub use socket::Error;
