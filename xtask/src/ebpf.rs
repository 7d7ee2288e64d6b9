//! The eBPF object: built when its sources or its toolchain changed, published whole or not at all. It does not know
//! how a toolchain is chosen.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};

use crate::{
    cmd::run,
    inputs::{self, note_path, note_value},
    project::Project,
    toolchain::Toolchain,
};

/// Brings the object up to date.
pub(crate) fn ensure(project: &Project) -> Result<()> {
    let toolchain = Toolchain::ensure(project)?;
    let sources =
        inputs::hash(&project.root).context("cannot read the sources of the eBPF programs")?;
    let compiler = toolchain.fingerprint(project);
    let object = project.object();
    if is_current(&object, &sources, &compiler) {
        return Ok(());
    }
    eprintln!("building the eBPF programs with {}", toolchain.name);
    run(&mut toolchain.cargo(project, "build")?).context(toolchain.hint())?;
    let built = toolchain
        .target_dir(project)
        .join("bpfel-unknown-none/release/culvert");
    // The first build may have written the lock file, which is one of the inputs.
    let sources =
        inputs::hash(&project.root).context("cannot read the sources of the eBPF programs")?;
    publish(
        &built,
        &object,
        &format!("sources {sources}\ntoolchain {compiler}\n"),
    )?;
    let size = fs::metadata(&object)?.len();
    eprintln!("{} ({} KiB)", object.display(), size / 1024);
    Ok(())
}

fn is_current(object: &Path, sources: &str, compiler: &str) -> bool {
    let Ok(note) = fs::read_to_string(note_path(object)) else {
        return false;
    };
    object.is_file()
        && note_value(&note, "sources") == Some(sources)
        && note_value(&note, "toolchain") == Some(compiler)
}

/// Takes the old note away first and writes the new one last: a note never describes another object.
fn publish(built: &Path, object: &Path, note: &str) -> Result<()> {
    let dir = object.parent().context("the object has no directory")?;
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let note_file = note_path(object);
    match fs::remove_file(&note_file) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot remove {}", note_file.display()));
        }
        _ => {}
    }
    let temporary = dir.join(".culvert.bpf.o.new");
    fs::copy(built, &temporary).with_context(|| format!("cannot copy {}", built.display()))?;
    fs::rename(&temporary, object)
        .with_context(|| format!("cannot replace {}", object.display()))?;
    fs::write(&temporary, note).with_context(|| format!("cannot write {}", temporary.display()))?;
    fs::rename(&temporary, &note_file)
        .with_context(|| format!("cannot replace {}", note_file.display()))
}
