//! The fuzz targets as functions: each takes bytes from outside and must not panic, whatever they are.
//!
//! A new target is a file here, a line in [`TARGETS`], a program in `fuzz_targets/`, a `[[bin]]` and a corpus of its name.

mod conflist;
mod procfs;
mod zds_frame;

pub use conflist::conflist;
pub use procfs::procfs;
pub use zds_frame::zds_frame;

/// A target: its name, and what takes the bytes.
pub type Target = (&'static str, fn(&[u8]));

/// Every target.
pub const TARGETS: &[Target] = &[
    ("conflist", conflist),
    ("procfs", procfs),
    ("zds_frame", zds_frame),
];
