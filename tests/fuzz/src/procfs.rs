//! What `/proc/PID/cgroup` may say of a process: its text is whatever somebody called a cgroup.

use culvert::kernel::procfs::pod_uid;

/// A whole file.
#[expect(
    clippy::panic,
    reason = "a target says by a panic that what must hold does not"
)]
pub fn procfs(data: &[u8]) {
    let Some(uid) = pod_uid(data) else {
        return;
    };
    let dashes = uid.bytes().filter(|b| *b == b'-').count();
    let digits = uid.bytes().filter(u8::is_ascii_hexdigit).count();
    let well_formed = digits == 32 && matches!((uid.len(), dashes), (36, 4) | (32, 0));
    // It is found again in the plainest file that names it.
    let again = pod_uid(format!("0::/kubepods/pod{uid}/x\n").as_bytes());
    if !well_formed || again.as_ref() != Some(&uid) {
        panic!("no pod's UID: {uid}");
    }
}
