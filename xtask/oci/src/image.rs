//! An image of one layer, and the tar that holds it. Names follow the OCI image specification; beside its index lies the
//! `manifest.json` of `docker save`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use flate2::{Compression, GzBuilder};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tar::{Builder, Header};

use crate::Layer;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const PLAIN: &str = "application/vnd.oci.image.layer.v1.tar";
const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// An image to be written.
#[derive(Debug, Clone, Default)]
pub struct Image {
    /// Its name, with a tag.
    pub name: String,
    /// Its time, in seconds since 1970; also that of every file in it.
    pub created: u64,
    /// What it says about itself.
    pub labels: BTreeMap<String, String>,
    /// What a container runs unless told otherwise.
    pub entrypoint: Vec<String>,
    /// `NAME=VALUE` of every container.
    pub environment: Vec<String>,
    /// Its files.
    pub layer: Layer,
    /// Whether the layer is compressed: smaller on the way, slower to make.
    pub compressed: bool,
}

/// What has been written.
#[derive(Debug, Clone)]
pub struct Written {
    /// The image's digest: that of its manifest, as a registry names it.
    pub digest: String,
    /// Bytes of the layer as it lies on a node.
    pub unpacked: usize,
    /// Bytes of the layer as it is carried.
    pub packed: usize,
}

impl Image {
    /// Writes the tar.
    ///
    /// # Errors
    /// When it cannot be written, or a name in it is none for an image.
    pub fn write(&self, path: &Path) -> Result<Written> {
        let plain = self.layer.tar(self.created)?;
        let diff_id = digest(&plain);
        let unpacked = plain.len();
        let (layer, media_type) = match self.compressed {
            true => (gzip(&plain)?, GZIP),
            false => (plain, PLAIN),
        };
        let created = UNIX_EPOCH + Duration::from_secs(self.created);
        let config = bytes(&json!({
            "created": humantime::format_rfc3339_seconds(created).to_string(),
            "architecture": architecture(),
            "os": "linux",
            "config": {
                "Entrypoint": self.entrypoint,
                "Env": self.environment,
                "Labels": self.labels,
            },
            "rootfs": {"type": "layers", "diff_ids": [diff_id]},
        }));
        let manifest = bytes(&json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": descriptor(CONFIG, &config),
            "layers": [descriptor(media_type, &layer)],
            "annotations": self.labels,
        }));
        let mut entry = descriptor(MANIFEST, &manifest);
        entry["annotations"] = json!({
            "io.containerd.image.name": full_name(&self.name),
            "org.opencontainers.image.ref.name": tag(&self.name),
        });
        entry["platform"] = json!({"architecture": architecture(), "os": "linux"});
        let index = bytes(&json!({"schemaVersion": 2, "manifests": [entry]}));
        let docker = bytes(&json!([{
            "Config": blob(&config),
            "RepoTags": [self.name],
            "Layers": [blob(&layer)],
        }]));

        let mut files = BTreeMap::from([
            (blob(&layer), &layer),
            (blob(&config), &config),
            (blob(&manifest), &manifest),
            ("index.json".to_owned(), &index),
            ("manifest.json".to_owned(), &docker),
        ]);
        let version = bytes(&json!({"imageLayoutVersion": "1.0.0"}));
        files.insert("oci-layout".to_owned(), &version);
        let mut tar = Builder::new(Vec::new());
        for (name, content) in files {
            let mut header = Header::new_gnu();
            header.set_mtime(self.created);
            header.set_uid(0);
            header.set_gid(0);
            header.set_mode(0o644);
            header.set_size(content.len() as u64);
            tar.append_data(&mut header, &name, content.as_slice())
                .with_context(|| format!("adding {name}"))?;
        }
        let whole = tar.into_inner().context("finishing the archive")?;
        // Renamed into place: whoever reads it meanwhile has the earlier one whole.
        let fresh = path.with_extension("fresh");
        fs::write(&fresh, whole)
            .and_then(|()| fs::rename(&fresh, path))
            .with_context(|| format!("writing {}", path.display()))?;
        Ok(Written {
            digest: digest(&manifest),
            unpacked,
            packed: layer.len(),
        })
    }
}

