//! Host-side tests; filled in below.
