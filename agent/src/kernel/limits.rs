//! How many files this process may have open: each pod under watch takes five, and services start with a limit of 1024.
#![expect(
    unsafe_code,
    reason = "getrlimit(2) and setrlimit(2) take pointers to plain numbers"
)]

use std::io;

use super::error::{Error, Result};

const OBJECT: &str = "the limit of open files";

/// Raises the limit of open files as far as this process may, and returns what it is then.
pub fn raise_open_files() -> Result<u64> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the pointer is to our own variable, which the call fills.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } < 0 {
        return Err(Error::system("read", OBJECT, io::Error::last_os_error()));
    }
    if limit.rlim_cur < limit.rlim_max {
        limit.rlim_cur = limit.rlim_max;
        // SAFETY: the pointer is to our own variable, which the call only reads.
        if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } < 0 {
            let error = Error::system("raise", OBJECT, io::Error::last_os_error());
            return Err(error.cured_by("start the agent with LimitNOFILE=65536 or more"));
        }
    }
    Ok(limit.rlim_cur)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_soft_limit_ends_at_the_hard_one() {
        let raised = raise_open_files().unwrap();
        let limits = std::fs::read_to_string("/proc/self/limits").unwrap();
        let line = limits
            .lines()
            .find(|l| l.starts_with("Max open files"))
            .unwrap();
        let numbers: Vec<&str> = line.split_ascii_whitespace().skip(3).take(2).collect();
        assert_eq!(numbers, [raised.to_string(), raised.to_string()]);
    }
}
