//! Who is in the mesh, and how: from a pod, its namespace and the settings to a wish, with its reason.
//!
//! Pure: looks at nothing but its arguments.
