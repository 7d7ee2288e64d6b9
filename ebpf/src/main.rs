//! The kernel programs of Culvert.
//!
//! `culvert_connect` (sock_ops), `culvert_sockopt` (cgroup/setsockopt), `culvert_vouch` (cgroup/sock_create),
//! `culvert_enter` and `culvert_steer` (sk_lookup), `culvert_dns_*` (cgroup socket addresses).
//! This file owns the entry points and the licence; each program has its own file and only reads its
//! context, asks the library's decision functions, and acts. None of them runs for a packet of an
//! established TCP connection.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod connect;
mod kernel;
mod lookup;
mod maps;
mod process;
mod report;
mod sockaddr;
mod sockopt;
mod steer;
mod vouch;

use aya_ebpf::{
    macros::{cgroup_sock, cgroup_sock_addr, cgroup_sockopt, sk_lookup, sock_ops},
    programs::{SkLookupContext, SockAddrContext, SockContext, SockOpsContext, SockoptContext},
};

/// See `connect.rs`.
#[sock_ops]
fn culvert_connect(ctx: SockOpsContext) -> u32 {
    connect::run(ctx.ops);
    // The return value is a verdict only for packet callbacks; 1 leaves other programs' replies alone.
    1
}

/// See `sockopt.rs`.
#[cgroup_sockopt(setsockopt)]
fn culvert_sockopt(ctx: SockoptContext) -> i32 {
    sockopt::run(ctx.sockopt)
}

/// See `vouch.rs`.
#[cgroup_sock(sock_create)]
fn culvert_vouch(ctx: SockContext) -> i32 {
    vouch::run(ctx.sock)
}

/// See `steer.rs`.
#[sk_lookup]
fn culvert_enter(ctx: SkLookupContext) -> u32 {
    steer::enter(&ctx)
}

/// See `steer.rs`.
#[sk_lookup]
fn culvert_steer(ctx: SkLookupContext) -> u32 {
    steer::run(&ctx)
}

/// See `lookup.rs`.
#[cgroup_sock_addr(connect4)]
fn culvert_dns_connect4(ctx: SockAddrContext) -> i32 {
    lookup::connect::<false>(ctx.sock_addr)
}

/// See `lookup.rs`.
#[cgroup_sock_addr(connect6)]
fn culvert_dns_connect6(ctx: SockAddrContext) -> i32 {
    lookup::connect::<true>(ctx.sock_addr)
}

/// See `lookup.rs`.
#[cgroup_sock_addr(sendmsg4)]
fn culvert_dns_sendmsg4(ctx: SockAddrContext) -> i32 {
    lookup::sendmsg::<false>(ctx.sock_addr)
}

/// See `lookup.rs`.
#[cgroup_sock_addr(sendmsg6)]
fn culvert_dns_sendmsg6(ctx: SockAddrContext) -> i32 {
    lookup::sendmsg::<true>(ctx.sock_addr)
}

/// See `lookup.rs`.
#[cgroup_sock_addr(recvmsg4)]
fn culvert_dns_recvmsg4(ctx: SockAddrContext) -> i32 {
    lookup::answered::<false>(ctx.sock_addr)
}

/// See `lookup.rs`.
#[cgroup_sock_addr(recvmsg6)]
fn culvert_dns_recvmsg6(ctx: SockAddrContext) -> i32 {
    lookup::answered::<true>(ctx.sock_addr)
}

/// See `lookup.rs`.
#[cgroup_sock_addr(getpeername4)]
fn culvert_dns_getpeername4(ctx: SockAddrContext) -> i32 {
    lookup::answered::<false>(ctx.sock_addr)
}

/// See `lookup.rs`.
#[cgroup_sock_addr(getpeername6)]
fn culvert_dns_getpeername6(ctx: SockAddrContext) -> i32 {
    lookup::answered::<true>(ctx.sock_addr)
}

/// What the kernel needs to see before it lends GPL-only helpers.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual BSD/GPL\0";

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // Nothing in the programs can panic; the verifier would refuse the loop if something could.
    loop {}
}
