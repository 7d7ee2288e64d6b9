//! The ABI between Culvert's kernel programs and its user space, and the decisions both understand.
//!
//! Owns: plain types that live in maps ([`abi`]), addresses ([`addr`]), the two pure decision functions on connections
//! ([`decide`]) and the one on lookups ([`dns`]). Everything here compiles for the host as well as for the BPF target, depends on nothing
//! and touches no kernel: the programs in `main.rs` only read their context, call in here, and return.
#![no_std]

pub mod abi;
pub mod addr;
pub mod decide;
pub mod dns;
