//! A lab's directory below bpffs, and the mount itself where the machine has none. Knows nothing of what is pinned.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};

use crate::paths::mount_points;

const DEFAULT: &str = "/sys/fs/bpf";

/// The bpffs mount, made (and announced) if there is none.
pub(crate) fn root() -> Result<PathBuf> {
    let mounts = mount_points("bpf")?;
    if let Some(dir) = mounts
        .iter()
        .find(|dir| dir.as_path() == Path::new(DEFAULT))
        .or(mounts.first())
    {
        return Ok(dir.clone());
    }
    eprintln!("lab: mounting bpffs at {DEFAULT}");
    mount(
        Some("bpf"),
        DEFAULT,
        Some("bpf"),
        MsFlags::empty(),
        Some("mode=0700"),
    )
    .with_context(|| {
        format!("mounting bpffs at {DEFAULT}: run as root on a kernel with CONFIG_BPF_SYSCALL")
    })?;
    Ok(DEFAULT.into())
}

/// Every path below `dir`, relative to it, sorted. A directory that is gone holds nothing.
pub(crate) fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut open = vec![dir.to_path_buf()];
    while let Some(next) = open.pop() {
        let entries = match fs::read_dir(&next) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error).with_context(|| format!("listing {}", next.display())),
        };
        for entry in entries {
            let entry = entry.with_context(|| format!("listing {}", next.display()))?;
            if entry
                .file_type()
                .with_context(|| format!("looking at {}", entry.path().display()))?
                .is_dir()
            {
                open.push(entry.path());
            }
            found.push(
                entry
                    .path()
                    .strip_prefix(dir)
                    .map(Path::to_path_buf)
                    .unwrap_or(entry.path()),
            );
        }
    }
    found.sort();
    Ok(found)
}
