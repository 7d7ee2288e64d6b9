//! HBONE: TCP connections carried in HTTP/2 CONNECT over mutual TLS.
//!
//! `client` opens tunnels and pools connections, `server` ends them and delivers to the app, `tunnel` moves the bytes.

pub mod client;
pub mod server;
pub mod tunnel;

/// ztunnel's defaults: one stream may use a whole fast link.
const STREAM_WINDOW: u32 = 4 * 1024 * 1024;
const CONNECTION_WINDOW: u32 = 16 * 1024 * 1024;
const FRAME_SIZE: u32 = 1024 * 1024;
/// More than one pod ever has to another; the flow-control windows are what limits.
const STREAMS: u32 = 100_000;
