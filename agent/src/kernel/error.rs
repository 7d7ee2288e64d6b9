//! The one error of the kernel door: what was tried, on what, why it failed, what cures it.

use std::{borrow::Cow, fmt, io};

use super::privileges;

/// Why an operation on the kernel failed.
#[derive(Debug)]
pub struct Error {
    /// What was tried: "load program", "add rule".
    pub operation: Cow<'static, str>,
    /// On what: a path, a program, a rule.
    pub object: String,
    /// What the kernel, or our own check, said.
    pub cause: Cause,
    /// What the reader can do about it; empty when there is nothing better than the cause.
    pub cure: Cow<'static, str>,
    /// Whether the same call may succeed later, with the same input and in this process. True wherever that cannot be
    /// ruled out: a pause that grows costs little, a pod that is never tried again stays in plaintext.
    pub retryable: bool,
}

/// The reason behind an [`Error`].
#[derive(Debug)]
pub enum Cause {
    /// A system call failed.
    System(io::Error),
    /// Something was not as it has to be.
    Wrong(String),
}

/// Shorthand of this module.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// From a failed system call.
    pub fn system(
        operation: impl Into<Cow<'static, str>>,
        object: impl fmt::Display,
        cause: io::Error,
    ) -> Self {
        let retryable = !lasting(cause.raw_os_error(), || {
            privileges::missing().is_ok_and(|missing| !missing.is_empty())
        });
        let cure = match cause.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => privileges::cure(),
            Some(libc::ENOMEM) => {
                "free memory or raise the memory limit of this process's cgroup".into()
            }
            Some(libc::EMFILE) => {
                "raise this process's limit of open files (LimitNOFILE= of the service, or of the container runtime)".into()
            }
            Some(libc::ENFILE) => "raise the node's limit of open files: `sysctl fs.file-max`".into(),
            Some(libc::E2BIG) => {
                "a map is full: this node has more pods or addresses than Culvert is built for"
                    .into()
            }
            _ => Cow::Borrowed(""),
        };
        Self {
            operation: operation.into(),
            object: object.to_string(),
            cause: Cause::System(cause),
            cure,
            retryable,
        }
    }

    /// From a check of ours: refused for what it was asked, so that asking again is no use.
    pub fn wrong(
        operation: impl Into<Cow<'static, str>>,
        object: impl fmt::Display,
        cause: impl Into<String>,
        cure: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self {
            operation: operation.into(),
            object: object.to_string(),
            cause: Cause::Wrong(cause.into()),
            cure: cure.into(),
            retryable: false,
        }
    }

    /// The same error, where what is in the way may be taken out of it while this process runs.
    #[must_use]
    pub fn for_now(mut self) -> Self {
        self.retryable = true;
        self
    }

    /// The same error with another cure.
    #[must_use]
    pub fn cured_by(mut self, cure: impl Into<Cow<'static, str>>) -> Self {
        self.cure = cure.into();
        self
    }

    /// The number of the failed system call.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match &self.cause {
            Cause::System(e) => e.raw_os_error(),
            Cause::Wrong(_) => None,
        }
    }
}

/// Failures of a system call that stay as they are for as long as this process runs. The list is short on purpose: whatever
/// else it is (a limit, a full map, an interface or a process that went between look and change, a security profile, a
/// module that is not loaded yet), the node may be rid of it without a pod changing, and nobody would try again.
///
/// - ENOSYS: the kernel, or the seccomp filter this process was started with, has no such call.
/// - EPERM and EACCES while a capability is missing: none comes back to a process that has lost it. With all of them there,
///   a policy or a mount is in the way, and those change.
fn lasting(errno: Option<i32>, lacks_capability: impl FnOnce() -> bool) -> bool {
    match errno {
        Some(libc::ENOSYS) => true,
        Some(libc::EPERM | libc::EACCES) => lacks_capability(),
        _ => false,
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot {} {}: ", self.operation, self.object)?;
        match &self.cause {
            Cause::System(e) => write!(f, "{e}")?,
            Cause::Wrong(why) => f.write_str(why)?,
        }
        if !self.cure.is_empty() {
            write!(f, "; {}", self.cure)?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_pass_is_tried_again() {
        for errno in [
            libc::EAGAIN,
            libc::EBUSY,
            libc::ENOMEM,
            libc::EMFILE,
            libc::ENFILE,
            libc::ENOSPC,
            libc::E2BIG,
            libc::ENODEV,
            libc::ENETDOWN,
            libc::EINVAL,
            libc::ESRCH,
            libc::ENOENT,
            libc::EIO,
            libc::EOPNOTSUPP,
        ] {
            let error = Error::system("try", "it", io::Error::from_raw_os_error(errno));
            assert!(error.retryable, "{error}");
        }
        let without_a_number = Error::system("read", "it", io::Error::other("cut off"));
        assert!(without_a_number.retryable, "{without_a_number}");
    }

    #[test]
    fn what_lasts_as_long_as_the_process_is_not() {
        assert!(lasting(Some(libc::ENOSYS), || false));
        for errno in [libc::EPERM, libc::EACCES] {
            assert!(lasting(Some(errno), || true));
            assert!(!lasting(Some(errno), || false));
        }
        assert!(!Error::wrong("name", "it", "bad", "").retryable);
        assert!(Error::wrong("name", "it", "taken", "").for_now().retryable);
    }
}
