//! The image that `cargo xtask image` has made: what is in it, how large it is, what it says about itself.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;

use culvert_cluster::culvert_image;
use culvert_oci::LARGEST;
use flate2::read::GzDecoder;
use serde_json::Value;

fn tar(from: impl std::io::Read) -> BTreeMap<String, (u32, Vec<u8>)> {
    let mut archive = tar::Archive::new(from);
    let mut files = BTreeMap::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let path = entry.path().unwrap().display().to_string();
        let header = entry.header();
        assert_eq!(
            (header.uid().unwrap(), header.gid().unwrap()),
            (0, 0),
            "{path} is not root's"
        );
        let mode = header.mode().unwrap();
        let mut content = Vec::new();
        entry.read_to_end(&mut content).unwrap();
        files.insert(path, (mode, content));
    }
    files
}

#[test]
fn the_image_holds_two_static_programs_roots_licences_and_a_bill_of_materials() {
    let archive = tar(File::open(culvert_image().unwrap()).unwrap());
    let json = |name: &str| -> Value { serde_json::from_slice(&archive[name].1).unwrap() };
    let docker = json("manifest.json");
    let layers = docker[0]["Layers"].as_array().unwrap();
    assert_eq!(layers.len(), 1);
    let packed = &archive[layers[0].as_str().unwrap()].1;
    let mut unpacked = Vec::new();
    GzDecoder::new(packed.as_slice())
        .read_to_end(&mut unpacked)
        .unwrap();
    assert!(unpacked.len() <= LARGEST, "{} bytes", unpacked.len());

    let files = tar(unpacked.as_slice());
    let names: Vec<&str> = files
        .keys()
        .map(String::as_str)
        .filter(|name| !name.ends_with('/'))
        .collect();
    assert_eq!(
        names,
        [
            "bin/culvert",
            "bin/culvert-cni",
            "etc/ssl/certs/ca-certificates.crt",
            "licenses/LICENSE",
            "licenses/LICENSE-APACHE",
            "licenses/LICENSE-BSD-2-Clause",
            "licenses/LICENSE-GPL-2.0",
            "licenses/THIRD-PARTY",
            "usr/share/sbom/culvert.cdx.json",
        ]
    );
    for program in ["bin/culvert", "bin/culvert-cni"] {
        let (mode, content) = &files[program];
        assert_eq!(*mode, 0o755);
        assert_eq!(&content[..4], b"\x7fELF");
        let loader = content.windows(8).any(|bytes| bytes == b"/lib64/l");
        assert!(!loader, "{program} asks for a dynamic loader");
        let root = env!("CARGO_MANIFEST_DIR").trim_end_matches("/tests/cluster");
        for place in [root, "/.cargo/registry"] {
            let told = content
                .windows(place.len())
                .any(|bytes| bytes == place.as_bytes());
            assert!(!told, "{program} tells that it was built in {place}");
        }
    }

    let sbom: Value = serde_json::from_slice(&files["usr/share/sbom/culvert.cdx.json"].1).unwrap();
    assert_eq!(
        (&sbom["bomFormat"], &sbom["specVersion"]),
        (&"CycloneDX".into(), &"1.6".into())
    );
    let components = sbom["components"].as_array().unwrap();
    let known: Vec<&str> = components
        .iter()
        .map(|one| one["bom-ref"].as_str().unwrap())
        .collect();
    for name in [
        "culvert",
        "culvert-cni",
        "culvert-ebpf",
        "kube",
        "aya-ebpf",
        "glibc",
        "rust-std",
    ] {
        let found = components.iter().find(|one| one["name"] == name);
        let found = found.unwrap_or_else(|| panic!("no {name} among the components"));
        let licence = found["licenses"][0]["expression"].as_str().unwrap();
        assert!(!licence.is_empty(), "{name} has no licence");
    }
    for relation in sbom["dependencies"].as_array().unwrap() {
        for on in relation["dependsOn"].as_array().unwrap() {
            assert!(
                known.contains(&on.as_str().unwrap()),
                "{on} is used and not listed"
            );
        }
    }

    let config = json(docker[0]["Config"].as_str().unwrap());
    assert_eq!(config["config"]["Entrypoint"][0], "/bin/culvert");
    let labels = &config["config"]["Labels"];
    for name in ["title", "description", "version", "licenses", "created"] {
        let label = &labels[format!("org.opencontainers.image.{name}")];
        assert!(
            label.as_str().is_some_and(|text| !text.is_empty()),
            "{name}"
        );
    }
    let revision = labels["org.opencontainers.image.revision"].as_str();
    let commit = revision.map(|text| text.trim_end_matches("-dirty"));
    assert!(
        commit.is_some_and(|text| text.len() == 40 && text.bytes().all(|b| b.is_ascii_hexdigit())),
        "{revision:?} is no commit"
    );
    let index = json("index.json");
    let name = &index["manifests"][0]["annotations"]["io.containerd.image.name"];
    assert_eq!(*name, "docker.io/library/culvert:dev");
}

/// What the Containerfile does with the image after `cargo xtask image`, without a container: its own commands, in
/// directories of this test.
#[test]
fn the_containerfile_unpacks_the_same_files_and_starts_the_same_program() {
    let text = std::fs::read_to_string(crate::render::deploy().join("Containerfile")).unwrap();
    let text = text.replace("\\\n", " ");
    let image = culvert_image().unwrap();
    let dir = std::env::temp_dir().join(format!("culvert-containerfile-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let unpack = text
        .lines()
        .find_map(|line| line.strip_prefix("RUN mkdir "))
        .unwrap();
    let unpack = format!("mkdir {unpack}")
        .replace("target/image/culvert.tar", image.to_str().unwrap())
        .replace("/archive", &format!("{}/archive", dir.display()))
        .replace(
            "/root-of-image",
            &format!("{}/root-of-image", dir.display()),
        );
    #[expect(clippy::disallowed_methods, reason = "its shell commands are tested")]
    let status = std::process::Command::new("sh")
        .args(["-ec", &unpack])
        .status()
        .unwrap();
    assert!(status.success(), "{unpack}");

    let archive = tar(File::open(&image).unwrap());
    let json = |name: &str| -> Value { serde_json::from_slice(&archive[name].1).unwrap() };
    let docker = json("manifest.json");
    let layer = &archive[docker[0]["Layers"][0].as_str().unwrap()].1;
    let files = tar(GzDecoder::new(layer.as_slice()));
    for (name, (_, content)) in files.iter().filter(|(name, _)| !name.ends_with('/')) {
        let unpacked = std::fs::read(dir.join("root-of-image").join(name)).unwrap();
        assert!(unpacked == *content, "{name}");
    }
    std::fs::remove_dir_all(&dir).unwrap();

    let config = json(docker[0]["Config"].as_str().unwrap());
    let config = &config["config"];
    let (_, last) = text.rsplit_once("FROM ").unwrap();
    for line in [
        "scratch".to_owned(),
        "COPY --from=build /root-of-image/ /".to_owned(),
        format!("ENV {}", config["Env"][0].as_str().unwrap()),
        format!("ENTRYPOINT {}", config["Entrypoint"]),
    ] {
        assert!(last.lines().any(|one| one == line), "{line}");
    }
}
