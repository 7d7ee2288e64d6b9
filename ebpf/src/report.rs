//! Telling user space what was decided: counters always, events while somebody watches.

use aya_ebpf::helpers::bpf_ktime_get_ns;
use culvert_ebpf::{
    abi::{Event, FourTuple},
    decide::Verdict,
};

use crate::maps;

/// Counts a verdict for the pod.
#[inline(always)]
pub fn count(cookie: u64, verdict: Verdict) {
    if let Some(counters) = maps::COUNTERS.get_ptr_mut(cookie) {
        // SAFETY: this CPU's own copy; the index is an enum below COUNTER_SLOTS, which the verifier checks.
        unsafe { (*counters).by_verdict[verdict as usize] += 1 };
    }
}

/// Counts it and, while a watcher's lease runs, sends one record.
#[inline(always)]
pub fn decided(cookie: u64, verdict: Verdict, tuple: &FourTuple, ifindex: u32) {
    decided_by(cookie, verdict, || *tuple, ifindex);
}

/// The same, where nobody has put the addresses together yet: without a watcher nobody has to.
#[inline(always)]
pub fn decided_by(cookie: u64, verdict: Verdict, tuple: impl Fn() -> FourTuple, ifindex: u32) {
    count(cookie, verdict);
    let Some(config) = maps::CONFIG.get(0) else {
        return;
    };
    if config.events_until == 0 {
        return;
    }
    // SAFETY: no arguments.
    let time = unsafe { bpf_ktime_get_ns() };
    if time > config.events_until {
        return;
    }
    let tuple = tuple();
    if let Some(mut slot) = maps::EVENTS.reserve::<Event>(0) {
        slot.write(Event {
            time,
            cookie,
            src: tuple.src,
            dst: tuple.dst,
            src_port: tuple.src_port,
            dst_port: tuple.dst_port,
            verdict: verdict as u32,
            ifindex,
            pad: 0,
        });
        slot.submit(0);
    }
}
