//! `culvert_connect`: one sock_ops program for the node.
//!
//! At `TCP_CONNECT_CB` it marks sockets of enrolled pods and vouches for node probes; at `TCP_LISTEN_CB`
//! it registers ztunnel's listeners, and notes when they close; at `PASSIVE_ESTABLISHED_CB` it keeps the
//! two halves of a delivered connection apart. Every other callback leaves on its first compares.

use aya_ebpf::{
    bindings::{
        BPF_NOEXIST, BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB,
        BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB,
        BPF_SOCK_OPS_TCP_LISTEN_CB, bpf_sock, bpf_sock_ops,
    },
    helpers::{bpf_ktime_get_ns, bpf_sock_hash_update, bpf_sock_ops_cb_flags_set},
};
use culvert_ebpf::{
    abi::{
        FourTuple, INITIAL_ORDER, LISTENER_SLOTS, LOOPBACK_IFINDEX, ListenerKey, PROBES_KUBELET,
        PROBES_NODE, Pod, Role, RoleKey, mark, newest_first, pod_flags, port, role,
    },
    addr::Addr,
    decide::{self, ConnectFacts, Verdict},
};

use crate::{
    kernel::{
        AF_INET, SO_MARK, TCP_CLOSE, TCP_LISTEN, address, bind_to, cidr_excluded, field, flagged,
        is_own, netns_cookie, port_excluded, remote_port, set_mark, set_option, socket,
        ztunnel_storage,
    },
    maps,
    report::{count, decided},
};

#[inline(always)]
pub fn run(ops: *mut bpf_sock_ops) {
    match field!(bpf_sock_ops, ops, op) {
        BPF_SOCK_OPS_TCP_CONNECT_CB => connecting(ops),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => accepted(ops),
        BPF_SOCK_OPS_TCP_LISTEN_CB => listening(ops),
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB | BPF_SOCK_OPS_STATE_CB => asked_for(ops),
        _ => {}
    }
}

/// The 4-tuple from the connecting side.
#[inline(always)]
fn tuple(ops: *mut bpf_sock_ops) -> FourTuple {
    FourTuple {
        src: address!(bpf_sock_ops, ops, local_ip4, local_ip6),
        dst: address!(bpf_sock_ops, ops, remote_ip4, remote_ip6),
        src_port: field!(bpf_sock_ops, ops, local_port) as u16,
        dst_port: remote_port(ops),
    }
}

#[inline(always)]
fn connecting(ops: *mut bpf_sock_ops) {
    let cookie = netns_cookie(ops);
    // SAFETY: entries are replaced whole, never torn in a way that matters: each field stands alone.
    match unsafe { maps::PODS.get(cookie) } {
        Some(pod) => connecting_in_pod(ops, cookie, pod),
        None => connecting_elsewhere(ops, cookie),
    }
}

struct Facts<'a> {
    cookie: u64,
    pod: &'a Pod,
    dst: Addr,
    dst_port: u16,
    ztunnel: bool,
    bound: bool,
}

impl ConnectFacts for Facts<'_> {
    #[inline(always)]
    fn is_ztunnel(&self) -> bool {
        self.ztunnel
    }

    #[inline(always)]
    fn destination_is_own(&self) -> bool {
        is_own(self.cookie, self.dst)
    }

    #[inline(always)]
    fn destination_is_excluded(&self) -> bool {
        self.pod.leaves_alone(&self.dst)
            || self.pod.flags & pod_flags::OUT_PORTS != 0
                && port_excluded(self.cookie, self.dst_port, 0)
            || self.pod.flags & pod_flags::CIDRS != 0 && cidr_excluded(self.cookie, self.dst)
    }

    #[inline(always)]
    fn refusing(&self) -> bool {
        if self.pod.flags & pod_flags::REFUSE != 0 {
            return true;
        }
        if self.pod.hold == u64::MAX {
            return false;
        }
        let since = away_since(self.cookie);
        // SAFETY: no arguments.
        since != 0 && unsafe { bpf_ktime_get_ns() }.saturating_sub(since) >= self.pod.hold
    }

    #[inline(always)]
    fn bound_to_device(&self) -> bool {
        self.bound
    }
}

