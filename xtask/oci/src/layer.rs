//! One layer: files, links and directories, sorted by name, owned by root, all of one time. Where contents come from is
//! the caller's business.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use tar::{Builder, EntryType, Header};

/// What will be in a layer.
#[derive(Debug, Clone, Default)]
pub struct Layer(BTreeMap<String, Entry>);

#[derive(Debug, Clone)]
enum Entry {
    Directory(u32),
    File(u32, Vec<u8>),
    Link(String),
}

impl Layer {
    /// Adds a file; directories above it come by themselves.
    pub fn file(&mut self, path: &str, mode: u32, content: Vec<u8>) -> &mut Self {
        self.add(path, Entry::File(mode, content))
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, path: &str, target: &str) -> &mut Self {
        self.add(path, Entry::Link(target.to_owned()))
    }

    /// Adds a directory that is to be there though nothing is in it, or that is not readable for all.
    pub fn directory(&mut self, path: &str, mode: u32) -> &mut Self {
        self.add(path, Entry::Directory(mode))
    }

    fn add(&mut self, path: &str, entry: Entry) -> &mut Self {
        let path = path.trim_matches('/');
        for above in Path::new(path).ancestors().skip(1) {
            if !above.as_os_str().is_empty() {
                self.0
                    .entry(above.display().to_string())
                    .or_insert(Entry::Directory(0o755));
            }
        }
        self.0.insert(path.to_owned(), entry);
        self
    }

    /// The tar of it; `time` is in seconds since 1970.
    pub(crate) fn tar(&self, time: u64) -> Result<Vec<u8>> {
        let mut tar = Builder::new(Vec::new());
        for (path, entry) in &self.0 {
            ensure!(
                !path.split('/').any(|part| part == ".."),
                "{path} leads out of the image"
            );
            let mut header = Header::new_gnu();
            header.set_mtime(time);
            header.set_uid(0);
            header.set_gid(0);
            let added = match entry {
                Entry::Directory(mode) => {
                    header.set_entry_type(EntryType::Directory);
                    header.set_mode(*mode);
                    header.set_size(0);
                    tar.append_data(&mut header, format!("{path}/"), std::io::empty())
                }
                Entry::File(mode, content) => {
                    header.set_mode(*mode);
                    header.set_size(content.len() as u64);
                    tar.append_data(&mut header, path, content.as_slice())
                }
                Entry::Link(target) => {
                    header.set_entry_type(EntryType::Symlink);
                    header.set_mode(0o777);
                    header.set_size(0);
                    tar.append_link(&mut header, path, target)
                }
            };
            added.with_context(|| format!("adding {path}"))?;
        }
        tar.into_inner().context("finishing a layer")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(tar: &[u8]) -> Vec<String> {
        tar::Archive::new(tar)
            .entries()
            .unwrap()
            .map(|entry| entry.unwrap().path().unwrap().display().to_string())
            .collect()
    }

    #[test]
    fn order_of_adding_does_not_show() {
        let mut one = Layer::default();
        one.file("/b/c", 0o644, b"c".to_vec())
            .file("a", 0o755, b"a".to_vec());
        let mut two = Layer::default();
        two.file("a", 0o755, b"a".to_vec())
            .file("b/c", 0o644, b"c".to_vec());
        assert_eq!(one.tar(7).unwrap(), two.tar(7).unwrap());
        assert_eq!(names(&one.tar(7).unwrap()), ["a", "b/", "b/c"]);
        assert_ne!(one.tar(7).unwrap(), one.tar(8).unwrap());
    }

    #[test]
    fn a_directory_keeps_its_mode_whatever_is_put_into_it() {
        let mut layer = Layer::default();
        layer
            .directory("tmp", 0o1777)
            .file("tmp/x", 0o644, Vec::new());
        let tar = layer.tar(0).unwrap();
        let mut archive = tar::Archive::new(tar.as_slice());
        let mode = archive
            .entries()
            .unwrap()
            .next()
            .unwrap()
            .unwrap()
            .header()
            .mode();
        assert_eq!(mode.unwrap(), 0o1777);
    }

    #[test]
    fn nothing_leads_out() {
        let mut layer = Layer::default();
        layer.file("a/../../b", 0o644, Vec::new());
        assert!(layer.tar(0).is_err());
    }
}
