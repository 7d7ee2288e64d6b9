//! The few things the programs ask of the kernel, each wrapped once.
//!
//! Context fields are read by one load instruction each, written out: LLVM otherwise merges two reads into
//! one through a pointer it computed, and the verifier refuses a modified context pointer.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::{bpf_sock, bpf_sock_ops},
    helpers::{bpf_get_netns_cookie, bpf_setsockopt, bpf_sk_storage_get},
};
use culvert_ebpf::{
    abi::{CidrKey, Pod, PodAddr, PortKey, mark, pod_flags},
    addr::Addr,
};

use crate::maps::{self, StorageDef};

pub const AF_INET: u32 = 2;
pub const IPPROTO_TCP: u32 = 6;
pub const SOL_SOCKET: i32 = 1;
pub const SO_MARK: i32 = 36;
pub const SO_BINDTODEVICE: i32 = 25;
pub const SO_BINDTOIFINDEX: i32 = 62;
pub const TCP_CLOSE: u32 = 7;
pub const TCP_LISTEN: u32 = 10;

/// Reads a 32-bit field of a context: type, pointer, field, and the byte within it.
macro_rules! field {
    ($ty:ty, $ptr:expr, $field:ident) => {
        $crate::kernel::field!($ty, $ptr, $field, 0)
    };
    ($ty:ty, $ptr:expr, $field:ident, $byte:expr) => {{
        let ptr: *mut $ty = $ptr;
        let value: u32;
        // SAFETY: one load, which the verifier checks; the field exists in the type.
        unsafe {
            core::arch::asm!(
                "{value} = *(u32 *)({ptr} + {offset})",
                value = out(reg) value,
                ptr = in(reg) ptr,
                offset = const core::mem::offset_of!($ty, $field) + $byte,
                options(pure, readonly, nostack, preserves_flags),
            );
        }
        value
    }};
}
pub(crate) use field;

/// Writes a 32-bit field of a context: type, pointer, field, the byte within it, value.
macro_rules! set_field {
    ($ty:ty, $ptr:expr, $field:ident, $byte:expr, $value:expr) => {{
        let ptr: *mut $ty = $ptr;
        let value: u32 = $value;
        // SAFETY: one store, which the verifier checks; the field exists in the type.
        unsafe {
            core::arch::asm!(
                "*(u32 *)({ptr} + {offset}) = {value}",
                value = in(reg) value,
                ptr = in(reg) ptr,
                offset = const core::mem::offset_of!($ty, $field) + $byte,
                options(nostack, preserves_flags),
            );
        }
    }};
}
pub(crate) use set_field;

/// Address from the fields of a context, by family.
macro_rules! address {
    ($ty:ty, $ptr:expr, $v4:ident, $v6:ident) => {
        if $crate::kernel::field!($ty, $ptr, family) == $crate::kernel::AF_INET {
            culvert_ebpf::addr::Addr::v4($crate::kernel::field!($ty, $ptr, $v4))
        } else {
            culvert_ebpf::addr::Addr::v6([
                $crate::kernel::field!($ty, $ptr, $v6, 0),
                $crate::kernel::field!($ty, $ptr, $v6, 4),
                $crate::kernel::field!($ty, $ptr, $v6, 8),
                $crate::kernel::field!($ty, $ptr, $v6, 12),
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
    u32::from_be(field!(bpf_sock_ops, ops, remote_port)) as u16
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
        bpf_setsockopt(
            ops.cast::<c_void>(),
            SOL_SOCKET,
            option,
            (&raw mut value).cast(),
            4,
        );
    }
}

/// Is (or becomes, with `create`) this socket one that carries this flag?
#[inline(always)]
pub fn flagged(map: &'static StorageDef, sk: *mut bpf_sock, create: bool) -> bool {
    // SAFETY: `sk` comes from the context and was checked for null; the map is socket storage.
    let found = unsafe {
        bpf_sk_storage_get(
            (&raw const *map).cast_mut().cast(),
            sk.cast(),
            core::ptr::null_mut(),
            u64::from(create),
        )
    };
    !found.is_null()
}

/// Is (or becomes, with `create`) this socket one that ztunnel's own process marked?
#[inline(always)]
pub fn ztunnel_storage(sk: *mut bpf_sock, create: bool) -> bool {
    flagged(&maps::ZTUNNEL_SOCKETS, sk, create)
}

/// Is it one of the pod's own addresses?
#[inline(always)]
pub fn is_own(cookie: u64, addr: Addr) -> bool {
    // SAFETY: the value is never read, only its presence.
    unsafe { maps::POD_ADDRS.get(PodAddr { cookie, addr }) }.is_some()
}

/// Is a lookup that asks this resolver to be captured?
#[inline(always)]
pub fn captures_dns(cookie: u64, pod: &Pod, resolver: Addr) -> bool {
    if pod.flags & pod_flags::DNS == 0 {
        return false;
    }
    let addr = resolver;
    pod.flags & pod_flags::DNS_LISTED == 0
        // SAFETY: the value is never read, only its presence.
        || unsafe { maps::RESOLVERS.get(PodAddr { cookie, addr }) }.is_some()
}

/// Is the port in `EXCLUDED_PORTS`?
#[inline(always)]
pub fn port_excluded(cookie: u64, port: u16, inbound: u8) -> bool {
    let key = PortKey {
        cookie,
        port,
        inbound,
        pad: [0; 5],
    };
    // SAFETY: the value is never read, only its presence.
    unsafe { maps::EXCLUDED_PORTS.get(key) }.is_some()
}

/// Is the address in one of the pod's excluded networks?
#[inline(always)]
pub fn cidr_excluded(cookie: u64, addr: Addr) -> bool {
    const WHOLE: u32 = 64 + 128;
    maps::EXCLUDED_CIDRS
        .get(aya_ebpf::maps::lpm_trie::Key::new(
            WHOLE,
            CidrKey { cookie, addr },
        ))
        .is_some()
}
