//! The one error of the watch: what was asked of the API server, why it failed, what cures it, and whether asking
//! again may help.

use std::{borrow::Cow, error::Error as StdError, fmt, io};

/// Why a request failed.
#[derive(Debug)]
pub struct Error {
    /// What was tried: "read pod".
    pub operation: &'static str,
    /// On what.
    pub object: String,
    /// What the server or the connection said.
    pub cause: String,
    /// What the reader can do about it; empty when there is nothing better than the cause.
    pub cure: Cow<'static, str>,
    /// Whether the same request may succeed later without anybody changing anything.
    pub retryable: bool,
    /// HTTP status of the answer; 0 when there was none.
    pub code: u16,
}

/// Shorthand of this module.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(super) fn kube(
        operation: &'static str,
        object: impl fmt::Display,
        cause: &kube::Error,
    ) -> Self {
        let status = match cause {
            kube::Error::Api(status) => Some(status),
            _ => None,
        };
        let code = status.map_or(0, |s| s.code);
        let cure = match code {
            401 => {
                "the API server refuses the agent's token: check that its service account exists and that the token \
                 is mounted"
            }
            403 => {
                "grant it to the agent's service account: the chart's ClusterRole lists what is needed"
            }
            404 | 409 | 410 | 422 | 429 => "",
            0 => {
                "check that the API server can be reached from this node and that its certificate is the cluster's"
            }
            _ => "look into the API server's log",
        };
        Self {
            operation,
            object: object.to_string(),
            cause: status.map_or_else(|| chain(cause), |s| s.message.clone()),
            cure: cure.into(),
            retryable: matches!(code, 0 | 401 | 408 | 409 | 429 | 500..),
            code,
        }
    }

    pub(super) fn slow(operation: &'static str, object: impl fmt::Display) -> Self {
        Self {
            operation,
            object: object.to_string(),
            cause: "no answer in time".into(),
            cure: "check that the API server can be reached from this node".into(),
            retryable: true,
            code: 0,
        }
    }

    pub(super) fn config(
        object: impl fmt::Display,
        cause: &(dyn StdError + 'static),
        cure: &'static str,
    ) -> Self {
        Self {
            operation: "configure the API client from",
            object: object.to_string(),
            cause: chain(cause),
            cure: cure.into(),
            retryable: false,
            code: 0,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "cannot {} {}: {}",
            self.operation, self.object, self.cause
        )?;
        if !self.cure.is_empty() {
            write!(f, "; {}", self.cure)?;
        }
        Ok(())
    }
}

impl StdError for Error {}

/// All causes in one line, each told once: many a layer repeats what is below it.
pub(super) fn chain(error: &(dyn StdError + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let said = cause.to_string();
        if !text.contains(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        next = cause.source();
    }
    text
}

/// Whether the kernel gave the connection up because nobody answered any more.
pub(super) fn is_dead_connection(error: &(dyn StdError + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(cause) = next {
        next = match cause.downcast_ref::<io::Error>() {
            Some(io) => {
                use io::ErrorKind::{HostUnreachable, NetworkUnreachable, TimedOut};
                if matches!(io.kind(), HostUnreachable | NetworkUnreachable | TimedOut) {
                    return true;
                }
                // Its source() would pass over the error that it wraps.
                io.get_ref().map(|inner| inner as &(dyn StdError + 'static))
            }
            None => cause.source(),
        };
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_connection_is_found_below_other_errors() {
        let dead = || io::Error::from_raw_os_error(libc::ETIMEDOUT);
        assert!(is_dead_connection(&kube::Error::ReadEvents(
            io::Error::other(dead())
        )));
        assert!(is_dead_connection(&kube::Error::Service(Box::new(
            io::Error::other(io::Error::other(dead()))
        ))));
        let refused = io::Error::from_raw_os_error(libc::ECONNREFUSED);
        assert!(!is_dead_connection(&kube::Error::ReadEvents(refused)));
    }
}
