//! The installer's one error: what was tried, on which file, why it failed, what cures it.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
};

use super::conflist;

/// Why a step of the installer failed.
#[derive(Debug)]
pub struct Error {
    /// What was tried: "write", "read".
    pub operation: &'static str,
    /// On which file or directory.
    pub path: PathBuf,
    /// What went wrong.
    pub cause: Cause,
    /// What the reader can do; empty where the cause says it.
    pub cure: String,
}

/// The reason behind an [`Error`].
#[derive(Debug)]
pub enum Cause {
    /// A system call failed.
    System(io::Error),
    /// The configuration is not one that can be edited.
    Conflist(conflist::Error),
    /// Somebody wrote the file between our look at it and our change: look again.
    Changed,
    /// Something else is not as it has to be.
    Wrong(String),
}

impl Error {
    pub(super) fn system(operation: &'static str, path: &Path, cause: io::Error) -> Self {
        Self {
            operation,
            path: path.to_owned(),
            cure: cure(path, &cause),
            cause: Cause::System(cause),
        }
    }

    pub(super) fn conflist(operation: &'static str, path: &Path, cause: conflist::Error) -> Self {
        Self {
            operation,
            path: path.to_owned(),
            cure: String::new(),
            cause: Cause::Conflist(cause),
        }
    }

    pub(super) fn changed(operation: &'static str, path: &Path) -> Self {
        Self {
            operation,
            path: path.to_owned(),
            cure: "run again".to_owned(),
            cause: Cause::Changed,
        }
    }

    pub(super) fn wrong(
        operation: &'static str,
        path: &Path,
        cause: impl Into<String>,
        cure: impl Into<String>,
    ) -> Self {
        Self {
            operation,
            path: path.to_owned(),
            cure: cure.into(),
            cause: Cause::Wrong(cause.into()),
        }
    }

    /// Whether the same call may succeed later without anybody changing a setting.
    #[must_use]
    pub fn retryable(&self) -> bool {
        match &self.cause {
            // Whoever writes the file may not have finished.
            Cause::Changed | Cause::Conflist(_) => true,
            Cause::System(e) => !matches!(
                e.raw_os_error(),
                Some(libc::EROFS | libc::EACCES | libc::EPERM)
            ),
            Cause::Wrong(_) => false,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot {} {}: ", self.operation, self.path.display())?;
        match &self.cause {
            Cause::System(e) => write!(f, "{e}")?,
            Cause::Conflist(e) => write!(f, "{e}")?,
            Cause::Changed => f.write_str("another program wrote it at the same moment")?,
            Cause::Wrong(why) => f.write_str(why)?,
        }
        if !self.cure.is_empty() {
            write!(f, "; {}", self.cure)?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

fn cure(path: &Path, cause: &io::Error) -> String {
    match cause.raw_os_error() {
        Some(libc::EROFS) => {
            let mount = fs::read_to_string("/proc/self/mountinfo")
                .ok()
                .and_then(|table| mount_of(&table, path))
                .unwrap_or_else(|| "its file system".to_owned());
            format!(
                "{mount} is mounted read-only: mount it writable (in a DaemonSet, without `readOnly: true` on that volume), \
                 or name another directory"
            )
        }
        Some(libc::EACCES | libc::EPERM) => {
            if let Some((there, owner)) = foreign(path) {
                return format!(
                    "{} belongs to user {owner}, and the agent goes without the capability to pass over others' permissions: \
                     `chown root {}`, as container runtimes expect it to be",
                    there.display(),
                    there.display()
                );
            }
            "run as root; if it is root already, the file or its directory may be immutable (`lsattr -d` shows it, `chattr -i` \
             undoes it) or a security module forbids it"
                .to_owned()
        }
        Some(libc::ENOSPC | libc::EDQUOT) => "free space on the node's disk".to_owned(),
        Some(libc::ENOENT) => {
            "the directory or a link's target is missing here; in a container, mount the host's directory".to_owned()
        }
        Some(libc::ELOOP) => "its symbolic links lead in a circle: remove them".to_owned(),
        _ => String::new(),
    }
}

/// What of `path` and its directory is there and belongs to somebody else than this process, which is root's.
fn foreign(path: &Path) -> Option<(PathBuf, u32)> {
    use std::os::unix::fs::MetadataExt as _;
    if !nix::unistd::geteuid().is_root() {
        return None;
    }
    [Some(path), path.parent()]
        .into_iter()
        .flatten()
        .find_map(|p| {
            let owner = fs::metadata(p).ok()?.uid();
            (owner != 0).then(|| (p.to_owned(), owner))
        })
}

/// The mount of `table` (as /proc/self/mountinfo) below which `path` lies.
fn mount_of(table: &str, path: &Path) -> Option<String> {
    let mounts = table.lines().filter_map(|line| {
        let mut fields = line.split(' ');
        // Blanks in paths are written in octal; nothing else that matters is escaped.
        let point = fields.nth(4)?.replace("\\040", " ");
        let kind = fields.skip_while(|f| *f != "-").nth(1)?;
        path.starts_with(&point)
            .then(|| (point.len(), format!("{point} ({kind})")))
    });
    // The last of several mounts on one point hides the others.
    mounts
        .max_by_key(|(length, _)| *length)
        .map(|(_, mount)| mount)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_is_named() {
        let table = "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
                     30 22 8:2 /x /host/etc/cni\\040net.d ro,relatime shared:1 - xfs /dev/sdb rw\n\
                     31 22 0:5 / /host rw - tmpfs tmpfs rw\n";
        let named = |path: &str| mount_of(table, Path::new(path));
        assert_eq!(
            named("/host/etc/cni net.d/a"),
            Some("/host/etc/cni net.d (xfs)".into())
        );
        assert_eq!(named("/host/opt"), Some("/host (tmpfs)".into()));
        assert_eq!(named("/etc"), Some("/ (ext4)".into()));
    }

    #[test]
    fn an_error_names_its_cure() {
        let error = Error::system(
            "write",
            Path::new("/"),
            io::Error::from_raw_os_error(libc::EROFS),
        );
        let text = error.to_string();
        assert!(
            text.starts_with("cannot write /: Read-only file system"),
            "{text}"
        );
        assert!(
            text.contains("is mounted read-only: mount it writable"),
            "{text}"
        );
        assert!(!error.retryable());
    }
}
