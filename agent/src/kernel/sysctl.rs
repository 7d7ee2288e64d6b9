//! The sysctls of a pod's namespace that Culvert sets, and how they are put back.
//!
//! `/proc/sys/net` shows the namespace of the thread that opens it, so a [`Guard`] is asked for.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    os::unix::fs::FileExt,
    path::Path,
};

use culvert_ebpf::abi::{NO_SYSCTL, Record};

use super::{
    error::{Error, Result},
    netns::Guard,
    own_proc,
};

/// In the order of [`Record::sysctls`].
const OURS: [&str; 3] = [
    // The application's accepted socket takes the mark of the SYN, so its replies turn round too.
    "/proc/sys/net/ipv4/tcp_fwmark_accept",
    // Resets made without a socket follow the mark: a closed port answers at once.
    "/proc/sys/net/ipv4/fwmark_reflect",
    "/proc/sys/net/ipv6/fwmark_reflect",
];

/// Is there IPv6 in this kernel at all?
#[must_use]
pub(super) fn ipv6_present() -> bool {
    Path::new("/proc/sys/net/ipv6").exists()
}

/// Can IPv6 be used in the namespace?
#[must_use]
pub(super) fn ipv6_enabled(_guard: &Guard<'_>) -> bool {
    fs::read_to_string("/proc/sys/net/ipv6/conf/lo/disable_ipv6").is_ok_and(|v| v.trim() == "0")
}

fn read(path: &str) -> Result<u8> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(text.trim().parse().unwrap_or(NO_SYSCTL)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(NO_SYSCTL),
        Err(e) => Err(Error::system("read", path, e)),
    }
}

fn write(path: &str, value: u8) -> Result<()> {
    let written = open_for_writing(path).and_then(|mut file| write!(file, "{value}"));
    written.map_err(|e| {
        let readonly = e.raw_os_error() == Some(libc::EROFS);
        let error = Error::system("write", path, e);
        if readonly {
            error.cured_by("give the agent a writable /proc/sys, or let it mount one (CAP_SYS_ADMIN, no security profile that forbids it)")
        } else {
            error
        }
    })
}

/// In a container `/proc/sys` is read-only; then by way of a procfs of our own.
pub(super) fn open_for_writing(path: &str) -> io::Result<File> {
    match File::options().write(true).open(path) {
        Err(readonly) if readonly.raw_os_error() == Some(libc::EROFS) => {
            own_proc::open_for_writing(Path::new(path)).map_err(|why| {
                tracing::debug!(%why, "no procfs of our own");
                readonly
            })
        }
        result => result,
    }
}

/// The present values, to be kept in the pod's record.
pub(super) fn read_all(_guard: &Guard<'_>) -> Result<[u8; 4]> {
    let mut values = [NO_SYSCTL; 4];
    for (value, path) in values.iter_mut().zip(OURS) {
        *value = read(path)?;
    }
    Ok(values)
}

/// Sets what is there and not set; returns which.
pub(super) fn set_all(guard: &Guard<'_>) -> Result<Vec<&'static str>> {
    let wrong = wrong(guard)?;
    for path in &wrong {
        write(path, 1)?;
    }
    Ok(wrong)
}

/// Puts the recorded values back.
pub(super) fn restore(_guard: &Guard<'_>, record: &Record) -> Result<()> {
    for (path, earlier) in OURS.into_iter().zip(record.sysctls) {
        if earlier != NO_SYSCTL && earlier != 1 {
            write(path, earlier)?;
        }
    }
    Ok(())
}

/// The sysctls of one namespace, held open: reading them again takes neither a path nor a change of namespace.
#[derive(Debug)]
pub(super) struct Held(Vec<File>);

impl Held {
    /// Opens them.
    pub(super) fn open(_guard: &Guard<'_>) -> Result<Self> {
        let mut files = Vec::with_capacity(OURS.len());
        for path in OURS {
            match File::open(path) {
                Ok(file) => files.push(file),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(Error::system("open", path, e)),
            }
        }
        Ok(Self(files))
    }

    /// All of them are set. One that cannot be read counts as not: whoever looks closer will say why.
    pub(super) fn all_set(&self) -> bool {
        self.0.iter().all(|file| {
            let mut value = [0; 1];
            file.read_at(&mut value, 0).is_ok() && value == *b"1"
        })
    }
}

/// Names of those that are not as they have to be.
pub(super) fn wrong(guard: &Guard<'_>) -> Result<Vec<&'static str>> {
    let values = read_all(guard)?;
    Ok(OURS
        .into_iter()
        .zip(values)
        .filter(|(_, v)| !matches!(*v, 1 | NO_SYSCTL))
        .map(|(path, _)| path)
        .collect())
}
