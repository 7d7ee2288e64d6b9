//! `culvert_steer`: where a SYN of an enrolled pod goes; and `culvert_enter`, each pod's way to it.
//!
//! Runs for a TCP packet that belongs to no established socket, which is a SYN in all but odd cases, and
//! hands it to ztunnel's listener, leaves it alone, or drops it. sk_lookup can ask neither for the
//! namespace nor for the mark, so each pod has a small program of its own that knows the pod's cookie.

use aya_ebpf::{
    bindings::{BPF_SK_LOOKUP_F_NO_REUSEPORT, BPF_SK_LOOKUP_F_REPLACE, bpf_sk_lookup},
    programs::SkLookupContext,
};
use culvert_ebpf::{
    abi::{
        FourTuple, INITIAL_ORDER, LISTENER_SLOTS, LOOPBACK_IFINDEX, ListenerKey, MAX_ANSWERING,
        MAX_VIRTUAL, Pod, RoleKey, pod_flags,
    },
    decide::{self, SteerFacts, Verdict},
};

use crate::{
    kernel::{IPPROTO_TCP, address, captures_dns, field, is_own, port_excluded},
    maps,
    report::decided,
};

const PASS: u32 = 1;
const DROP: u32 = 0;

/// What each pod's own copy does: leave what is not TCP alone, say whose namespace this is, jump.
///
/// Small on purpose: it is verified once per pod, and it never changes while pods live. Replacing the one
/// `culvert_steer` behind the jump replaces it for all pods at once.
#[inline(always)]
pub fn enter(ctx: &SkLookupContext) -> u32 {
    if field!(bpf_sk_lookup, ctx.lookup, protocol) != IPPROTO_TCP {
        return PASS;
    }
    let cookie: u64;
    // SAFETY: loads an immediate into a register, nothing else. The loader looks for this constant
    // (`COOKIE_PLACEHOLDER`) in the instructions.
    unsafe {
        core::arch::asm!("{} = 0xC01DC0DEC0C0C1E5 ll", out(reg) cookie, options(pure, nomem, nostack, preserves_flags));
    }
    if let Some(slot) = maps::ENTERING.get_ptr_mut(0) {
        // SAFETY: this CPU's own slot. Packets are looked up with softirqs off, so between this write and
        // the read behind the jump no other namespace's packet runs here.
        unsafe { *slot = cookie };
        // SAFETY: our own context; the array holds sk_lookup programs only.
        unsafe { maps::STEER.tail_call(ctx, 0) };
    }
    // There is always a program behind the jump; if not, closed.
    DROP
}

struct Facts<'a> {
    cookie: u64,
    pod: &'a Pod,
    tuple: &'a FourTuple,
    ifindex: u32,
}

impl SteerFacts for Facts<'_> {
    #[inline(always)]
    fn source_is_own(&self) -> bool {
        is_own(self.cookie, self.tuple.src)
    }

    #[inline(always)]
    fn destination_is_own(&self) -> bool {
        is_own(self.cookie, self.tuple.dst)
    }

    #[inline(always)]
    fn on_loopback_device(&self) -> bool {
        self.ifindex == LOOPBACK_IFINDEX
    }

    #[inline(always)]
    fn announced(&self) -> bool {
        // SAFETY: one aligned word is read.
        unsafe { maps::INGRESS.get(self.tuple) }.is_some_and(|ifindex| *ifindex == self.ifindex)
    }

    #[inline(always)]
    fn on_virtual_interface(&self) -> bool {
        if self.pod.flags & pod_flags::VIRTUAL == 0 {
            return false;
        }
        for i in 0..MAX_VIRTUAL {
            if self.pod.virtual_ifindexes[i] == self.ifindex {
                return true;
            }
        }
        false
    }

    #[inline(always)]
    fn dns_is_on(&self) -> bool {
        self.pod.flags & pod_flags::DNS != 0
    }

    #[inline(always)]
    fn captures_dns(&self) -> bool {
        captures_dns(self.cookie, self.pod, self.tuple.dst)
    }

    #[inline(always)]
    fn vouched(&self) -> bool {
        // SAFETY: the value is never read, only its presence.
        unsafe { maps::VOUCHED.get(self.tuple) }.is_some()
    }

    #[inline(always)]
    fn port_is_excluded(&self) -> bool {
        self.pod.flags & pod_flags::IN_PORTS != 0
            && port_excluded(self.cookie, self.tuple.dst_port, 1)
    }

    #[inline(always)]
    fn bypasses_inbound(&self) -> bool {
        self.pod.flags & pod_flags::BYPASS_INBOUND != 0
    }
}

