//! The fuzz targets as functions: each takes bytes from outside and must not panic, whatever they are.
//!
//! A new target is a file here, a line in [`TARGETS`], a program in `fuzz_targets/`, a `[[bin]]` and a corpus of its name.

mod cni_stdin;
mod conflist;
mod decisions;
mod procfs;
mod zds_frame;

pub use cni_stdin::cni_stdin;
pub use conflist::conflist;
pub use decisions::decisions;
pub use procfs::procfs;
pub use zds_frame::zds_frame;

/// A target: its name, and what takes the bytes.
pub type Target = (&'static str, fn(&[u8]));

/// Every target.
pub const TARGETS: &[Target] = &[
    ("cni_stdin", cni_stdin),
    ("conflist", conflist),
    ("decisions", decisions),
    ("procfs", procfs),
    ("zds_frame", zds_frame),
];
