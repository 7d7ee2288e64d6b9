//! One change of one file, as a value and as text for people.
//!
//! Carries nothing out.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
};

use serde::{Serialize, Serializer};
use similar::TextDiff;

/// One change of one file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "operation", rename_all = "kebab-case")]
pub enum Operation {
    /// Remove a temporary file of ours that was never finished.
    Sweep {
        /// The file.
        path: PathBuf,
    },
    /// Put the plugin in its place.
    InstallPlugin {
        /// The one to copy.
        from: PathBuf,
        /// Its place.
        path: PathBuf,
    },
    /// Write a configuration.
    Write {
        /// The file, or what a link of that name leads to.
        path: PathBuf,
        /// What has to be there for the change to be the right one; none for a file that must not be there.
        #[serde(serialize_with = "as_text")]
        before: Option<Vec<u8>>,
        /// What will be there.
        after: String,
        /// Permission bits.
        mode: u32,
        /// User and group; none for our own.
        owner: Option<(u32, u32)>,
        /// Why.
        why: String,
    },
    /// Make a symbolic link again.
    Link {
        /// The link.
        path: PathBuf,
        /// Where it leads.
        to: PathBuf,
    },
    /// Remove a file.
    Remove {
        /// The file.
        path: PathBuf,
        /// What has to be in it; none for any content.
        #[serde(serialize_with = "as_text")]
        before: Option<Vec<u8>>,
        /// Why.
        why: String,
    },
}

fn as_text<S: Serializer>(bytes: &Option<Vec<u8>>, serializer: S) -> Result<S::Ok, S::Error> {
    bytes
        .as_ref()
        .map(|b| String::from_utf8_lossy(b))
        .serialize(serializer)
}

impl Operation {
    /// The file that changes.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::Sweep { path }
            | Self::InstallPlugin { path, .. }
            | Self::Write { path, .. }
            | Self::Link { path, .. }
            | Self::Remove { path, .. } => path,
        }
    }

    /// The change for people: a line of what and why, and a unified diff.
    #[must_use]
    pub fn describe(&self) -> String {
        let mut text = String::new();
        match self {
            Self::Sweep { path } => {
                let _ = writeln!(
                    text,
                    "remove {}: a temporary file of ours that was never finished",
                    path.display()
                );
            }
            Self::InstallPlugin { from, path } => {
                let _ = writeln!(
                    text,
                    "copy {} to {} (mode 0755)",
                    from.display(),
                    path.display()
                );
            }
            Self::Link { path, to } => {
                let _ = writeln!(text, "link {} to {}", path.display(), to.display());
            }
            Self::Write {
                path,
                before,
                after,
                mode,
                why,
                ..
            } => {
                let verb = if before.is_some() { "write" } else { "create" };
                let _ = writeln!(text, "{verb} {} (mode {mode:04o}): {why}", path.display());
                text.push_str(&diff(path, before.as_deref(), Some(after)));
            }
            Self::Remove { path, before, why } => {
                let _ = writeln!(text, "remove {}: {why}", path.display());
                if before.is_some() {
                    text.push_str(&diff(path, before.as_deref(), None));
                }
            }
        }
        text
    }
}

fn diff(path: &Path, before: Option<&[u8]>, after: Option<&str>) -> String {
    let name = path.display().to_string();
    let side = |there: bool| if there { name.as_str() } else { "/dev/null" };
    let old = String::from_utf8_lossy(before.unwrap_or_default());
    let new = after.unwrap_or_default();
    TextDiff::from_lines(old.as_ref(), new)
        .unified_diff()
        .header(side(before.is_some()), side(after.is_some()))
        .to_string()
}