/// Since when no ztunnel listens for the pod's outbound connections; 0 = one does.
#[inline(always)]
fn away_since(cookie: u64) -> u64 {
    let key = RoleKey {
        cookie,
        role: role::OUTBOUND,
        pad: 0,
    };
    // SAFETY: one aligned word is read.
    unsafe { maps::ROLES.get(key) }.map_or(0, |role| role.away_since)
}

/// Told by more than the mark when the pod's ztunnel is named: any process with CAP_NET_RAW can set a mark.
#[inline(always)]
fn is_ztunnel(sk: *mut bpf_sock, current_mark: u32, pod: &Pod, cookie: u64) -> bool {
    if current_mark & mark::MASK != mark::ZTUNNEL {
        return false;
    }
    if pod.flags & pod_flags::NAMED_ZTUNNEL == 0 || ztunnel_storage(sk, false) {
        return true;
    }
    count(cookie, Verdict::Impostor);
    false
}

#[inline(always)]
fn connecting_in_pod(ops: *mut bpf_sock_ops, cookie: u64, pod: &Pod) {
    let Some(sk) = socket(ops) else { return };
    let current = field!(bpf_sock, sk, mark);
    let tuple = tuple(ops);
    let bound = field!(bpf_sock, sk, bound_dev_if);
    let facts = Facts {
        cookie,
        pod,
        dst: tuple.dst,
        dst_port: tuple.dst_port,
        ztunnel: is_ztunnel(sk, current, pod, cookie),
        bound: bound != 0,
    };
    let verdict = decide::connect(&tuple.dst, &facts);
    match verdict {
        Verdict::Captured => {
            let held = !tuple.dst.is_v4() && away_since(cookie) != 0;
            set_mark(ops, current, if held { mark::HELD } else { mark::OUT });
            if bound != 0 {
                // It will turn round by its own device, where `culvert_steer` expects only what it was told of.
                let _ = maps::INGRESS.insert(tuple, bound, 0);
            }
        }
        Verdict::Home => set_mark(ops, current, mark::HOME),
        Verdict::Refused => set_mark(ops, current, mark::REFUSE),
        Verdict::Delivery => {
            // Bound to `lo`, so that neither half of the delivery can be taken for the client's own
            // connection when both happen to use the same four-tuple.
            bind_to(ops, LOOPBACK_IFINDEX);
            set_mark(ops, current, mark::HOME);
        }
        // A socket that connects a second time may still carry a mark of ours.
        Verdict::ExcludedOutbound if current & mark::OURS_MASK == mark::FAMILY => {
            set_mark(ops, current, 0)
        }
        _ => {}
    }
    decided(cookie, verdict, &tuple, 0);
}

/// A socket outside every enrolled pod: only the node's own may vouch, and only for enrolled pods.
#[inline(always)]
fn connecting_elsewhere(ops: *mut bpf_sock_ops, cookie: u64) {
    let Some(config) = maps::CONFIG.get(0) else {
        return;
    };
    if config.node_cookie != cookie {
        return;
    }
    let dst = address!(bpf_sock_ops, ops, remote_ip4, remote_ip6);
    // SAFETY: one aligned word is read.
    let Some(&pod) = (unsafe { maps::POD_BY_ADDR.get(dst) }) else {
        return;
    };
    let vouches = match config.probe_source {
        PROBES_NODE => true,
        PROBES_KUBELET => match socket(ops) {
            Some(sk) => flagged(&maps::VOUCHER_SOCKETS, sk, false),
            None => false,
        },
        _ => false,
    };
    let tuple = tuple(ops);
    let verdict = if vouches && maps::VOUCHED.insert(tuple, 0, 0).is_ok() {
        set_state_callback(ops, true);
        Verdict::Vouched
    } else {
        Verdict::NotVouched
    };
    if let Some(counts) = maps::PROBE_COUNTS.get_ptr_mut(0) {
        // SAFETY: this CPU's own copy.
        unsafe {
            match verdict {
                Verdict::NotVouched => (*counts).not_vouched += 1,
                _ if config.probe_source == PROBES_NODE => (*counts).node += 1,
                _ => (*counts).kubelet += 1,
            }
        }
    }
    decided(pod, verdict, &tuple, 0);
}

