//! The plugin's log: a file of bounded size, one JSON object a line. A log that cannot be written never fails a call.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use crate::api::LogRecord;

/// At this size the file becomes `FILE.1`, in place of the one before.
pub const MAX_FILE: u64 = 1 << 20;

/// Appends a record.
///
/// # Errors
///
/// For tests to look at: a call goes on without its log.
pub fn append(path: &Path, record: &LogRecord) -> io::Result<()> {
    // Opening a pipe would wait for its reader.
    if fs::metadata(path).is_ok_and(|data| !data.is_file()) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{} is no file", path.display()),
        ));
    }
    let mut file = open(path)?;
    if file.metadata()?.len() >= MAX_FILE && rotate(path, &file)? {
        file = open(path)?;
    }
    let mut line = serde_json::to_vec(record)?;
    line.push(b'\n');
    // One write: lines of plugins that run at the same time do not mix.
    file.write_all(&line)
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
}

/// Moves a full file aside. False when another plugin is doing or has done it.
fn rotate(path: &Path, file: &File) -> io::Result<bool> {
    if file.try_lock().is_err() {
        return Ok(false);
    }
    let (here, there) = (file.metadata()?, fs::metadata(path)?);
    if (here.dev(), here.ino()) == (there.dev(), there.ino()) {
        let mut older = path.as_os_str().to_owned();
        older.push(".1");
        fs::rename(path, PathBuf::from(older))?;
    }
    Ok(true)
}
