//! Changing files so that a crash at any point leaves the old or the new, never half of one.
//!
//! Knows paths, bytes and modes, and nothing of what they mean.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufReader, Read, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, fchown, symlink},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use nix::fcntl::{AT_FDCWD, Flock, FlockArg, RenameFlags, renameat2};

use super::error::Error;

/// Temporary files: no runtime takes them for a configuration, and we know them for ours.
const TEMP_PREFIX: &str = ".culvert-";
const TEMP_SUFFIX: &str = ".tmp";

/// A temporary file next to `target`, locked so that no sweep takes it, gone with the value.
struct Temp {
    path: PathBuf,
    file: Flock<File>,
}

impl Drop for Temp {
    fn drop(&mut self) {
        // After a rename there is none any more.
        let _ = fs::remove_file(&self.path);
    }
}

fn directory(path: &Path) -> &Path {
    path.parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
}

fn temp(target: &Path) -> Result<Temp, Error> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let path = directory(target).join(format!(
        "{TEMP_PREFIX}{}-{number}{TEMP_SUFFIX}",
        std::process::id()
    ));
    let failed = |e| Error::system("write", &path, e);
    // One of an earlier process with the same id.
    let _ = fs::remove_file(&path);
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)
        .map_err(failed)?;
    let file =
        Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, e)| failed(e.into()))?;
    Ok(Temp { path, file })
}

/// Writes `content` to `target` if what is there is still `before`.
pub(super) fn write(
    target: &Path,
    before: Option<&[u8]>,
    content: &[u8],
    mode: u32,
    owner: Option<(u32, u32)>,
) -> Result<(), Error> {
    let temp = temp(target)?;
    let failed = |e| Error::system("write", target, e);
    let mut file: &File = &temp.file;
    file.write_all(content).map_err(failed)?;
    if let Some((uid, gid)) = owner {
        let metadata = file.metadata().map_err(failed)?;
        if (metadata.uid(), metadata.gid()) != (uid, gid) {
            match fchown(file, Some(uid), Some(gid)) {
                // The agent has given CAP_CHOWN up. Runtimes read configurations as root, whoever owns them; a pod that
                // starts outside the mesh is worse than an owner that changes.
                Err(e) if e.raw_os_error() == Some(libc::EPERM) => tracing::warn!(
                    file = %target.display(),
                    "it belonged to user {uid}, group {gid}, and to {} from now on: this process may not give files away;                      `chown {uid}:{gid}` it if somebody but root has to write it",
                    metadata.uid()
                ),
                other => other.map_err(failed)?,
            }
        }
    }
    // Not left to the umask; and after the owner, whose change clears bits.
    file.set_permissions(fs::Permissions::from_mode(mode))
        .map_err(failed)?;
    file.sync_all().map_err(failed)?;
    match before {
        None => publish_new(&temp.path, target)?,
        Some(before) => exchange(&temp.path, target, before)?,
    }
    sync_directory(target)
}

fn rename(from: &Path, to: &Path, flags: RenameFlags) -> nix::Result<()> {
    renameat2(AT_FDCWD, from, AT_FDCWD, to, flags)
}

/// File systems that know no flags of rename.
fn unsupported(e: nix::Error) -> bool {
    matches!(
        e,
        nix::Error::EINVAL | nix::Error::ENOSYS | nix::Error::EOPNOTSUPP
    )
}

fn publish_new(temp: &Path, target: &Path) -> Result<(), Error> {
    let failed = |e| Error::system("write", target, e);
    match rename(temp, target, RenameFlags::RENAME_NOREPLACE) {
        Err(nix::Error::EEXIST) => Err(Error::changed("write", target)),
        Err(e) if unsupported(e) => {
            if target.symlink_metadata().is_ok() {
                return Err(Error::changed("write", target));
            }
            fs::rename(temp, target).map_err(failed)
        }
        other => other.map_err(|e| failed(e.into())),
    }
}

/// Puts `temp` in the place of `target`. What was there comes out in exchange, so that a change which another program
/// made since we read the file is seen and given back, not lost.
fn exchange(temp: &Path, target: &Path, before: &[u8]) -> Result<(), Error> {
    let failed = |e| Error::system("write", target, e);
    let same = |path: &Path| fs::read(path).is_ok_and(|there| there == before);
    if !same(target) {
        return Err(Error::changed("write", target));
    }
    match rename(temp, target, RenameFlags::RENAME_EXCHANGE) {
        Ok(()) if same(temp) => Ok(()),
        Ok(()) => {
            rename(temp, target, RenameFlags::RENAME_EXCHANGE).map_err(|e| failed(e.into()))?;
            Err(Error::changed("write", target))
        }
        Err(nix::Error::ENOENT) => Err(Error::changed("write", target)),
        Err(e) if unsupported(e) => fs::rename(temp, target).map_err(failed),
        Err(e) => Err(failed(e.into())),
    }
}

