//! `culvert_sockopt`: what processes of an enrolled pod may not do to a TCP socket, and which sockets, of UDP too, are
//! ztunnel's.
//!
//! A mark decides which way a socket's next packet goes, also on an established connection, and
//! CAP_NET_RAW, which containers have by default, is enough to set one. So ztunnel's mark is for ztunnel's
//! process, ours are for nobody, and a socket that carries one of ours keeps it. Binding to a device does
//! nothing: a bound listener would never see a delivery, which comes by `lo`. What ztunnel's process marks is noted with
//! the socket: TCP's for its connections and listeners, UDP's for its lookups and its answers to others'.

use aya_ebpf::bindings::{bpf_sock, bpf_sockopt};
use culvert_ebpf::{
    abi::{LOOPBACK_IFINDEX, Pod, mark, pod_flags},
    decide::Verdict,
};

use crate::{
    kernel::{
        IPPROTO_TCP, SO_BINDTODEVICE, SO_BINDTOIFINDEX, SO_MARK, SOL_SOCKET, TCP_LISTEN, field,
        netns_cookie, ztunnel_storage,
    },
    maps,
    process::is_named,
    report::count,
};

const IPPROTO_UDP: u32 = 17;
const IPPROTO_MPTCP: u32 = 262;
const ALLOW: i32 = 1;
const REFUSE: i32 = 0;

/// Lets the call succeed without doing anything.
#[inline(always)]
fn swallow(ctx: *mut bpf_sockopt, cookie: u64) -> i32 {
    count(cookie, Verdict::OptionDenied);
    // SAFETY: the verifier allows writing this field.
    unsafe { (*ctx).optlen = -1 };
    ALLOW
}

#[inline(always)]
pub fn run(ctx: *mut bpf_sockopt) -> i32 {
    if field!(bpf_sockopt, ctx, level) as i32 != SOL_SOCKET {
        return ALLOW;
    }
    let option = field!(bpf_sockopt, ctx, optname) as i32;
    if option != SO_MARK && option != SO_BINDTODEVICE && option != SO_BINDTOIFINDEX {
        return ALLOW;
    }
    // SAFETY: never null in this hook.
    let sk = unsafe { (*ctx).__bindgen_anon_1.sk };
    let protocol = field!(bpf_sock, sk, protocol);
    let stream = protocol == IPPROTO_TCP || protocol == IPPROTO_MPTCP;
    // Of datagram sockets nothing is refused: it only matters which are ztunnel's, because those ask resolvers
    // themselves.
    if !stream && (protocol != IPPROTO_UDP || option != SO_MARK) {
        return ALLOW;
    }
    let cookie = netns_cookie(ctx);
    // SAFETY: entries are replaced whole; each field stands alone.
    let Some(pod) = (unsafe { maps::PODS.get(cookie) }) else {
        return ALLOW;
    };
    if is_ztunnel_process(pod) {
        if option == SO_MARK && value(ctx).is_some_and(|v| v & mark::MASK == mark::ZTUNNEL) {
            ztunnel_storage(sk, true);
        }
        return ALLOW;
    }
    if !stream {
        return ALLOW;
    }
    if option == SO_MARK {
        marking(ctx, sk, protocol, cookie, pod)
    } else {
        binding(ctx, option, cookie)
    }
}

/// Is the calling process one that user space named as ztunnel?
#[inline(always)]
fn is_ztunnel_process(pod: &Pod) -> bool {
    pod.flags & pod_flags::NAMED_ZTUNNEL != 0 && is_named(&maps::ZTUNNELS)
}

/// The option's value, when it is at least four bytes long.
#[inline(always)]
fn value(ctx: *mut bpf_sockopt) -> Option<u32> {
    // SAFETY: pointers and their end come from the context and are compared before the read.
    unsafe {
        let start = (*ctx).__bindgen_anon_2.optval.cast::<u32>();
        let end = (*ctx).__bindgen_anon_3.optval_end.cast::<u32>();
        if start.add(1) > end {
            None
        } else {
            Some(*start)
        }
    }
}

#[inline(always)]
fn marking(ctx: *mut bpf_sockopt, sk: *mut bpf_sock, protocol: u32, cookie: u64, pod: &Pod) -> i32 {
    let Some(asked) = value(ctx) else {
        return ALLOW;
    };
    let low = asked & mark::MASK;
    if low == mark::ZTUNNEL && pod.flags & pod_flags::NAMED_ZTUNNEL == 0 {
        return ALLOW;
    }
    if low == mark::ZTUNNEL || low & mark::OURS_MASK == mark::FAMILY {
        count(cookie, Verdict::Impostor);
        return REFUSE;
    }
    // An MPTCP socket hands its mark to every subflow, over the one each got at connect().
    if protocol == IPPROTO_MPTCP || field!(bpf_sock, sk, state) == TCP_LISTEN {
        return swallow(ctx, cookie);
    }
    let ours = field!(bpf_sock, sk, mark) & mark::MASK;
    if ours & mark::OURS_MASK != mark::FAMILY {
        return ALLOW;
    }
    // SAFETY: as in `value`, whose check is repeated because the verifier forgets it across the call.
    unsafe {
        let start = (*ctx).__bindgen_anon_2.optval.cast::<u32>();
        let end = (*ctx).__bindgen_anon_3.optval_end.cast::<u32>();
        if start.add(1) > end {
            return REFUSE;
        }
        *start = (asked & !mark::MASK) | ours;
    }
    count(cookie, Verdict::OptionDenied);
    ALLOW
}

#[inline(always)]
fn binding(ctx: *mut bpf_sockopt, option: i32, cookie: u64) -> i32 {
    if option == SO_BINDTOIFINDEX {
        return match value(ctx) {
            // To `lo`, or to nothing again: neither leads out.
            Some(0 | LOOPBACK_IFINDEX) | None => ALLOW,
            Some(_) => swallow(ctx, cookie),
        };
    }
    // SAFETY: as in `value`.
    let first = unsafe {
        let start = (*ctx).__bindgen_anon_2.optval.cast::<u8>();
        let end = (*ctx).__bindgen_anon_3.optval_end.cast::<u8>();
        if start.add(1) > end { 0 } else { *start }
    };
    if first == 0 {
        ALLOW
    } else {
        swallow(ctx, cookie)
    }
}
