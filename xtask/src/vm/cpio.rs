//! Writes cpio archives in the "newc" format, which is what the kernel unpacks as an initramfs. It knows the format
//! and nothing of what goes in; ownership is always root and times are always zero, so equal input gives equal bytes.
//!
//! Format: <https://docs.kernel.org/driver-api/early-userspace/buffer-format.html>

use std::{
    fs::File,
    io::{self, Read as _, Write},
    path::Path,
};

use anyhow::{Context as _, Result};

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// An archive being written. Directories must be added before what lies in them: the kernel creates no parents.
pub(crate) struct Archive<W> {
    out: W,
    entries: u32,
}

/// What a header says beside the name.
#[derive(Default)]
struct Entry {
    mode: u32,
    size: u32,
    device: (u32, u32),
}

impl<W: Write> Archive<W> {
    pub(crate) fn new(out: W) -> Self {
        Self { out, entries: 0 }
    }

    /// Adds a directory, with its permission bits.
    pub(crate) fn directory(&mut self, name: &str, permissions: u32) -> Result<()> {
        let entry = Entry {
            mode: DIRECTORY | permissions,
            ..Entry::default()
        };
        self.header(name, &entry)
    }

    /// Adds a file from memory, with its permission bits.
    pub(crate) fn file(&mut self, name: &str, permissions: u32, content: &[u8]) -> Result<()> {
        let entry = Entry {
            mode: REGULAR | permissions,
            size: size(name, content.len())?,
            ..Entry::default()
        };
        self.header(name, &entry)?;
        self.out.write_all(content)?;
        self.pad(content.len())
    }

    /// Adds a file from the disk, with its permission bits here.
    pub(crate) fn copy(&mut self, name: &str, permissions: u32, source: &Path) -> Result<()> {
        let mut content = Vec::new();
        File::open(source)
            .and_then(|mut file| file.read_to_end(&mut content))
            .with_context(|| format!("cannot read {}", source.display()))?;
        self.file(name, permissions, &content)
    }

    /// Adds a symbolic link.
    pub(crate) fn symlink(&mut self, name: &str, target: &str) -> Result<()> {
        let entry = Entry {
            mode: SYMLINK | 0o777,
            size: size(name, target.len())?,
            ..Entry::default()
        };
        self.header(name, &entry)?;
        self.out.write_all(target.as_bytes())?;
        self.pad(target.len())
    }

    /// Adds a character device, which takes no privilege here.
    pub(crate) fn character_device(
        &mut self,
        name: &str,
        permissions: u32,
        device: (u32, u32),
    ) -> Result<()> {
        let entry = Entry {
            mode: CHARACTER_DEVICE | permissions,
            device,
            ..Entry::default()
        };
        self.header(name, &entry)
    }

    /// Writes the trailer. Without it the kernel takes the archive for damaged.
    pub(crate) fn finish(mut self) -> Result<W> {
        self.header("TRAILER!!!", &Entry::default())?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn header(&mut self, name: &str, entry: &Entry) -> Result<()> {
        self.entries += 1;
        let name_size = size(name, name.len() + 1)?;
        // ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        let fields = [
            self.entries,
            entry.mode,
            0,
            0,
            1,
            0,
            entry.size,
            0,
            0,
            entry.device.0,
            entry.device.1,
            name_size,
            0,
        ];
        let mut header = String::from("070701");
        for field in fields {
            header.push_str(&format!("{field:08x}"));
        }
        header.push_str(name);
        header.push('\0');
        self.out.write_all(header.as_bytes())?;
        self.pad(header.len())
    }

    fn pad(&mut self, written: usize) -> Result<()> {
        let zeroes = written.next_multiple_of(4) - written;
        Ok(self.out.write_all(&[0; 3][..zeroes])?)
    }
}

fn size(name: &str, bytes: usize) -> Result<u32> {
    u32::try_from(bytes)
        .map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))
        .with_context(|| format!("{name} is too large for an initramfs: a file may have 4 GiB"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Name, mode, content, device.
    type Read = (String, u32, Vec<u8>, (u32, u32));

    /// Reads an archive back by the format's own description, independent of the writer.
    fn read(bytes: &[u8]) -> Vec<Read> {
        let mut entries = Vec::new();
        let mut at = 0;
        loop {
            assert_eq!(&bytes[at..at + 6], b"070701", "magic at {at}");
            let field = |n: usize| {
                let start = at + 6 + 8 * n;
                u32::from_str_radix(str::from_utf8(&bytes[start..start + 8]).unwrap(), 16).unwrap()
            };
            let (mode, size, name_size) = (field(1), field(6) as usize, field(11) as usize);
            let name_at = at + 110;
            assert_eq!(bytes[name_at + name_size - 1], 0, "the name ends in NUL");
            let name = str::from_utf8(&bytes[name_at..name_at + name_size - 1]).unwrap();
            let data_at = (name_at + name_size).next_multiple_of(4);
            if name == "TRAILER!!!" {
                assert_eq!(data_at, bytes.len(), "nothing follows the trailer");
                return entries;
            }
            let data = bytes[data_at..data_at + size].to_vec();
            entries.push((name.to_owned(), mode, data, (field(9), field(10))));
            at = (data_at + size).next_multiple_of(4);
        }
    }

    #[test]
    fn every_kind_of_entry_reads_back() {
        let mut archive = Archive::new(Vec::new());
        archive.directory("dev", 0o755).unwrap();
        archive
            .character_device("dev/console", 0o600, (5, 1))
            .unwrap();
        for length in 0..9 {
            let content = vec![b'x'; length];
            archive
                .file(&"n".repeat(length + 1), 0o644, &content)
                .unwrap();
        }
        archive.symlink("sh", "/bin/busybox").unwrap();
        let entries = read(&archive.finish().unwrap());

        assert_eq!(entries.len(), 12);
        assert_eq!(entries[0], ("dev".into(), 0o040_755, vec![], (0, 0)));
        assert_eq!(
            entries[1],
            ("dev/console".into(), 0o020_600, vec![], (5, 1))
        );
        for length in 0..9 {
            let (name, mode, content, _) = &entries[2 + length];
            assert_eq!(
                (name.len(), *mode, content.len()),
                (length + 1, 0o100_644, length)
            );
        }
        assert_eq!(
            entries[11],
            ("sh".into(), 0o120_777, b"/bin/busybox".to_vec(), (0, 0))
        );
    }

    #[test]
    fn a_file_from_the_disk_keeps_its_bytes() {
        let mut archive = Archive::new(Vec::new());
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
        archive.copy("copy", 0o755, &source).unwrap();
        let entries = read(&archive.finish().unwrap());
        assert_eq!(entries[0].1, 0o100_755);
        assert_eq!(entries[0].2, std::fs::read(source).unwrap());
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = Archive::new(Vec::new())
            .copy("copy", 0o755, Path::new("/nonexistent/file"))
            .unwrap_err();
        assert!(
            format!("{error:#}").contains("/nonexistent/file"),
            "{error:#}"
        );
    }
}
