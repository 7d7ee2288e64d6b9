//! What people and machines ask the agent: health, readiness, metrics, log level, status.
//!
//! Shows what others know; changes nothing but the log level.

mod book;
mod connections;
pub mod installation;
pub mod labels;
mod listen;
pub mod logging;
pub mod metrics;
pub mod readiness;
mod routes;
mod sampled;
pub mod server;
pub mod shutdown;
mod sources;
pub mod status;
mod timing;
pub mod verdicts;

pub use installation::Installation;
pub use logging::LogControl;
pub use metrics::Metrics;
pub use readiness::{Liveness, Readiness, Task};
pub use server::{Admin, AdminError};
pub use shutdown::Shutdown;
pub use status::StatusReport;
pub use timing::timed;
