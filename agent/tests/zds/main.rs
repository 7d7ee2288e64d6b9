//! The ZDS server against a scripted ztunnel on the real socket, row by row of the protocol.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: a step that fails is a test that fails"
)]

mod broken;
mod changes;
mod peer;
mod several;
mod snapshot;
mod socket;
