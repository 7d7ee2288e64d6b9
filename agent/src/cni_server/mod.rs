//! What the plugin asks the agent: HTTP/1.1 and JSON over a unix socket.
//!
//! Parses, checks, hands on; decides nothing.
