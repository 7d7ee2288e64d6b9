//! The eBPF object: built when its sources or its toolchain changed, published whole or not at all. It does not know
//! how a toolchain is chosen.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::{
    cmd::{cargo, run},
    inputs::{self, note_path, note_value},
    project::Project,
    toolchain::Toolchain,
};

/// Brings the object up to date.
pub(crate) fn ensure(project: &Project) -> Result<()> {
    let toolchain = Toolchain::ensure(project)?;
    let had_lock_file = project.ebpf().join("Cargo.lock").is_file();
    let sources = hash(project)?;
    let compiler = toolchain.fingerprint(project);
    let object = project.object();
    if is_current(&object, &sources, &compiler) {
        return Ok(());
    }
    toolchain.check()?;
    eprintln!("building the eBPF programs with {}", toolchain.name);
    let built = build(project, &toolchain)?;
    // The first build of all writes the lock file, which is one of the inputs. Otherwise the hash from before counts:
    // what was edited during the build is not in the object.
    let sources = if had_lock_file {
        sources
    } else {
        hash(project)?
    };
    publish(
        &built,
        &object,
        &format!("sources {sources}\ntoolchain {compiler}\n"),
    )?;
    let size = fs::metadata(&object)?.len();
    eprintln!("{} ({} KiB)", object.display(), size / 1024);
    Ok(())
}

/// Builds the object and says where it is.
fn build(project: &Project, toolchain: &Toolchain) -> Result<PathBuf> {
    run(&mut toolchain.cargo(project, "build")?).context(toolchain.hint())?;
    Ok(toolchain
        .target_dir(project)
        .join("bpfel-unknown-none/release/culvert"))
}

/// Cargo in the eBPF package with the workspace's toolchain, for what runs or is checked on the host: its library.
pub(crate) fn host_cargo(project: &Project, verb: &str) -> Command {
    let mut command = cargo(project);
    command
        .current_dir(project.ebpf())
        .arg(verb)
        .env("CARGO_TARGET_DIR", project.target.join("ebpf/host"));
    if verb != "metadata" {
        command.arg("--locked");
    }
    command
}

fn hash(project: &Project) -> Result<String> {
    inputs::hash(&project.root).context("cannot read the sources of the eBPF programs")
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
    let temporary = dir.join(format!(".culvert.bpf.o.{}", std::process::id()));
    fs::copy(built, &temporary).with_context(|| format!("cannot copy {}", built.display()))?;
    fs::rename(&temporary, object)
        .with_context(|| format!("cannot replace {}", object.display()))?;
    fs::write(&temporary, note).with_context(|| format!("cannot write {}", temporary.display()))?;
    fs::rename(&temporary, &note_file)
        .with_context(|| format!("cannot replace {}", note_file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From nothing but the sources and the compilers, in a directory whose name is longer. `image --verify` does the same
    /// to the programs around it, which takes many times as long.
    #[test]
    fn the_object_is_the_same_wherever_it_is_built() {
        let project = Project::find();
        ensure(&project).unwrap();
        let toolchain = Toolchain::ensure(&project).unwrap();
        let place = project.target.join("ebpf/again");
        let _none = fs::remove_dir_all(&place);
        let again = Project {
            root: place.join("in/another/directory"),
            target: place.join("target"),
        };
        for path in inputs::sources(&project.root).unwrap() {
            let copy = again.root.join(&path);
            fs::create_dir_all(copy.parent().unwrap()).unwrap();
            fs::copy(project.root.join(path), copy).unwrap();
        }
        let built = fs::read(build(&again, &toolchain).unwrap()).unwrap();
        // Not as two lists of bytes: nobody would read them.
        assert!(
            built == fs::read(project.object()).unwrap(),
            "the object in {} is another than {}",
            place.display(),
            project.object().display()
        );
        fs::remove_dir_all(&place).unwrap();
    }
}