/// An accepted socket. Of ours are: the application's, accepted from a delivery (its mark came with the
/// SYN), and ztunnel's own.
#[inline(always)]
fn accepted(ops: *mut bpf_sock_ops) {
    let Some(sk) = socket(ops) else { return };
    let ours = field!(bpf_sock, sk, mark) & mark::MASK;
    if ours != mark::HOME && ours != mark::ZTUNNEL {
        return;
    }
    let cookie = netns_cookie(ops);
    // SAFETY: see `connecting`.
    let Some(pod) = (unsafe { maps::PODS.get(cookie) }) else {
        return;
    };
    if ours == mark::ZTUNNEL {
        // Inherited from the listener, where it was set to learn of its end.
        set_state_callback(ops, false);
    }
    // Seen from here the client is the remote side.
    let client = tuple(ops);
    if !is_own(cookie, client.src) {
        // Accepted from the pod's own application, not from behind a virtual interface.
        if ours == mark::ZTUNNEL && is_own(cookie, client.dst) {
            set_mark(ops, field!(bpf_sock, sk, mark), mark::ANSWER);
        }
        return;
    }
    if ours == mark::HOME {
        // One to a link-local address is bound to its interface by nature, and reported there.
        if field!(bpf_sock, sk, bound_dev_if) == 0 {
            bind_to(ops, LOOPBACK_IFINDEX);
        }
        return;
    }
    let ifindex = if pod.single_ifindex != 0 {
        pod.single_ifindex
    } else {
        let key = FourTuple {
            src: client.dst,
            dst: client.src,
            src_port: client.dst_port,
            dst_port: client.src_port,
        };
        // SAFETY: one aligned word is read.
        match unsafe { maps::INGRESS.get(key) } {
            Some(&ifindex) => {
                let _ = maps::INGRESS.remove(key);
                ifindex
            }
            None => 0,
        }
    };
    if ifindex != 0 {
        bind_to(ops, ifindex);
    }
}

/// Which of ztunnel's listeners a local port and family mean.
#[inline(always)]
fn role_of(ops: *mut bpf_sock_ops) -> Option<u32> {
    match field!(bpf_sock_ops, ops, local_port) as u16 {
        port::OUTBOUND => Some(role::OUTBOUND),
        port::INBOUND => Some(role::INBOUND),
        port::HBONE => Some(role::HBONE),
        port::DNS if field!(bpf_sock_ops, ops, family) == AF_INET => Some(role::DNS4),
        port::DNS => Some(role::DNS6),
        _ => None,
    }
}

#[inline(always)]
fn listening(ops: *mut bpf_sock_ops) {
    let cookie = netns_cookie(ops);
    // SAFETY: see `connecting`.
    let Some(pod) = (unsafe { maps::PODS.get(cookie) }) else {
        return;
    };
    let Some(sk) = socket(ops) else { return };
    let current = field!(bpf_sock, sk, mark);
    if current == 0 {
        return;
    }
    if is_ztunnel(sk, current, pod, cookie) {
        if let Some(role) = role_of(ops) {
            register(ops, cookie, role);
        }
        return;
    }
    // A listener with a mark of its own would answer ztunnel's delivery with that mark, out of the pod:
    // without one its accepted sockets take the mark of the SYN (tcp_fwmark_accept).
    set_option(ops, SO_MARK, 0);
}

