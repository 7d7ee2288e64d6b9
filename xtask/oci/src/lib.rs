//! Container images as one tar: an OCI layout that is a `docker save` archive too, so that `ctr images import`, `docker
//! load` and tools for registries take it. The same content makes the same bytes. It reads no file and runs nothing.

mod image;
mod layer;

pub use image::{Image, Written, full_name};
pub use layer::Layer;

/// Bytes that Culvert's own image has at most, unpacked: what makes it and what tests it compare with the same number.
pub const LARGEST: usize = 25_000_000;