/// A name as container runtimes keep it: with its registry.
#[must_use]
pub fn full_name(name: &str) -> String {
    match name.split_once('/') {
        None => format!("docker.io/library/{name}"),
        Some((first, _)) if first.contains(['.', ':']) || first == "localhost" => name.to_owned(),
        Some(_) => format!("docker.io/{name}"),
    }
}

fn tag(name: &str) -> &str {
    let last = name.rsplit('/').next().unwrap_or(name);
    last.split_once(':').map_or("latest", |(_, tag)| tag)
}

fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn gzip(plain: &[u8]) -> Result<Vec<u8>> {
    // Without a time and a file's name of its own, only the content decides.
    let mut gzip = GzBuilder::new().write(Vec::new(), Compression::best());
    gzip.write_all(plain).context("compressing a layer")?;
    gzip.finish().context("compressing a layer")
}

fn bytes(value: &Value) -> Vec<u8> {
    value.to_string().into_bytes()
}

fn blob(content: &[u8]) -> String {
    format!("blobs/{}", digest(content).replace(':', "/"))
}

fn descriptor(media_type: &str, content: &[u8]) -> Value {
    json!({"mediaType": media_type, "digest": digest(content), "size": content.len()})
}

fn digest(content: &[u8]) -> String {
    let mut text = "sha256:".to_owned();
    for byte in Sha256::digest(content) {
        // Writing to a string does not fail.
        let _written = write!(text, "{byte:02x}");
    }
    text
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[test]
    fn a_digest_is_that_of_the_standard() {
        assert_eq!(
            digest(b"abc"),
            "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }

    #[test]
    fn names_are_completed_as_runtimes_do() {
        for (name, full) in [
            ("culvert:dev", "docker.io/library/culvert:dev"),
            ("mesh/culvert:1", "docker.io/mesh/culvert:1"),
            ("registry.example/culvert:1", "registry.example/culvert:1"),
            ("localhost/culvert:1", "localhost/culvert:1"),
            ("localhost:5000/culvert", "localhost:5000/culvert"),
        ] {
            assert_eq!(full_name(name), full);
        }
        assert_eq!(tag("localhost:5000/culvert"), "latest");
        assert_eq!(tag("localhost:5000/culvert:1"), "1");
    }

    /// Every blob of an archive, by its name.
    fn contents(path: &Path) -> BTreeMap<String, Vec<u8>> {
        let file = fs::File::open(path).unwrap();
        let mut archive = tar::Archive::new(file);
        let mut found = BTreeMap::new();
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            let name = entry.path().unwrap().display().to_string();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            found.insert(name, content);
        }
        found
    }

    #[test]
    fn everything_is_under_the_name_of_its_content_and_the_same_each_time() {
        let path = std::env::temp_dir().join(format!("culvert-oci-{}.tar", std::process::id()));
        let mut image = Image {
            name: "culvert:dev".to_owned(),
            created: 1_700_000_000,
            compressed: true,
            ..Image::default()
        };
        image.layer.file("culvert", 0o755, vec![7; 100_000]);
        let written = image.write(&path).unwrap();
        let first = contents(&path);
        assert_eq!(image.write(&path).unwrap().digest, written.digest);
        assert_eq!(contents(&path), first);
        fs::remove_file(&path).unwrap();

        assert!(written.packed < written.unpacked);
        for (name, content) in first.iter().filter(|(name, _)| name.starts_with("blobs/")) {
            assert_eq!(*name, blob(content));
        }
        let index: Value = serde_json::from_slice(&first["index.json"]).unwrap();
        assert_eq!(index["manifests"][0]["digest"], written.digest.as_str());
        let docker: Value = serde_json::from_slice(&first["manifest.json"]).unwrap();
        for name in [&docker[0]["Config"], &docker[0]["Layers"][0]] {
            assert!(first.contains_key(name.as_str().unwrap()), "{name}");
        }
        let config: Value =
            serde_json::from_slice(&first[docker[0]["Config"].as_str().unwrap()]).unwrap();
        assert_eq!(config["created"], "2023-11-14T22:13:20Z");
    }
}
