//! A stand-in for ztunnel: the same sockets, marks and protocols towards the node and its pods, and no control plane behind it.
//!
//! It owns what ztunnel does inside a pod (listeners 15001, 15006, 15008 and 15053, delivery, HBONE between two of its kind) and
//! ztunnel's half of ZDS. It must not know how traffic reaches its listeners: whatever steers (Culvert, iptables, nothing at all),
//! it reads the original destination from the socket and acts on that.

pub mod config;
pub mod copy;
pub mod counters;
pub mod dns;
pub mod hbone;
pub mod identity;
pub mod inbound;
pub mod listeners;
pub mod manager;
pub mod messages;
pub mod netns;
pub mod outbound;
pub mod pod;
pub mod sockets;
pub mod stats;
pub mod tls;
pub mod workloads;
pub mod zds;

/// The mark on every socket of ztunnel's (1337).
pub const MARK: u32 = 0x539;
/// What leaves a pod arrives here.
pub const OUTBOUND_PORT: u16 = 15001;
/// Plaintext that enters a pod arrives here.
pub const INBOUND_PLAINTEXT_PORT: u16 = 15006;
/// HBONE from other proxies arrives here.
pub const INBOUND_HBONE_PORT: u16 = 15008;
/// DNS queries of a pod's processes arrive here, on loopback only.
pub const DNS_PORT: u16 = 15053;

/// Ports that are never a valid original destination: forwarding to them would turn in a circle.
pub const ILLEGAL_PORTS: [u16; 3] = [OUTBOUND_PORT, INBOUND_PLAINTEXT_PORT, INBOUND_HBONE_PORT];
