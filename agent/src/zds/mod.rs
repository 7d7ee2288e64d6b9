//! The conversation with ztunnel: which pods' namespaces it is to serve, over a SOCK_SEQPACKET socket.
//!
//! Knows neither Kubernetes nor the kernel's maps. `messages` is the wire format, `terms` the words for what is said, `conversation`
//! what may be said when, `registry` who is told, `socket` how packets travel, `server` the tasks that join them, `report` what they
//! are told and tell.

mod conversation;
#[doc(hidden)]
pub mod fuzz;
pub mod messages;
mod registry;
mod report;
mod server;
mod socket;
mod terms;

pub use registry::{AddError, Removed};
pub use report::{Acked, Event, Options, PeerStatus, Status};
pub use server::Server;
pub use socket::Error;
pub use terms::{PeerState, Reason, Workload};
