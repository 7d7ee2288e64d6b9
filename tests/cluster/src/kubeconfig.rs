//! Kubeconfig files: who a client is, and which API server it talks to. Keys and tokens stay in files of their own, so
//! that they can be renewed below a client that runs.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde_json::json;

use crate::pki::Pair;

/// What a client proves itself with.
pub(crate) enum Proof {
    /// A certificate that the cluster's authority has issued.
    Certificate(Pair),
    /// A file with a service account's token.
    Token(PathBuf),
}

/// Writes a kubeconfig with one cluster and one user.
pub(crate) fn write(path: &Path, server: &str, ca: &Path, proof: &Proof) -> Result<()> {
    let user = match proof {
        Proof::Certificate(pair) => json!({
            "client-certificate": pair.certificate,
            "client-key": pair.key,
        }),
        Proof::Token(file) => json!({ "tokenFile": file }),
    };
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "culvert", "cluster": {"server": server, "certificate-authority": ca}}],
        "users": [{"name": "culvert", "user": user}],
        "contexts": [{"name": "culvert", "context": {"cluster": "culvert", "user": "culvert"}}],
        "current-context": "culvert",
    });
    // JSON is YAML.
    fs::write(path, format!("{config:#}\n")).with_context(|| format!("writing {}", path.display()))
}
