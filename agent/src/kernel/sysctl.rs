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
    let written = open(path).and_then(|mut file| write!(file, "{value}"));
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

/// To read and to write. In a container `/proc/sys` is read-only; then by way of a procfs of our own.
fn open(path: &str) -> io::Result<File> {
    match File::options().read(true).write(true).open(path) {
        Err(readonly) if readonly.raw_os_error() == Some(libc::EROFS) => {
            own_proc::open(Path::new(path)).map_err(|why| {
                tracing::debug!(%why, "no procfs of our own");
                readonly
            })
        }
        result => result,
    }
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

/// The sysctls of one namespace, held open: using them again takes neither a path nor a change of namespace.
#[derive(Debug)]
pub(super) struct Held([Option<File>; OURS.len()]);

impl Held {
    /// Opens those that are there.
    pub(super) fn open(_guard: &Guard<'_>) -> Result<Self> {
        let mut held = [const { None }; OURS.len()];
        for (file, path) in held.iter_mut().zip(OURS) {
            // What is set already need not be written.
            match open(path).or_else(|_| File::open(path)) {
                Ok(open) => *file = Some(open),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(Error::system("open", path, e)),
            }
        }
        Ok(Self(held))
    }

    /// The present values, to be kept in the pod's record. One that cannot be read counts as missing.
    pub(super) fn values(&self) -> [u8; 4] {
        let mut values = [NO_SYSCTL; 4];
        for (value, file) in values.iter_mut().zip(&self.0) {
            let mut text = [0; 4];
            let read = file.as_ref().and_then(|f| f.read_at(&mut text, 0).ok());
            let text = read.and_then(|n| std::str::from_utf8(&text[..n]).ok());
            *value = text
                .and_then(|t| t.trim().parse().ok())
                .unwrap_or(NO_SYSCTL);
        }
        values
    }

    /// Sets what is not set.
    pub(super) fn set_all(&self, _guard: &Guard<'_>) -> Result<()> {
        for ((file, path), value) in self.0.iter().zip(OURS).zip(self.values()) {
            if let Some(file) = file
                && value != 1
                && file.write_all_at(b"1", 0).is_err()
            {
                write(path, 1)?;
            }
        }
        Ok(())
    }

    /// All of them are set. One that cannot be read counts as not: whoever looks closer will say why.
    pub(super) fn all_set(&self) -> bool {
        let values = self.values();
        self.0
            .iter()
            .zip(values)
            .all(|(file, value)| file.is_none() || value == 1)
    }
}

/// Names of those that are not as they have to be.
pub(super) fn wrong(_guard: &Guard<'_>) -> Result<Vec<&'static str>> {
    let mut wrong = Vec::new();
    for path in OURS {
        if !matches!(read(path)?, 1 | NO_SYSCTL) {
            wrong.push(path);
        }
    }
    Ok(wrong)
}
