//! Finds the eBPF object that the agent embeds and refuses one that is missing or older than its sources. It never
//! builds it, and never puts an empty one in its place: an agent without programs would be green and useless.

#[path = "../xtask/src/inputs.rs"]
mod inputs;

use std::{
    fs,
    path::{Path, PathBuf},
};

fn main() {
    match object() {
        Ok(path) => println!("cargo::rustc-env=CULVERT_BPF_OBJECT={}", path.display()),
        Err(why) => println!("cargo::error={why}: run `cargo xtask build`"),
    }
}

fn object() -> Result<PathBuf, String> {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = package
        .parent()
        .ok_or("the agent package has no parent directory")?;
    let object = inputs::target_dir(root).join(inputs::OBJECT);
    let note = inputs::note_path(&object);

    println!("cargo::rerun-if-env-changed=CARGO_TARGET_DIR");
    for path in [
        root.join("ebpf/src"),
        root.join("ebpf/Cargo.toml"),
        root.join("ebpf/Cargo.lock"),
        root.join("xtask/src/inputs.rs"),
        object.clone(),
        note.clone(),
    ] {
        println!("cargo::rerun-if-changed={}", path.display());
    }

    if !object.is_file() {
        return Err(format!(
            "the eBPF object is missing ({} does not exist)",
            object.display()
        ));
    }
    let note = fs::read_to_string(&note).map_err(|error| {
        format!(
            "the eBPF object is of unknown origin ({}: {error})",
            note.display()
        )
    })?;
    let sources = inputs::hash(root)
        .map_err(|error| format!("the sources of the eBPF object cannot be read ({error})"))?;
    if inputs::note_value(&note, "sources") != Some(sources.as_str()) {
        return Err(format!(
            "the eBPF object is stale ({} was built from other sources than those in {})",
            object.display(),
            root.join("ebpf").display()
        ));
    }
    Ok(object)
}
