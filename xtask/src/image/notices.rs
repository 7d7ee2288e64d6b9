//! The licence texts that go with the image: ours, and those of every crate in it, as their authors wrote them.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{Context as _, Result};

use super::components::{Components, Id};
use crate::project::Project;

/// Ours, where they are in the tree and what they are called in the image.
const OURS: [(&str, &str); 4] = [
    ("LICENSE", "LICENSE"),
    ("LICENSE-APACHE", "LICENSE-APACHE"),
    ("ebpf/LICENSE-GPL-2.0", "LICENSE-GPL-2.0"),
    ("ebpf/LICENSE-BSD-2-Clause", "LICENSE-BSD-2-Clause"),
];

/// File names and contents.
pub(super) fn texts(project: &Project, components: &Components) -> Result<Vec<(String, String)>> {
    let mut files = Vec::new();
    for (from, to) in OURS {
        let path = project.root.join(from);
        let text =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        files.push((to.to_owned(), text));
    }
    files.push(("THIRD-PARTY".to_owned(), third_party(components)?));
    Ok(files)
}

fn third_party(components: &Components) -> Result<String> {
    let mut text = String::from(
        "What these programs consist of, and under which licence. A text that several share is printed once.\n\
         Beside the crates below, each program is linked to Rust's standard library (MIT OR Apache-2.0), the GNU C library\n\
         (LGPL-2.1-or-later) and GCC's run-time library (GPL-3.0-or-later WITH GCC-exception-3.1).\n\
         The certificates are Mozilla's (CDLA-Permissive-2.0).\n\n",
    );
    let mut shared: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (id, component) in &components.0 {
        text += &format!("{}: {}\n", called(id), component.licence);
        if component.checksum.is_none() {
            continue;
        }
        for found in licences_in(&component.dir)? {
            shared.entry(found).or_default().push(called(id));
        }
    }
    let mut texts: Vec<(Vec<String>, String)> =
        shared.into_iter().map(|(text, of)| (of, text)).collect();
    texts.sort();
    for (of, licence) in texts {
        text += &format!(
            "\n{}\n{}\n\n{}\n",
            "=".repeat(80),
            of.join(", "),
            licence.trim()
        );
    }
    Ok(text)
}

fn called(id: &Id) -> String {
    format!("{} {}", id.0, id.1)
}

/// Texts that lie at the top of a crate.
fn licences_in(dir: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let entries = fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))?;
    for entry in entries {
        let path = entry?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .to_uppercase();
        let is_one = [
            "LICENSE",
            "LICENCE",
            "COPYING",
            "COPYRIGHT",
            "NOTICE",
            "UNLICENSE",
        ]
        .iter()
        .any(|start| name.starts_with(start));
        if is_one && path.is_file() {
            let text =
                fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            found.push(String::from_utf8_lossy(&text).replace("\r\n", "\n"));
        }
    }
    found.sort();
    Ok(found)
}
