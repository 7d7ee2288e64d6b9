//! Making every pod of the node be as its labels say, again and again.
//!
//! The only caller of both the watch and the kernel.
