//! What people and machines ask the agent: health, readiness, metrics, log level.
//!
//! Shows what others know; changes nothing but the log level.
