//! A procfs that only this process sees: container runtimes mount `/proc/sys` read-only in containers that are not
//! privileged, and Culvert writes three sysctls in pods' namespaces. It opens files there; what is written is the
//! caller's business.
#![expect(
    unsafe_code,
    reason = "the C library has no functions for mounts without a place"
)]

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::Path,
    sync::OnceLock,
};

use nix::{fcntl, sys::stat::Mode};

/// Opens a file below `/proc` to read and to write, by way of a mount that is attached nowhere.
pub(super) fn open(path: &Path) -> io::Result<File> {
    static MOUNT: OnceLock<OwnedFd> = OnceLock::new();
    let mount = match MOUNT.get() {
        Some(mount) => mount,
        None => {
            let fresh = mount()?;
            MOUNT.get_or_init(|| fresh)
        }
    };
    let below = path
        .strip_prefix("/proc")
        .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let flags = fcntl::OFlag::O_RDWR | fcntl::OFlag::O_CLOEXEC;
    let fd = fcntl::openat(mount, below, flags, Mode::empty())?;
    Ok(File::from(fd))
}

/// A procfs of this process's PID namespace, mounted nowhere: it goes with the descriptor.
fn mount() -> io::Result<OwnedFd> {
    const CLOEXEC: libc::c_long = 1;
    const CMD_CREATE: libc::c_long = 6;
    const NOSUID_NODEV_NOEXEC: libc::c_long = 2 | 4 | 8;
    // SAFETY: fsopen(2) reads a string that ends in zero, and lives to the end of the program.
    let context = unsafe { libc::syscall(libc::SYS_fsopen, c"proc".as_ptr(), CLOEXEC) };
    let context = owned(context)?;
    let null = std::ptr::null::<libc::c_char>();
    // SAFETY: FSCONFIG_CMD_CREATE takes no key, no value and no number.
    let made = unsafe {
        libc::syscall(
            libc::SYS_fsconfig,
            context.as_raw_fd(),
            CMD_CREATE,
            null,
            null,
            0,
        )
    };
    if made < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: fsmount(2) takes a descriptor and two numbers.
    let mount = unsafe {
        libc::syscall(
            libc::SYS_fsmount,
            context.as_raw_fd(),
            CLOEXEC,
            NOSUID_NODEV_NOEXEC,
        )
    };
    owned(mount)
}

fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = i32::try_from(result).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
