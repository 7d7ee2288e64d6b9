//! `culvert_vouch`: which of the node's sockets may vouch for their connections, noted when they are made.
//!
//! `connect()` is asked about in sock_ops, where older kernels cannot tell the process; `socket()` is asked about here,
//! in the process that calls it. The note stays with the socket, whoever it is handed to.

use aya_ebpf::bindings::bpf_sock;
use culvert_ebpf::abi::PROBES_KUBELET;

use crate::{
    kernel::{IPPROTO_TCP, field, flagged, netns_cookie},
    maps,
    process::is_named,
};

/// Nothing is ever refused here.
const ALLOW: i32 = 1;

#[inline(always)]
pub fn run(sk: *mut bpf_sock) -> i32 {
    if field!(bpf_sock, sk, protocol) != IPPROTO_TCP {
        return ALLOW;
    }
    let Some(config) = maps::CONFIG.get(0) else {
        return ALLOW;
    };
    if config.probe_source == PROBES_KUBELET
        && config.node_cookie == netns_cookie(sk)
        && is_named(&maps::VOUCHERS)
    {
        flagged(&maps::VOUCHER_SOCKETS, sk, true);
    }
    ALLOW
}
