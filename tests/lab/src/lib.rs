//! Namespaces, cgroups and captures for the tests.