#[inline(always)]
pub fn run(ctx: &SkLookupContext) -> u32 {
    let lookup: *mut bpf_sk_lookup = ctx.lookup;
    let Some(&cookie) = maps::ENTERING.get(0) else {
        return DROP;
    };
    // SAFETY: entries are replaced whole; each field stands alone.
    let Some(pod) = (unsafe { maps::PODS.get(cookie) }) else {
        return PASS;
    };
    let tuple = FourTuple {
        src: address!(bpf_sk_lookup, lookup, remote_ip4, remote_ip6),
        dst: address!(bpf_sk_lookup, lookup, local_ip4, local_ip6),
        src_port: u16::from_be(field!(bpf_sk_lookup, lookup, remote_port) as u16),
        dst_port: field!(bpf_sk_lookup, lookup, local_port) as u16,
    };
    let ifindex = field!(bpf_sk_lookup, lookup, ingress_ifindex);
    if pod.leaves_alone(&tuple.dst) {
        return PASS;
    }
    let facts = Facts {
        cookie,
        pod,
        tuple: &tuple,
        ifindex,
    };
    let mut verdict = decide::steer(&tuple.dst, tuple.dst_port, &facts);
    // The second time is for a lookup without a listener of its own.
    for _ in 0..2 {
        let Some(role) = verdict.listener() else {
            break;
        };
        if assign(ctx, cookie, role) {
            break;
        }
        verdict = verdict.unheard();
    }
    if pod.flags & pod_flags::MULTI_INTERFACE != 0
        && matches!(verdict, Verdict::Inbound | Verdict::Hbone)
        && answers_by(pod, ifindex)
    {
        let _ = maps::INGRESS.insert(tuple, ifindex, 0);
    }
    decided(cookie, verdict, &tuple, ifindex);
    if verdict.drops() { DROP } else { PASS }
}

/// Can a socket bound to this interface answer? With asymmetric routes it could not, and is left unbound.
#[inline(always)]
fn answers_by(pod: &Pod, ifindex: u32) -> bool {
    for i in 0..MAX_ANSWERING {
        if pod.answering_ifindexes[i] == ifindex {
            return true;
        }
    }
    false
}

/// Hands the SYN to the newest listener of that role that is alive, and notes when none is.
#[inline(always)]
fn assign(ctx: &SkLookupContext, cookie: u64, role: u32) -> bool {
    let known = maps::ROLES.get_ptr_mut(RoleKey {
        cookie,
        role,
        pad: 0,
    });
    let order = match known {
        // SAFETY: one aligned word is read.
        Some(known) => unsafe { (*known).order },
        None => INITIAL_ORDER,
    };
    for i in 0..LISTENER_SLOTS {
        let key = ListenerKey {
            cookie,
            role,
            slot: (order >> (2 * i)) & 3,
        };
        // Alone, without its reuseport group: the group may hold strangers. Whatever a program before ours has chosen.
        let flags = BPF_SK_LOOKUP_F_NO_REUSEPORT | BPF_SK_LOOKUP_F_REPLACE;
        if maps::LISTENERS
            .redirect_sk_lookup(ctx, key, u64::from(flags))
            .is_ok()
        {
            if let Some(known) = known {
                // SAFETY: one aligned word; only written when it says otherwise.
                unsafe {
                    if (*known).away_since != 0 {
                        (*known).away_since = 0;
                    }
                }
            }
            return true;
        }
    }
    if let Some(known) = known {
        // SAFETY: as above.
        unsafe {
            if (*known).away_since == 0 {
                (*known).away_since = aya_ebpf::helpers::bpf_ktime_get_ns();
            }
        }
    }
    false
}
