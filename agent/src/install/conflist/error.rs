//! Why a configuration cannot be edited, each with what to do about it.

use culvert_cni::config::VERSIONS;

use super::{MAX_BYTES, PLUGIN};

/// Why a configuration cannot be edited.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No byte in it, or blanks only.
    #[error("the file is empty; let the cluster's CNI write its configuration, or remove the file")]
    Empty,
    /// Above [`MAX_BYTES`].
    #[error(
        "the file has {0} bytes, more than the {MAX_BYTES} that are read; a CNI configuration has a few hundred: remove \
         what does not belong there"
    )]
    TooLarge(u64),
    /// Starts with a byte order mark, on which Go's JSON parser, and so every runtime, fails.
    #[error(
        "the file starts with a byte order mark, which container runtimes refuse; save it as plain UTF-8"
    )]
    ByteOrderMark,
    /// Some byte is no UTF-8.
    #[error("byte {0} is not UTF-8; save the file as UTF-8")]
    NotUtf8(usize),
    /// The text ends in the middle.
    #[error(
        "the text is cut off after line {0}; whoever writes the file has not finished, or failed: write it anew"
    )]
    CutOff(usize),
    /// Not JSON.
    #[error("not JSON: {0}; correct it, container runtimes refuse it too")]
    NotJson(String),
    /// JSON, but no object.
    #[error("not a JSON object; a CNI configuration is one")]
    NotAnObject,
    /// A key that counts is there twice: runtimes take the last, people read the first.
    #[error("key `{0}` is there twice, and which one counts differs between readers; remove one")]
    DuplicateKey(String),
    /// No `name`.
    #[error("no network `name`, which container runtimes require; add one")]
    NoName,
    /// A list without plugins.
    #[error("no `plugins`; a .conflist needs a list with at least one")]
    NoPlugins,
    /// Nothing would be left beside our own entry.
    #[error("no plugin but ours; let the cluster's CNI write its configuration")]
    OnlyOurs,
    /// A plugin that is no object.
    #[error("plugin {0} is not an object; correct it")]
    PluginNotAnObject(usize),
    /// A plugin, or a lone configuration, without `type`.
    #[error("no `type` in {0}, so a runtime cannot tell which plugin to run; add it")]
    NoType(String),
    /// A list in a file whose name says it is none.
    #[error(
        "a list of plugins in a file that is not called .conflist; container runtimes refuse that: rename the file"
    )]
    ListInConf,
    /// A version the plugin does not speak.
    #[error(
        "cniVersion {0}, but {PLUGIN} speaks {first} to {last}; set it to one of those in the CNI's own settings",
        first = VERSIONS[0],
        last = VERSIONS[VERSIONS.len() - 1]
    )]
    Version(String),
}