/// Removes `path` if it still holds `before`. That it is gone is what was wanted.
pub(super) fn remove(path: &Path, before: Option<&[u8]>) -> Result<(), Error> {
    let failed = |e| Error::system("remove", path, e);
    if let Some(before) = before {
        match fs::read(path) {
            Ok(there) if there == before => {}
            Ok(_) => return Err(Error::changed("remove", path)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(failed(e)),
        }
    }
    match fs::remove_file(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(failed),
    }?;
    sync_directory(path)
}

/// Makes `path` a link to `to` again.
pub(super) fn link(path: &Path, to: &Path) -> Result<(), Error> {
    symlink(to, path).map_err(|e| Error::system("link", path, e))?;
    sync_directory(path)
}

/// Copies a program, if it is another than the one that is there. Running ones keep theirs.
pub(super) fn program(from: &Path, to: &Path) -> Result<(), Error> {
    fs::create_dir_all(directory(to)).map_err(|e| Error::system("create", directory(to), e))?;
    let mut source = open_program(from)?;
    let temp = temp(to)?;
    let failed = |e| Error::system("write", to, e);
    let mut file: &File = &temp.file;
    io::copy(&mut source, &mut file).map_err(failed)?;
    file.set_permissions(fs::Permissions::from_mode(0o755))
        .map_err(failed)?;
    file.sync_all().map_err(failed)?;
    fs::rename(&temp.path, to).map_err(failed)?;
    sync_directory(to)
}

fn open_program(path: &Path) -> Result<File, Error> {
    File::open(path).map_err(|e| {
        let mut error = Error::system("read", path, e);
        error.cure =
            "the plugin belongs beside `culvert`; name its place with --plugin-binary".to_owned();
        error
    })
}

/// What changes when a file does: device, inode, size, mode, times of content and inode.
pub(super) type Stamp = (u64, u64, u64, u32, (i64, i64), (i64, i64));

/// The stamp of a file that is there.
pub(super) fn stamp(path: &Path) -> Option<Stamp> {
    let m = fs::metadata(path).ok()?;
    let times = ((m.mtime(), m.mtime_nsec()), (m.ctime(), m.ctime_nsec()));
    Some((m.dev(), m.ino(), m.len(), m.mode(), times.0, times.1))
}

/// Whether `there` is the program `wanted`, executable and all.
pub(super) fn is_program(wanted: &Path, there: &Path) -> Result<bool, Error> {
    let source = open_program(wanted)?;
    let failed = |e| Error::system("read", there, e);
    let target = match File::open(there) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(failed(e)),
    };
    let (a, b) = (
        source.metadata().map_err(failed)?,
        target.metadata().map_err(failed)?,
    );
    if a.len() != b.len() || !b.is_file() || b.mode() & 0o7777 != 0o755 {
        return Ok(false);
    }
    equal(
        BufReader::with_capacity(1 << 16, source),
        BufReader::with_capacity(1 << 16, target),
    )
    .map_err(failed)
}

fn equal(mut a: impl Read, mut b: impl Read) -> io::Result<bool> {
    let (mut left, mut right) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    loop {
        let n = a.read(&mut left)?;
        let Some(part) = right.get_mut(..n) else {
            return Ok(false);
        };
        if n == 0 {
            return Ok(b.read(&mut right)? == 0);
        }
        match b.read_exact(part) {
            Ok(()) if left.get(..n) == Some(&*part) => {}
            Ok(()) => return Ok(false),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
            Err(e) => return Err(e),
        }
    }
}

/// Temporary files of ours in `dir` that nobody is writing any more.
pub(super) fn stale(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    let ours = entries.flatten().filter(|e| {
        let name = e.file_name();
        let name = name.to_string_lossy();
        name.starts_with(TEMP_PREFIX) && name.ends_with(TEMP_SUFFIX)
    });
    let mut found: Vec<PathBuf> = ours.map(|e| e.path()).filter(|p| is_stale(p)).collect();
    found.sort();
    found
}

fn is_stale(path: &Path) -> bool {
    File::open(path).is_ok_and(|file| Flock::lock(file, FlockArg::LockExclusiveNonblock).is_ok())
}

/// Makes and removes a file in `dir`, for those who wait for something to happen there.
pub(super) fn ripple(dir: &Path) -> Result<(), Error> {
    temp(&dir.join("any")).map(drop)
}

/// The rename itself must survive a power cut.
fn sync_directory(path: &Path) -> Result<(), Error> {
    let dir = directory(path);
    File::open(dir)
        .and_then(|d| d.sync_all())
        .map_err(|e| Error::system("sync", dir, e))
}
