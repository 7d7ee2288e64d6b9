//! Writing a file so that others see it old or new and never half; where asked, also across a crash.
//!
//! It knows nothing of what is written.

use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

/// Replaces `path` by a file of this content and mode: a temporary neighbour, flushed to disk, then renamed.
///
/// # Errors
///
/// The first step that fails; the temporary file is removed then, and `path` is as it was.
pub fn write(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    put(path, content, mode, File::sync_all)?;
    match path.parent() {
        // Else the rename itself may be forgotten by a power cut.
        Some(dir) if !dir.as_os_str().is_empty() => File::open(dir)?.sync_all(),
        _ => Ok(()),
    }
}

/// Like [`write()`], but waits for no disk: a power cut may take the file away, or all that is in it.
///
/// # Errors
///
/// As with [`write()`].
pub fn replace(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    put(path, content, mode, |_| Ok(()))
}

fn put(
    path: &Path,
    content: &[u8],
    mode: u32,
    flush: impl Fn(&File) -> io::Result<()>,
) -> io::Result<()> {
    let temporary = neighbour(path)?;
    let result = fill(&temporary, content, mode)
        .and_then(|file| flush(&file))
        .and_then(|()| fs::rename(&temporary, path));
    if result.is_err() {
        // Its own failure would hide the one that matters.
        let _removed = fs::remove_file(&temporary);
    }
    result
}

fn fill(path: &Path, content: &[u8], mode: u32) -> io::Result<File> {
    // One that was left by a process of our number, long dead.
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)?;
    file.write_all(content)?;
    // The umask does not get a say.
    file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(mode))?;
    Ok(file)
}

/// `.NAME.PID.tmp` beside it: hidden, so that nobody takes it for a configuration.
fn neighbour(path: &Path) -> io::Result<PathBuf> {
    let name = path.file_name().ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{} names no file", path.display()),
        )
    })?;
    let mut hidden = OsString::from(".");
    hidden.push(name);
    hidden.push(format!(".{}.tmp", std::process::id()));
    Ok(path.with_file_name(hidden))
}
