//! `cargo xtask image`: what a node gets, as one reproducible tar: the two static programs, roots of trust, licences and
//! a bill of materials. How an image is written is `culvert-oci`'s; what is done with it is the user's.

mod again;
mod components;
mod notices;
mod sbom;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use culvert_oci::{Image, LARGEST, Layer};

use self::components::Components;
use crate::{
    build, cmd, ebpf,
    project::{Profile, Project},
};

/// The programs, both static.
const PROGRAMS: [&str; 2] = ["culvert", "culvert-cni"];
/// Options of `image`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The image's name and tag
    #[arg(long, default_value = "culvert:dev", value_name = "NAME")]
    tag: String,
    /// Where its sources are published, for the label `org.opencontainers.image.source`
    #[arg(long, value_name = "URL")]
    source: Option<String>,
    /// Build the commit a second time, in another directory and from nothing, and fail unless both are the same
    #[arg(long)]
    verify: bool,
}

/// Runs the verb.
pub(crate) fn main(args: &Args) -> Result<()> {
    let project = Project::find();
    if args.verify {
        return again::verify(&project, &args.tag, args.source.as_deref());
    }
    let path = write(&project, &args.tag, args.source.as_deref())?;
    println!("{}", path.display());
    Ok(())
}

/// Builds the image that tests install, and packs the same programs a second time: both have to be the same image.
pub(crate) fn ensure(project: &Project) -> Result<PathBuf> {
    let write = || -> Result<(PathBuf, String)> {
        let path = write(project, "culvert:dev", None)?;
        let digest = path.with_file_name("digest");
        let digest = fs::read_to_string(&digest)
            .with_context(|| format!("cannot read {}", digest.display()))?;
        Ok((path, digest))
    };
    let (first, (path, digest)) = (write()?.1, write()?);
    if digest != first {
        bail!(
            "not reproducible: the same programs packed twice are {} and {}",
            first.trim(),
            digest.trim()
        );
    }
    Ok(path)
}

fn write(project: &Project, name: &str, source: Option<&str>) -> Result<PathBuf> {
    ebpf::ensure(project)?;
    build::binaries(project, Profile::Static, &PROGRAMS)?;
    let dir = project.target.join("image");
    fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let origin = Origin::find(project)?;
    let components = Components::find(project)?;
    let sbom = sbom::document(&components, &origin)?;

    let mut layer = Layer::default();
    for program in PROGRAMS {
        let stripped = strip(&project.binaries(Profile::Static).join(program), &dir)?;
        layer.file(&format!("bin/{program}"), 0o755, stripped);
    }
    layer.file("etc/ssl/certs/ca-certificates.crt", 0o644, roots().into());
    layer.file(
        "usr/share/sbom/culvert.cdx.json",
        0o644,
        sbom.clone().into(),
    );
    for (name, text) in notices::texts(project, &components)? {
        layer.file(&format!("licenses/{name}"), 0o644, text.into());
    }
    let image = Image {
        name: name.to_owned(),
        created: origin.time,
        labels: origin.labels(source),
        entrypoint: vec!["/bin/culvert".to_owned()],
        environment: vec!["PATH=/bin".to_owned()],
        layer,
        compressed: true,
    };
    let path = dir.join("culvert.tar");
    let written = image.write(&path)?;
    write_beside(&dir, "culvert.cdx.json", &sbom)?;
    write_beside(&dir, "digest", &format!("{}\n", written.digest))?;
    eprintln!(
        "{name} {}: {:.1} MB, {:.1} MB compressed",
        written.digest,
        megabytes(written.unpacked),
        megabytes(written.packed)
    );
    if written.unpacked > LARGEST {
        bail!(
            "the image is larger than {} MB: look for what has grown with `cargo bloat`, or for a dependency that is not \
             needed",
            LARGEST / 1_000_000
        );
    }
    Ok(path)
}

#[expect(
    clippy::cast_precision_loss,
    reason = "printed with one digit behind the point"
)]
fn megabytes(bytes: usize) -> f64 {
    bytes as f64 / 1e6
}

