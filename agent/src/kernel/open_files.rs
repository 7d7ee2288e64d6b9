//! How many files another process has open, and how many it may: a ztunnel that has none left takes no further pod.
//!
//! Reads /proc, and knows nothing of what the files are.

use std::{fs, io, path::Path};

use super::{
    error::{Error, Result},
    procfs::{self, PROC},
};

/// Open files of a process.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OpenFiles {
    /// So many are.
    pub open: u64,
    /// So many may be: the soft limit; the largest number where there is none.
    pub limit: u64,
}

impl OpenFiles {
    /// How much of the limit is used, from 0 to 100.
    #[must_use]
    pub fn percent(&self) -> u64 {
        let limit = u128::from(self.limit.max(1));
        u64::try_from(u128::from(self.open) * 100 / limit).map_or(100, |p| p.min(100))
    }
}

/// Those of a process; none when it is gone.
pub fn of(pid: u32) -> Result<Option<OpenFiles>> {
    let root = Path::new(PROC);
    let mut limits = Vec::new();
    if !procfs::read(root, pid, "limits", &mut limits)? {
        return Ok(None);
    }
    let dir = root.join(pid.to_string()).join("fd");
    let open = match count(&dir) {
        Ok(open) => open,
        Err(error) if procfs::vanished(&error) => return Ok(None),
        Err(error) => return Err(Error::system("count", dir.display(), error)),
    };
    let limit = soft_limit(&limits).ok_or_else(|| {
        let what = "no line `Max open files` with a number";
        Error::wrong(
            "read",
            root.join(format!("{pid}/limits")).display(),
            what,
            "",
        )
    })?;
    Ok(Some(OpenFiles { open, limit }))
}

/// Since Linux 6.2 the directory's size says it; before, each entry is counted.
fn count(dir: &Path) -> io::Result<u64> {
    match fs::metadata(dir)?.len() {
        0 => Ok(fs::read_dir(dir)?.map(|_| 1).sum()),
        open => Ok(open),
    }
}

fn soft_limit(limits: &[u8]) -> Option<u64> {
    let lines = str::from_utf8(limits).ok()?.lines();
    let numbers = lines
        .filter_map(|l| l.strip_prefix("Max open files"))
        .next()?;
    match numbers.split_ascii_whitespace().next()? {
        "unlimited" => Some(u64::MAX),
        number => number.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead as _, BufReader},
        process::{Command, Stdio},
    };

    use super::*;

    #[test]
    fn the_soft_limit_is_the_first_number() {
        let text =
            b"Limit                     Soft Limit           Hard Limit           Units     \n\
            Max core file size        0                    unlimited            bytes     \n\
            Max open files            1024                 524288               files     \n";
        assert_eq!(soft_limit(text), Some(1024));
        assert_eq!(
            soft_limit(b"Max open files   unlimited   unlimited   files"),
            Some(u64::MAX)
        );
        assert_eq!(soft_limit(b"Max processes 1 1 processes"), None);
        let full = OpenFiles {
            open: 1000,
            limit: 1024,
        };
        assert_eq!(full.percent(), 97);
        let unlimited = OpenFiles {
            open: 5000,
            limit: u64::MAX,
        };
        assert_eq!(unlimited.percent(), 0);
    }

    #[test]
    fn a_process_near_its_limit_is_seen_as_that() {
        #[expect(
            clippy::disallowed_methods,
            reason = "a process with a limit of its own"
        )]
        let mut command = Command::new("sh");
        let script = "ulimit -n 10; exec 3</dev/null 4</dev/null 5</dev/null 6</dev/null 7</dev/null; echo; read x";
        command.args(["-c", script]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        let mut said = BufReader::new(child.stdout.take().unwrap());
        said.read_line(&mut line).unwrap();
        let seen = of(child.id()).unwrap().unwrap();
        assert_eq!(seen.limit, 10);
        // Its own five, the three all have, and whatever this process left open to its children.
        assert!((8..=10).contains(&seen.open), "{seen:?}");
        assert!(seen.percent() >= 80);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(of(child.id()).unwrap(), None);
    }
}
