//! The bill of materials, in CycloneDX 1.6: every crate with licence and checksum, and what the C compiler added.

use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::{
    Origin,
    components::{Components, Id},
    said,
};
use crate::{cmd, project::static_triple};

/// The document.
pub(super) fn document(components: &Components, origin: &Origin) -> Result<String> {
    let time = UNIX_EPOCH + Duration::from_secs(origin.time);
    let mut listed: Vec<Value> = components
        .0
        .iter()
        .map(|(id, component)| {
            let mut entry = json!({
                "type": "library",
                "bom-ref": reference(id),
                "name": id.0,
                "version": id.1,
                "purl": reference(id),
                "licenses": [{"expression": component.licence}],
            });
            if let Some(checksum) = &component.checksum {
                entry["hashes"] = json!([{"alg": "SHA-256", "content": checksum}]);
            }
            entry
        })
        .collect();
    let mut depends: Vec<Value> = components
        .0
        .iter()
        .map(|(id, component)| {
            let on: Vec<String> = component.uses.iter().map(reference).collect();
            json!({"ref": reference(id), "dependsOn": on})
        })
        .collect();
    let linked = linked()?;
    let names: Vec<&str> = linked
        .iter()
        .filter_map(|l| l["bom-ref"].as_str())
        .collect();
    let own: Vec<String> = components
        .0
        .iter()
        .filter(|(_, component)| component.checksum.is_none())
        .map(|(id, _)| reference(id))
        .collect();
    let mut whole = own.clone();
    whole.extend(names.into_iter().map(str::to_owned));
    depends.push(json!({"ref": "culvert", "dependsOn": whole}));
    listed.extend(linked);
    let document = json!({
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "timestamp": humantime::format_rfc3339_seconds(time).to_string(),
            "component": {
                "type": "container",
                "bom-ref": "culvert",
                "name": "culvert",
                "version": env!("CARGO_PKG_VERSION"),
                "properties": [{"name": "revision", "value": origin.revision}],
            },
        },
        "components": listed,
        "dependencies": depends,
    });
    Ok(format!("{document:#}\n"))
}

fn reference(id: &Id) -> String {
    format!("pkg:cargo/{}@{}", id.0, id.1)
}

/// What is in every static program without being a crate.
fn linked() -> Result<Vec<Value>> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let rustc = said(cmd::command(rustc).arg("--version")).context("rustc --version failed")?;
    let rust = rustc.split(' ').nth(1).unwrap_or_default();
    let libc = said(cmd::command("getconf").arg("GNU_LIBC_VERSION"))
        .context("getconf GNU_LIBC_VERSION failed: static programs are linked to glibc")?;
    let libc = libc.split(' ').nth(1).unwrap_or_default();
    let gcc = said(cmd::command("cc").arg("-dumpfullversion")).context("no C compiler")?;
    let entry = |name: &str, version: &str, licence: &str| {
        json!({
            "type": "library",
            "bom-ref": format!("pkg:generic/{name}@{version}"),
            "name": name,
            "version": version,
            "purl": format!("pkg:generic/{name}@{version}"),
            "licenses": [{"expression": licence}],
            "description": format!("linked statically for {}", static_triple()),
        })
    };
    Ok(vec![
        entry("rust-std", rust, "MIT OR Apache-2.0"),
        entry("glibc", libc, "LGPL-2.1-or-later"),
        entry("libgcc", &gcc, "GPL-3.0-or-later WITH GCC-exception-3.1"),
    ])
}
