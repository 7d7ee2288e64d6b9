//! One agent to a run directory: a lock in it, held until the process ends, however it ends.
//!
//! Two agents would undo each other's work in every pod. The kernel lets go of the lock of one that was killed; what the
//! file says is for whoever is turned away.

use std::{
    fs::{DirBuilder, File, OpenOptions},
    io::{self, Read as _, Seek as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use nix::fcntl::{Flock, FlockArg};
use tokio::time::Instant;

/// Its name in the run directory.
const NAME: &str = "lock";
/// One that is ending may take so long to be gone: its last words are said, its memory is given back.
const PATIENCE: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(50);

/// Held by this process.
#[derive(Debug)]
pub(super) struct Lock {
    _file: Flock<File>,
}

/// Why it is not ours.
#[derive(Debug, thiserror::Error)]
pub(super) enum LockError {
    /// Somebody has it.
    #[error(
        "{holder} works in {} already: end that one, or give this one another directory with --run-dir (and sockets, \
         ports and bpffs of its own)",
        dir.display()
    )]
    Held {
        /// Who.
        holder: String,
        /// Where.
        dir: PathBuf,
    },
    /// The file cannot be used.
    #[error("cannot lock {}: {cause}; the agent needs its run directory to itself and writable", path.display())]
    Unusable {
        /// Which.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
}

impl Lock {
    /// Takes it, waiting a moment for an agent that is ending.
    pub(super) async fn take(dir: &Path) -> Result<Self, LockError> {
        Self::take_within(dir, PATIENCE).await
    }

    async fn take_within(dir: &Path, patience: Duration) -> Result<Self, LockError> {
        let path = dir.join(NAME);
        let unusable = |cause| LockError::Unusable {
            path: path.clone(),
            cause,
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(unusable)?;
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let mut file = options
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path)
            .map_err(unusable)?;
        let until = Instant::now() + patience;
        let mut told = false;
        let mut file = loop {
            file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(locked) => break locked,
                Err((file, nix::Error::EWOULDBLOCK)) => file,
                Err((_, error)) => return Err(unusable(error.into())),
            };
            let holder = holder(&path);
            if Instant::now() >= until {
                let dir = dir.to_owned();
                return Err(LockError::Held { holder, dir });
            }
            if !std::mem::replace(&mut told, true) {
                tracing::info!(holder, dir = %dir.display(), "waiting for another agent to end");
            }
            tokio::time::sleep(PAUSE).await;
        };
        let mut name = || -> io::Result<()> {
            file.set_len(0)?;
            file.rewind()?;
            writeln!(file, "{}", std::process::id())
        };
        // Without a number it is a lock all the same.
        if let Err(error) = name() {
            tracing::debug!(%error, path = %path.display(), "the lock does not name its holder");
        }
        Ok(Self { _file: file })
    }
}

/// Who has the lock, as the file says.
fn holder(path: &Path) -> String {
    let mut text = String::new();
    let read = File::open(path).and_then(|file| file.take(32).read_to_string(&mut text));
    match read.ok().and_then(|_| text.trim().parse::<u32>().ok()) {
        Some(pid) => format!("another agent, process {pid},"),
        None => "another agent".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Self {
            let name = format!("culvert-lock-{name}-{}", std::process::id());
            Self(std::env::temp_dir().join(name))
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap_or_default();
        }
    }

    const SOON: Duration = Duration::from_millis(200);

    #[tokio::test]
    async fn the_second_is_told_who_is_there_and_what_to_do() {
        let dir = Dir::new("second");
        let first = Lock::take_within(&dir.0, SOON).await.unwrap();
        let refused = Lock::take_within(&dir.0, SOON).await.unwrap_err();
        let said = refused.to_string();
        assert!(
            said.contains(&format!("process {}", std::process::id())),
            "{said}"
        );
        assert!(said.contains("--run-dir"), "{said}");
        drop(first);
        Lock::take_within(&dir.0, SOON).await.unwrap();
    }

    #[tokio::test]
    async fn one_that_is_ending_is_waited_for() {
        let dir = Dir::new("ending");
        let first = Lock::take_within(&dir.0, SOON).await.unwrap();
        let later = tokio::spawn(async move {
            tokio::time::sleep(SOON).await;
            drop(first);
        });
        Lock::take(&dir.0).await.unwrap();
        later.await.unwrap();
    }

    #[tokio::test]
    async fn what_cannot_be_locked_is_named() {
        let dir = Dir::new("unusable");
        fs::write(&dir.0, "a file").unwrap();
        let said = Lock::take_within(&dir.0, SOON).await.unwrap_err();
        assert!(said.to_string().contains("lock: "), "{said}");
        fs::remove_file(&dir.0).unwrap();
    }
}
