//! The chained CNI plugin `culvert-cni`.
fn main() {}
