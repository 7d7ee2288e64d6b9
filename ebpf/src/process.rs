//! Who is calling: is the current process one that user space named?
//!
//! Processes are known by their id in the initial PID namespace, or, where the kernel can answer for others, by their id
//! in one of those: an agent in a nested namespace knows no other. Only for programs that run in process context.

use aya_ebpf::{
    bindings::bpf_pidns_info,
    helpers::{bpf_get_current_pid_tgid, generated::bpf_get_ns_current_pid_tgid},
    maps::HashMap,
};
use culvert_ebpf::abi::{MAX_PID_NAMESPACES, Named, ProcessKey};

use crate::maps;

/// Is the calling process in this map?
#[inline(always)]
pub fn is_named(named: &'static HashMap<ProcessKey, Named>) -> bool {
    let initial = ProcessKey {
        pid_namespace: 0,
        tgid: (bpf_get_current_pid_tgid() >> 32) as u32,
    };
    // SAFETY: the value is never read, only its presence.
    if unsafe { named.get(initial) }.is_some() {
        return true;
    }
    if !any_namespace() {
        return false;
    }
    for slot in 0..MAX_PID_NAMESPACES {
        let Some(namespace) = maps::PID_NAMESPACES.get(slot) else {
            return false;
        };
        if namespace.inode == 0 {
            continue;
        }
        let mut info = bpf_pidns_info { pid: 0, tgid: 0 };
        // SAFETY: the answer lives on our stack for the length of the call.
        let code = unsafe {
            bpf_get_ns_current_pid_tgid(
                namespace.dev,
                namespace.inode,
                &raw mut info,
                size_of::<bpf_pidns_info>() as u32,
            )
        };
        // A process is in one PID namespace: no other slot can match.
        if code == 0 {
            let key = ProcessKey {
                pid_namespace: slot + 1,
                tgid: info.tgid,
            };
            // SAFETY: as above.
            return unsafe { named.get(key) }.is_some();
        }
    }
    false
}

/// Can this kernel tell a process's id in any PID namespace? Answered when the program is loaded.
#[inline(always)]
fn any_namespace() -> bool {
    let answer: u64;
    // SAFETY: loads an immediate into a register, nothing else. The loader looks for this constant
    // (`PIDNS_PLACEHOLDER`) in the instructions.
    unsafe {
        core::arch::asm!("{} = 0xC01DC0DE9D159D15 ll", out(reg) answer, options(pure, nomem, nostack, preserves_flags));
    }
    answer != 0
}
