//! The few things the programs ask of the kernel, each wrapped once.
//!
//! Context fields are read one word at a time, volatile and at constant offsets: LLVM otherwise merges the
//! reads into a modified context pointer, which the verifier refuses.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::{bpf_sock, bpf_sock_ops},
    helpers::{bpf_get_netns_cookie, bpf_setsockopt, bpf_sk_storage_get},
};
use culvert_ebpf::{
    abi::{CidrKey, PodAddr, PortKey, mark},
    addr::Addr,
};

use crate::maps;

pub const AF_INET: u32 = 2;
pub const SOL_SOCKET: i32 = 1;
pub const SO_MARK: i32 = 36;
pub const SO_BINDTODEVICE: i32 = 25;
pub const SO_BINDTOIFINDEX: i32 = 62;
pub const TCP_CLOSE: u32 = 7;
pub const TCP_LISTEN: u32 = 10;

/// Reads one field of a context.
macro_rules! field {
    ($ptr:expr, $($path:tt)+) => {
        // SAFETY: the verifier checks every access to a context; the field exists in its type.
        unsafe { core::ptr::read_volatile(&raw const (*$ptr).$($path)+) }
    };
}
pub(crate) use field;

/// Address from four word fields of a context, by family.
macro_rules! address {
    ($ptr:expr, $v4:ident, $v6:ident) => {
        if $crate::kernel::field!($ptr, family) == $crate::kernel::AF_INET {
            culvert_ebpf::addr::Addr::v4($crate::kernel::field!($ptr, $v4))
        } else {
            culvert_ebpf::addr::Addr::v6([
                $crate::kernel::field!($ptr, $v6[0]),
                $crate::kernel::field!($ptr, $v6[1]),
                $crate::kernel::field!($ptr, $v6[2]),
                $crate::kernel::field!($ptr, $v6[3]),
            ])
        }
    };
}
pub(crate) use address;

/// The socket of a sock_ops callback, when it is a full one.
#[inline(always)]
pub fn socket(ops: *mut bpf_sock_ops) -> Option<*mut bpf_sock> {
    // SAFETY: as for `field!`; the union's only member read here is the socket pointer.
    let sk = unsafe { (*ops).__bindgen_anon_2.sk };
    if sk.is_null() { None } else { Some(sk) }
}

/// Cookie of the network namespace the context's socket lives in.
#[inline(always)]
pub fn netns_cookie<T>(ctx: *mut T) -> u64 {
    // SAFETY: called with a program's own context only.
    unsafe { bpf_get_netns_cookie(ctx.cast()) }
}

/// Host byte order from the `remote_port` of sock_ops, which is network order in the upper half.
#[inline(always)]
pub fn remote_port(ops: *mut bpf_sock_ops) -> u16 {
    u32::from_be(field!(ops, remote_port)) as u16
}

/// Replaces our bits of the socket's mark, keeps the others.
#[inline(always)]
pub fn set_mark(ops: *mut bpf_sock_ops, current: u32, ours: u32) {
    let wanted = (current & !mark::MASK) | ours;
    if wanted != current {
        set_option(ops, SO_MARK, wanted);
    }
}

/// Binds the socket to a device. Fails, harmlessly, on one that is bound already.
#[inline(always)]
pub fn bind_to(ops: *mut bpf_sock_ops, ifindex: u32) {
    set_option(ops, SO_BINDTOIFINDEX, ifindex);
}

#[inline(always)]
pub fn set_option(ops: *mut bpf_sock_ops, option: i32, mut value: u32) {
    // SAFETY: context pointer as given; the value lives on our stack for the length of the call.
    unsafe {
        bpf_setsockopt(ops.cast::<c_void>(), SOL_SOCKET, option, (&raw mut value).cast(), 4);
    }
}

/// Is (or becomes, with `create`) this socket one that ztunnel's own process marked?
#[inline(always)]
pub fn ztunnel_storage(sk: *mut bpf_sock, create: bool) -> bool {
    let map = (&raw const maps::ZTUNNEL_SOCKETS).cast_mut();
    // SAFETY: `sk` comes from the context and was checked for null; the map is socket storage.
    let found = unsafe { bpf_sk_storage_get(map.cast(), sk.cast(), core::ptr::null_mut(), u64::from(create)) };
    !found.is_null()
}

/// Is it one of the pod's own addresses?
#[inline(always)]
pub fn is_own(cookie: u64, addr: Addr) -> bool {
    // SAFETY: the value is never read, only its presence.
    unsafe { maps::POD_ADDRS.get(PodAddr { cookie, addr }) }.is_some()
}

/// Is the port in `EXCLUDED_PORTS`?
#[inline(always)]
pub fn port_excluded(cookie: u64, port: u16, inbound: u8) -> bool {
    let key = PortKey { cookie, port, inbound, pad: [0; 5] };
    // SAFETY: the value is never read, only its presence.
    unsafe { maps::EXCLUDED_PORTS.get(key) }.is_some()
}

/// Is the address in one of the pod's excluded networks?
#[inline(always)]
pub fn cidr_excluded(cookie: u64, addr: Addr) -> bool {
    const WHOLE: u32 = 64 + 128;
    maps::EXCLUDED_CIDRS.get(aya_ebpf::maps::lpm_trie::Key::new(WHOLE, CidrKey { cookie, addr })).is_some()
}
