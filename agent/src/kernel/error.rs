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
    /// Whether the same call may succeed later without anybody changing anything.
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
        let retryable = matches!(
            cause.raw_os_error(),
            Some(libc::EAGAIN | libc::EINTR | libc::EBUSY | libc::ENOBUFS | libc::ENOMEM)
        );
        let cure = match cause.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => privileges::cure(),
            Some(libc::ENOMEM) => {
                "free memory or raise the memory limit of this process's cgroup".into()
            }
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

    /// From a check of ours.
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
