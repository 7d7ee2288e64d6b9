//! Building one program from its Go module, with a word now and then that it goes on. What there is to build, and
//! whether it has to be, is decided in [`parts`](crate::parts).

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::parts::{CILIUM, ISTIO, Part, go_mod};
use crate::tool;

/// How often a build that takes minutes says that it goes on.
const PROGRESS: Duration = Duration::from_secs(10);
/// Lines of the compiler that an error shows.
const TAIL: usize = 20;

/// What of Cilium's module is needed when it runs, and what it is called beside the agent.
const CILIUM_FILES: [(&str, &str); 4] = [
    ("bpf", "bpf"),
    ("install/kubernetes/cilium", "chart"),
    ("pkg/k8s/apis/cilium.io/client/crds/v2", "crds/v2"),
    (
        "pkg/k8s/apis/cilium.io/client/crds/v2alpha1",
        "crds/v2alpha1",
    ),
];

/// Builds a program as `path`.
pub(crate) fn one(part: Part, path: &Path) -> Result<()> {
    let dir = path.parent().context("a path without a directory")?;
    fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
    let temporary = path.with_extension("new");
    if part == Part::IstioCharts {
        copy_tree(
            &source_of(part, ISTIO)?.join("manifests/charts"),
            &temporary,
        )?;
        return fs::rename(&temporary, path).with_context(|| format!("making {}", path.display()));
    }
    if part == Part::CiliumAgent {
        copy_cilium_files(dir)?;
    }
    let (_, module, package) = part.pin();
    let version = dir
        .file_name()
        .and_then(|name| name.to_str()?.rsplit_once("-v"))
        .map_or("", |(_, version)| version);
    let started = Instant::now();
    let mut child = go(part)
        .args(["build", "-v", "-trimpath", "-buildvcs=false"])
        .args(["-tags", "osusergo", "-ldflags"])
        .arg(linker_flags(part, version))
        .arg("-o")
        .arg(&temporary)
        .arg(format!("{module}{package}"))
        .stderr(Stdio::piped())
        .spawn()
        .context("starting `go`: install Go 1.26 or newer and put it on PATH")?;
    let tail = follow(part, &mut child, started)?;
    let status = child.wait().context("waiting for go")?;
    if !status.success() {
        bail!("go build: {status}\n{}", tail.join("\n"));
    }
    // Whoever sees the file sees all of it.
    fs::rename(&temporary, path).with_context(|| format!("making {}", path.display()))?;
    eprintln!(
        "  {}: built in {} s",
        part.name(),
        started.elapsed().as_secs()
    );
    Ok(())
}

/// Reads what the compiler says, tells now and then how far it is, and returns the last of it.
fn follow(part: Part, child: &mut std::process::Child, started: Instant) -> Result<Vec<String>> {
    let (mut said, mut count) = (Instant::now(), 0_u32);
    let mut tail = Vec::new();
    for line in BufReader::new(child.stderr.take().context("no stderr")?).lines() {
        let line = line.context("reading what go says")?;
        count += 1;
        if said.elapsed() >= PROGRESS {
            said = Instant::now();
            let seconds = started.elapsed().as_secs();
            eprintln!("  {}: {seconds} s, {count} packages, {line}", part.name());
        }
        tail.push(line);
        if tail.len() > TAIL {
            tail.remove(0);
        }
    }
    Ok(tail)
}

/// Go, in the module that pins a part, with no setting of the user's that changes what comes out.
fn go(part: Part) -> std::process::Command {
    let file = go_mod(part);
    let mut command = tool::command("go");
    command
        .current_dir(file.parent().unwrap_or(Path::new(".")))
        .env("CGO_ENABLED", "0")
        .env_remove("GOFLAGS");
    command
}

/// Where a module's files are. The module cache is the user's, and may be emptied: what is needed later is to be copied.
fn source_of(part: Part, module: &str) -> Result<PathBuf> {
    tool::run(go(part).args(["mod", "download", module]))?;
    let dir = tool::run(go(part).args(["list", "-m", "-f", "{{.Dir}}", module]))?;
    Ok(PathBuf::from(dir.trim()))
}

fn copy_cilium_files(to: &Path) -> Result<()> {
    let module = source_of(Part::CiliumAgent, CILIUM)?;
    for (from, name) in CILIUM_FILES {
        copy_tree(&module.join(from), &to.join(name))?;
    }
    Ok(())
}

/// Copies a directory; what is copied can be written to, which the module cache cannot.
pub(crate) fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    let parent = to.parent().context("a path without a directory")?;
    fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
    let mut copy = tool::command("cp");
    copy.args(["--recursive", "--no-preserve=mode,ownership", "-T", "--"]);
    tool::run(copy.arg(from).arg(to)).map(drop)
}

/// These programs do not know their version unless they are told when they are linked; clients ask for it.
fn linker_flags(part: Part, version: &str) -> String {
    let mut flags = "-s -w".to_owned();
    if part.folder() == "kubernetes" {
        let mut numbers = version.split('.');
        for (key, value) in [
            ("gitVersion", format!("v{version}")),
            ("gitMajor", numbers.next().unwrap_or_default().to_owned()),
            ("gitMinor", numbers.next().unwrap_or_default().to_owned()),
            ("gitTreeState", "clean".to_owned()),
        ] {
            flags += &format!(" -X k8s.io/component-base/version.{key}={value}");
        }
    }
    if part.folder() == "cilium" {
        flags += &format!(" -X {CILIUM}/pkg/version.ciliumVersion={version}");
    }
    flags
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kubernetes_is_told_its_version() {
        let flags = linker_flags(Part::Kubelet, "1.36.3");
        assert!(
            flags.contains("gitVersion=v1.36.3 ") && flags.contains("gitMinor=36 "),
            "{flags}"
        );
        assert_eq!(linker_flags(Part::Etcd, "3.7.3"), "-s -w");
    }
}