fn write_beside(dir: &Path, name: &str, text: &str) -> Result<()> {
    let path = dir.join(name);
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// Without debug information and names of functions, a fifth of the whole: a panic still says its file and line.
fn strip(program: &Path, dir: &Path) -> Result<Vec<u8>> {
    let to = dir.join("stripped");
    let mut strip = cmd::command("strip");
    strip.arg("--strip-all").arg("-o").arg(&to).arg(program);
    cmd::run(&mut strip).context("strip comes with the C compiler's binutils")?;
    let content = fs::read(&to).with_context(|| format!("cannot read {}", to.display()))?;
    fs::remove_file(&to).with_context(|| format!("cannot remove {}", to.display()))?;
    Ok(content)
}

/// Mozilla's roots, as a released crate carries them: those of this machine may have been added to.
fn roots() -> String {
    let mut text = String::new();
    for root in webpki_root_certs::TLS_SERVER_ROOT_CERTS {
        text += "-----BEGIN CERTIFICATE-----\n";
        let encoded = STANDARD.encode(root);
        for line in encoded.as_bytes().chunks(64) {
            text += &String::from_utf8_lossy(line);
            text.push('\n');
        }
        text += "-----END CERTIFICATE-----\n";
    }
    text
}

/// What the image is made from.
struct Origin {
    /// The commit, if this is a checkout of one.
    revision: Option<String>,
    /// Its time, in seconds since 1970.
    time: u64,
}

impl Origin {
    fn find(project: &Project) -> Result<Self> {
        let git = |args: &[&str]| -> Option<String> {
            let mut command = cmd::command("git");
            command.current_dir(&project.root).args(args);
            said(&mut command)
        };
        let mut revision = git(&["rev-parse", "HEAD"]);
        if let Some(revision) = &mut revision
            && git(&["status", "--porcelain"]).is_none_or(|changes| !changes.is_empty())
        {
            *revision += "-dirty";
        }
        let told = std::env::var("SOURCE_DATE_EPOCH").ok();
        let time = match told.or_else(|| git(&["show", "--no-patch", "--format=%ct", "HEAD"])) {
            Some(text) => text.trim().parse().with_context(|| {
                format!("SOURCE_DATE_EPOCH is seconds since 1970, not {text:?}")
            })?,
            None => bail!(
                "the image's time is that of the commit, and this is no checkout: set SOURCE_DATE_EPOCH"
            ),
        };
        Ok(Self { revision, time })
    }

    fn labels(&self, source: Option<&str>) -> std::collections::BTreeMap<String, String> {
        let created = std::time::UNIX_EPOCH + std::time::Duration::from_secs(self.time);
        let created = humantime::format_rfc3339_seconds(created).to_string();
        let label = |name: &str, value: &str| {
            (format!("org.opencontainers.image.{name}"), value.to_owned())
        };
        let mut labels = std::collections::BTreeMap::from([
            label("title", "Culvert"),
            label(
                "description",
                "Node agent and CNI plugin that carry pods' traffic into the node's ztunnel with eBPF",
            ),
            label("version", env!("CARGO_PKG_VERSION")),
            label("licenses", "Apache-2.0 AND (GPL-2.0-only OR BSD-2-Clause)"),
            label("created", &created),
        ]);
        labels.extend(self.revision.iter().map(|hash| label("revision", hash)));
        labels.extend(source.map(|url| label("source", url)));
        labels
    }
}

/// What a program printed, if it is there and content.
fn said(command: &mut Command) -> Option<String> {
    let output = command
        .output()
        .ok()
        .filter(|output| output.status.success())?;
    Some(String::from_utf8(output.stdout).ok()?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_say_what_is_known_of_the_sources() {
        let label = |origin: &Origin, source, name: &str| {
            let labels = origin.labels(source);
            labels
                .get(&format!("org.opencontainers.image.{name}"))
                .cloned()
        };
        let checkout = Origin {
            revision: Some("abc-dirty".to_owned()),
            time: 1_700_000_000,
        };
        let url = Some("https://example.org/culvert");
        assert_eq!(label(&checkout, url, "source").as_deref(), url);
        assert_eq!(label(&checkout, None, "source"), None);
        let revision = label(&checkout, None, "revision");
        assert_eq!(revision.as_deref(), Some("abc-dirty"));
        let created = label(&checkout, None, "created");
        assert_eq!(created.as_deref(), Some("2023-11-14T22:13:20Z"));
        let archive = Origin {
            revision: None,
            ..checkout
        };
        assert_eq!(label(&archive, None, "revision"), None);
    }

    #[test]
    fn roots_are_a_bundle_of_many() {
        let text = roots();
        let begun = text.matches("-----BEGIN CERTIFICATE-----\n").count();
        assert!(begun > 100, "{begun}");
        assert_eq!(begun, text.matches("-----END CERTIFICATE-----\n").count());
        assert!(text.lines().all(|line| line.len() <= 64));
    }
}
