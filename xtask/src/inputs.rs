//! What the eBPF object is made from: a hash over the sources, and where the object lies.
//!
//! Shared with `agent/build.rs` (which includes this file), so that "stale" means the same to both. It must stay
//! free of dependencies, and must not build or repair anything.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

/// The object's file name below the target directory.
pub(crate) const OBJECT: &str = "ebpf/culvert.bpf.o";

/// Where cargo puts its output: `CARGO_TARGET_DIR` (a relative one counts from the top of the tree), else `target`.
pub(crate) fn target_dir(root: &Path) -> PathBuf {
    match env::var_os("CARGO_TARGET_DIR") {
        Some(dir) if !dir.is_empty() => root.join(dir),
        _ => root.join("target"),
    }
}

/// The note beside the object that says what it was built from.
pub(crate) fn note_path(object: &Path) -> PathBuf {
    let mut name = object.as_os_str().to_owned();
    name.push(".inputs");
    PathBuf::from(name)
}

/// Reads one `key value` line of a note.
pub(crate) fn note_value<'a>(note: &'a str, key: &str) -> Option<&'a str> {
    note.lines()
        .filter_map(|line| line.split_once(' '))
        .find_map(|(name, value)| (name == key).then_some(value))
}

/// Every file the object is made from, sorted, relative to the top of the tree.
pub(crate) fn sources(root: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for name in ["ebpf/Cargo.toml", "ebpf/Cargo.lock", "ebpf/build.rs"] {
        if root.join(name).is_file() {
            files.push(PathBuf::from(name));
        }
    }
    walk(root, Path::new("ebpf/src"), &mut files)?;
    files.sort();
    Ok(files)
}

fn walk(root: &Path, dir: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(root.join(dir))? {
        let entry = entry?;
        let path = dir.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            walk(root, &path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    Ok(())
}

/// Hash over path and content of every source, as hex.
pub(crate) fn hash(root: &Path) -> io::Result<String> {
    let mut hash = Fnv::new();
    for path in sources(root)? {
        hash.field(path.as_os_str().as_encoded_bytes());
        hash.field(&fs::read(root.join(&path))?);
    }
    Ok(hash.hex())
}

/// FNV-1a, 128 bits: it has to notice edits, not to withstand an attacker, and a build script should need no crates.
pub(crate) struct Fnv(u128);

impl Fnv {
    pub(crate) const fn new() -> Self {
        Self(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d)
    }

    /// Adds one field; its length goes in first, so that two fields never run into one another.
    pub(crate) fn field(&mut self, bytes: &[u8]) {
        self.bytes(&(bytes.len() as u64).to_le_bytes());
        self.bytes(bytes);
    }

    fn bytes(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 ^= u128::from(*byte);
            self.0 = self
                .0
                .wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
        }
    }

    pub(crate) fn hex(&self) -> String {
        format!("{:032x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tree of its own for one test, removed when the test ends.
    struct Tree(PathBuf);

    impl Tree {
        fn new(name: &str, files: &[(&str, &str)]) -> Self {
            let root =
                env::temp_dir().join(format!("culvert-inputs-{name}-{}", std::process::id()));
            let tree = Self(root);
            for (path, content) in files {
                tree.write(path, content);
            }
            tree
        }

        fn write(&self, path: &str, content: &str) {
            let path = self.0.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }

        fn hash(&self) -> String {
            hash(&self.0).unwrap()
        }
    }

    impl Drop for Tree {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    const FILES: &[(&str, &str)] = &[
        ("ebpf/Cargo.toml", "[package]"),
        ("ebpf/Cargo.lock", ""),
        ("ebpf/src/main.rs", "a"),
        ("ebpf/src/deep/b.rs", "b"),
    ];

    #[test]
    fn hash_is_fnv_1a() {
        // The reference value of the empty input, and of "a" without our length field.
        assert_eq!(Fnv::new().hex(), "6c62272e07bb014262b821756295c58d");
        let mut hash = Fnv::new();
        hash.bytes(b"a");
        assert_eq!(hash.hex(), "d228cb696f1a8caf78912b704e4a8964");
    }

    #[test]
    fn fields_do_not_run_into_one_another() {
        let both = |a: &[u8], b: &[u8]| {
            let mut hash = Fnv::new();
            hash.field(a);
            hash.field(b);
            hash.hex()
        };
        assert_ne!(both(b"ab", b"c"), both(b"a", b"bc"));
    }

    #[test]
    fn every_edit_shows_and_the_place_does_not() {
        let tree = Tree::new("edit", FILES);
        let before = tree.hash();
        assert_eq!(Tree::new("elsewhere", FILES).hash(), before);

        for (path, _) in FILES {
            let edited = Tree::new("edited", FILES);
            edited.write(path, "edited");
            assert_ne!(edited.hash(), before, "{path}");
        }
        tree.write("ebpf/src/deep/c.rs", "");
        assert_ne!(tree.hash(), before, "a new file, even an empty one");
    }

    #[test]
    fn what_is_not_an_input_does_not_count() {
        let tree = Tree::new("other", FILES);
        let before = tree.hash();
        tree.write("ebpf/target/x.rs", "x");
        tree.write("ebpf/src/.main.rs.swp", "x");
        assert_eq!(tree.hash(), before);
    }

    #[test]
    fn missing_sources_are_an_error() {
        assert!(hash(Path::new("/nonexistent")).is_err());
    }

    #[test]
    fn a_note_is_read_by_key() {
        let note = "sources abc\ntoolchain def\n";
        assert_eq!(note_value(note, "sources"), Some("abc"));
        assert_eq!(note_value(note, "toolchain"), Some("def"));
        assert_eq!(note_value(note, "other"), None);
        assert_eq!(note_path(Path::new("/t/o")), Path::new("/t/o.inputs"));
    }
}
