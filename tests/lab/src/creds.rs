//! Who a thread is: user and capabilities, changed for one thread alone. The C library would change all threads of the
//! process at once, so these are bare system calls.
#![expect(unsafe_code, reason = "credentials of one thread have no safe wrapper")]

use std::io;

const NOBODY: libc::c_long = 65534;
/// `_LINUX_CAPABILITY_VERSION_3`.
const VERSION: u32 = 0x2008_0522;
const CAP_NET_ADMIN: u8 = 12;
const CAP_NET_RAW: u8 = 13;
/// `SECBIT_NOROOT`: user 0 gets no capabilities by executing something.
const SECBIT_NOROOT: libc::c_ulong = 1;

/// As whom something runs. Programs started by such a thread keep what it says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Creds {
    /// User 0 with all the process has.
    Root,
    /// User nobody, without capabilities.
    Nobody,
    /// User nobody with CAP_NET_RAW alone, as containers have it by default.
    NetRawOnly,
    /// User nobody with CAP_NET_ADMIN alone.
    NetAdminOnly,
    /// User 0 without capabilities.
    RootNoCaps,
    /// User 0 whose programs have these capabilities alone, one bit each.
    RootWith(u64),
}

impl Creds {
    /// Changes the calling thread for good.
    pub(crate) fn apply(self) -> io::Result<()> {
        match self {
            Self::Root => Ok(()),
            Self::Nobody => become_nobody(),
            Self::NetRawOnly => keep_one(CAP_NET_RAW),
            Self::NetAdminOnly => keep_one(CAP_NET_ADMIN),
            Self::RootNoCaps => {
                prctl(libc::PR_SET_SECUREBITS, SECBIT_NOROOT, 0)?;
                capset(0)
            }
            Self::RootWith(set) => keep_for_programs(set),
        }
    }
}

impl std::fmt::Display for Creds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Root => "root",
            Self::Nobody => "nobody",
            Self::NetRawOnly => "nobody with CAP_NET_RAW",
            Self::NetAdminOnly => "nobody with CAP_NET_ADMIN",
            Self::RootNoCaps => "root without capabilities",
            Self::RootWith(set) => return write!(f, "root with capabilities {set:#x}"),
        })
    }
}

fn become_nobody() -> io::Result<()> {
    // SAFETY: the list has no members, so its pointer is not followed.
    check(unsafe { libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>()) })?;
    // SAFETY: plain numbers.
    check(unsafe { libc::syscall(libc::SYS_setresgid, NOBODY, NOBODY, NOBODY) })?;
    // SAFETY: plain numbers.
    check(unsafe { libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY) })
}

/// What a program of user 0 gets when it is executed is what its bounding set holds.
fn keep_for_programs(set: u64) -> io::Result<()> {
    for capability in 0..64 {
        if set >> capability & 1 == 1 {
            continue;
        }
        match prctl(libc::PR_CAPBSET_DROP, capability, 0) {
            // The kernel has no more.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => break,
            result => result?,
        }
    }
    Ok(())
}

fn keep_one(capability: u8) -> io::Result<()> {
    prctl(libc::PR_SET_KEEPCAPS, 1, 0)?;
    become_nobody()?;
    capset(1 << capability)?;
    // Ambient, so that programs keep it as well.
    prctl(
        libc::PR_CAP_AMBIENT,
        libc::PR_CAP_AMBIENT_RAISE as libc::c_ulong,
        capability.into(),
    )
}

fn prctl(option: i32, second: libc::c_ulong, third: libc::c_ulong) -> io::Result<()> {
    // SAFETY: the options used here take plain numbers.
    check(unsafe { libc::syscall(libc::SYS_prctl, option, second, third, 0, 0) })
}

/// Sets effective, permitted and inheritable capabilities, all of which we use lie in the first 32.
fn capset(set: u32) -> io::Result<()> {
    let header: [u32; 2] = [VERSION, 0];
    let data: [u32; 6] = [set, set, set, 0, 0, 0];
    // SAFETY: header and data have the layout of version 3 and outlive the call.
    check(unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()) })
}

fn check(code: libc::c_long) -> io::Result<()> {
    if code == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