/// Puts the listener into a free slot and in front of the others.
#[inline(always)]
fn register(ops: *mut bpf_sock_ops, cookie: u64, role: u32) {
    let key = RoleKey {
        cookie,
        role,
        pad: 0,
    };
    let known = maps::ROLES.get_ptr_mut(key);
    let order = match known {
        // SAFETY: one aligned word is read.
        Some(known) => unsafe { (*known).order },
        None => INITIAL_ORDER,
    };
    // With all slots taken the oldest gives way.
    let mut slot = (order >> (2 * (LISTENER_SLOTS - 1))) & 3;
    let mut done = false;
    for candidate in 0..LISTENER_SLOTS {
        if insert(
            ops,
            ListenerKey {
                cookie,
                role,
                slot: candidate,
            },
            u64::from(BPF_NOEXIST),
        ) {
            slot = candidate;
            done = true;
            break;
        }
    }
    if !done && !insert(ops, ListenerKey { cookie, role, slot }, 0) {
        return;
    }
    set_state_callback(ops, true);
    match known {
        // SAFETY: the kernel side is the only writer of these fields but for enrolment; ztunnel opens one
        // listener of a role at a time, and a lost update costs only which of two is tried first.
        Some(known) => unsafe {
            (*known).order = newest_first(order, slot);
            (*known).live += 1;
            (*known).away_since = 0;
        },
        None => {
            let fresh = Role {
                order: newest_first(order, slot),
                live: 1,
                away_since: 0,
            };
            let _ = maps::ROLES.insert(key, fresh, 0);
        }
    }
}

#[inline(always)]
fn insert(ops: *mut bpf_sock_ops, mut key: ListenerKey, flags: u64) -> bool {
    let map = (&raw const maps::LISTENERS).cast_mut();
    // SAFETY: context as given; the key lives on our stack for the length of the call.
    unsafe { bpf_sock_hash_update(ops, map.cast(), (&raw mut key).cast(), flags) == 0 }
}

/// Callbacks that mostly come because we asked for them: a vouched connection that is established or over,
/// a listener of ztunnel that closes.
#[inline(always)]
fn asked_for(ops: *mut bpf_sock_ops) {
    if field!(bpf_sock_ops, ops, bpf_sock_ops_cb_flags) & BPF_SOCK_OPS_STATE_CB_FLAG == 0 {
        return;
    }
    if field!(bpf_sock_ops, ops, op) == BPF_SOCK_OPS_STATE_CB {
        if state_argument(ops, 1) != TCP_CLOSE {
            return;
        }
        if state_argument(ops, 0) == TCP_LISTEN {
            listener_closed(ops);
            return;
        }
    }
    let Some(config) = maps::CONFIG.get(0) else {
        return;
    };
    if config.node_cookie == netns_cookie(ops) && maps::VOUCHED.remove(tuple(ops)).is_ok() {
        set_state_callback(ops, false);
    }
}

#[inline(always)]
fn state_argument(ops: *mut bpf_sock_ops, index: usize) -> u32 {
    // Old state, then new: the first words of the union behind `op`.
    if index == 0 {
        field!(bpf_sock_ops, ops, __bindgen_anon_1, 0)
    } else {
        field!(bpf_sock_ops, ops, __bindgen_anon_1, 4)
    }
}

#[inline(always)]
fn listener_closed(ops: *mut bpf_sock_ops) {
    let cookie = netns_cookie(ops);
    let Some(role) = role_of(ops) else { return };
    let Some(sk) = socket(ops) else { return };
    // SAFETY: see `connecting`.
    let Some(pod) = (unsafe { maps::PODS.get(cookie) }) else {
        return;
    };
    if !is_ztunnel(sk, field!(bpf_sock, sk, mark), pod, cookie) {
        return;
    }
    if let Some(known) = maps::ROLES.get_ptr_mut(RoleKey {
        cookie,
        role,
        pad: 0,
    }) {
        // SAFETY: as in `register`.
        unsafe {
            (*known).live -= 1;
            if (*known).live <= 0 {
                (*known).live = 0;
                (*known).away_since = bpf_ktime_get_ns();
            }
        }
    }
}

/// Asks for, or no longer for, a callback at each change of the socket's state.
#[inline(always)]
fn set_state_callback(ops: *mut bpf_sock_ops, on: bool) {
    let current = field!(bpf_sock_ops, ops, bpf_sock_ops_cb_flags);
    let wanted = if on {
        current | BPF_SOCK_OPS_STATE_CB_FLAG
    } else {
        current & !BPF_SOCK_OPS_STATE_CB_FLAG
    };
    if wanted != current {
        // SAFETY: context as given.
        unsafe { bpf_sock_ops_cb_flags_set(ops, wanted as i32) };
    }
}
