//! Which pods and namespaces there are: from the Kubernetes API or from a directory of manifests, as plain data.
//!
//! Knows no kernel and decides nothing; writes nothing but the redirection annotation and events.
