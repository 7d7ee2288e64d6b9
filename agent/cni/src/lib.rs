//! The plugin as a library: what it and the agent say to each other ([`api`], [`decisions`]), and each step of a call.
//!
//! The agent builds on the same types, so the two cannot drift. No async runtime and no kernel access but files and one
//! unix socket: the plugin lives for a millisecond and asks the agent for everything else.

#![forbid(unsafe_code)]

pub mod api;
pub mod ask;
pub mod atomic;
pub mod call;
pub mod client;
pub mod config;
pub mod decisions;
pub mod environment;
pub mod log;
