//! The context of cgroup socket address hooks: who is asked, from where, by which socket.
//!
//! Reads and writes single fields, as the verifier wants it; decides nothing.

use aya_ebpf::bindings::{bpf_sock, bpf_sock_addr};
use culvert_ebpf::addr::Addr;

use crate::kernel::{field, set_field};

/// The peer's address as the hook sees it. Hooks of each family may read their own fields only.
#[inline(always)]
pub fn peer<const V6: bool>(ctx: *mut bpf_sock_addr) -> Addr {
    if V6 {
        Addr::v6([
            field!(bpf_sock_addr, ctx, user_ip6, 0),
            field!(bpf_sock_addr, ctx, user_ip6, 4),
            field!(bpf_sock_addr, ctx, user_ip6, 8),
            field!(bpf_sock_addr, ctx, user_ip6, 12),
        ])
    } else {
        Addr::v4(field!(bpf_sock_addr, ctx, user_ip4))
    }
}

#[inline(always)]
pub fn peer_port(ctx: *mut bpf_sock_addr) -> u16 {
    u16::from_be(field!(bpf_sock_addr, ctx, user_port) as u16)
}

#[inline(always)]
pub fn set_peer<const V6: bool>(ctx: *mut bpf_sock_addr, addr: &Addr, port: u16) {
    if V6 {
        set_field!(bpf_sock_addr, ctx, user_ip6, 0, addr.words[0]);
        set_field!(bpf_sock_addr, ctx, user_ip6, 4, addr.words[1]);
        set_field!(bpf_sock_addr, ctx, user_ip6, 8, addr.words[2]);
        set_field!(bpf_sock_addr, ctx, user_ip6, 12, addr.words[3]);
    } else {
        set_field!(bpf_sock_addr, ctx, user_ip4, 0, addr.words[3]);
    }
    set_field!(bpf_sock_addr, ctx, user_port, 0, u32::from(port.to_be()));
}

/// The source that a datagram has so far; unspecified where the routes are to choose. Only in `sendmsg` hooks.
#[inline(always)]
pub fn source<const V6: bool>(ctx: *mut bpf_sock_addr) -> Addr {
    if V6 {
        return Addr::v6([
            field!(bpf_sock_addr, ctx, msg_src_ip6, 0),
            field!(bpf_sock_addr, ctx, msg_src_ip6, 4),
            field!(bpf_sock_addr, ctx, msg_src_ip6, 8),
            field!(bpf_sock_addr, ctx, msg_src_ip6, 12),
        ]);
    }
    match field!(bpf_sock_addr, ctx, msg_src_ip4) {
        0 => Addr::UNSPECIFIED,
        word => Addr::v4(word),
    }
}

/// Gives a datagram its source. Only in `sendmsg` hooks.
#[inline(always)]
pub fn set_source<const V6: bool>(ctx: *mut bpf_sock_addr, addr: &Addr) {
    if V6 {
        set_field!(bpf_sock_addr, ctx, msg_src_ip6, 0, addr.words[0]);
        set_field!(bpf_sock_addr, ctx, msg_src_ip6, 4, addr.words[1]);
        set_field!(bpf_sock_addr, ctx, msg_src_ip6, 8, addr.words[2]);
        set_field!(bpf_sock_addr, ctx, msg_src_ip6, 12, addr.words[3]);
    } else {
        set_field!(bpf_sock_addr, ctx, msg_src_ip4, 0, addr.words[3]);
    }
}

/// The socket; never null in these hooks.
#[inline(always)]
pub fn socket(ctx: *mut bpf_sock_addr) -> *mut bpf_sock {
    // SAFETY: one load of a context field, which the verifier checks.
    unsafe { (*ctx).__bindgen_anon_1.sk }
}

/// The socket's own port.
#[inline(always)]
pub fn own_port(sk: *mut bpf_sock) -> u16 {
    field!(bpf_sock, sk, src_port) as u16
}

/// The address the socket is bound to.
#[inline(always)]
pub fn bound_to(sk: *mut bpf_sock, v4: bool) -> Addr {
    if v4 {
        let word = field!(bpf_sock, sk, src_ip4);
        if word == 0 {
            Addr::UNSPECIFIED
        } else {
            Addr::v4(word)
        }
    } else {
        Addr::v6([
            field!(bpf_sock, sk, src_ip6, 0),
            field!(bpf_sock, sk, src_ip6, 4),
            field!(bpf_sock, sk, src_ip6, 8),
            field!(bpf_sock, sk, src_ip6, 12),
        ])
    }
}
