//! Which compiler and linker build the eBPF programs: the one place that knows and chooses.
//!
//! The target `bpfel-unknown-none` has no prebuilt `core`, so it takes a compiler whose own library source is at hand,
//! and a `bpf-linker` on the same LLVM. Two ways, in this order: a rustup nightly with `rust-src` and a `bpf-linker` on
//! PATH; else Debian's packages, with a `bpf-linker` built into `target/tools`. Looking is done on files alone: no
//! program is run and no network is used once everything is there.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    cmd::{announced, foreign_cargo, output},
    host::{self, Package},
    inputs::Fnv,
    project::Project,
};

/// Debian's compiler: rustc 1.96 on LLVM 22, with its own library source.
const COMPILER: [Package; 3] = [
    Package {
        name: "rustc-web",
        // Not /usr/bin/rustc: that may be the older compiler of the package `rustc`.
        proof: "/var/lib/dpkg/info/rustc-web.list",
    },
    Package {
        name: "cargo-web",
        proof: "/var/lib/dpkg/info/cargo-web.list",
    },
    Package {
        name: "rust-web-src",
        proof: "/usr/lib/rustlib/src/rust/library/core/Cargo.toml",
    },
];

/// What building a `bpf-linker` on the same LLVM takes.
const LINKER_BUILD: [Package; 5] = [
    Package {
        name: "llvm-22-dev",
        proof: "/usr/lib/llvm-22/include/llvm-c/Core.h",
    },
    Package {
        name: "libpolly-22-dev",
        proof: "/usr/lib/llvm-22/lib/libPolly.a",
    },
    Package {
        name: "clang-22",
        proof: "/usr/bin/clang-22",
    },
    Package {
        name: "libzstd-dev",
        proof: "/usr/include/zstd.h",
    },
    Package {
        name: "zlib1g-dev",
        proof: "/usr/include/zlib.h",
    },
];

/// Clippy on the same compiler. Looked for beside it: the one on PATH is of the workspace's toolchain.
const CLIPPY: [Package; 1] = [Package {
    name: "rust-web-clippy",
    proof: "/usr/bin/cargo-clippy",
}];

const LLVM: &str = "/usr/lib/llvm-22";
const LLVM_MAJOR: u32 = 22;
const LINKER_VERSION: &str = "0.13.0";

/// The user-level way, for messages.
const RUSTUP_CURE: &str =
    "rustup toolchain install nightly --component rust-src && cargo install bpf-linker";

/// A compiler and linker for the eBPF programs, ready for use.
pub(crate) struct Toolchain {
    /// One line for people.
    pub(crate) name: String,
    cargo: PathBuf,
    rustc: PathBuf,
    /// Directory of `bpf-linker`, when it is not on PATH.
    linker_dir: Option<PathBuf>,
    /// A release compiler takes unstable options only with `RUSTC_BOOTSTRAP`.
    bootstrap: bool,
}

/// What was found on this machine: the facts the choice rests on.
#[derive(Debug, Default)]
struct Probe {
    /// A rustup nightly that has `rust-src`.
    nightly: Option<PathBuf>,
    /// `bpf-linker` on PATH.
    linker_on_path: Option<PathBuf>,
    /// Debian packages of the compiler that are missing.
    missing_compiler: Vec<Package>,
    /// Debian packages that building the linker would still need.
    missing_linker_build: Vec<Package>,
    /// `target/tools` holds the linker, in the right version.
    own_linker: bool,
}

/// What has to be done.
#[derive(Debug, PartialEq, Eq)]
enum Choice {
    /// Nightly at this directory, linker on PATH.
    Rustup(PathBuf),
    /// Debian's compiler; install these first, and build the linker if told so.
    Debian {
        install: Vec<Package>,
        build_linker: bool,
    },
}

fn choose(probe: Probe) -> Choice {
    if let (Some(nightly), Some(_)) = (probe.nightly, probe.linker_on_path) {
        return Choice::Rustup(nightly);
    }
    let mut install = probe.missing_compiler;
    if !probe.own_linker {
        install.extend(probe.missing_linker_build);
    }
    Choice::Debian {
        install,
        build_linker: !probe.own_linker,
    }
}

impl Probe {
    fn look(project: &Project) -> Self {
        Self {
            nightly: rustup_toolchains().and_then(|dir| nightly_with_source(&dir)),
            linker_on_path: host::find_program("bpf-linker"),
            missing_compiler: host::missing(&COMPILER),
            missing_linker_build: host::missing(&LINKER_BUILD),
            own_linker: has_own_linker(project),
        }
    }
}

fn rustup_toolchains() -> Option<PathBuf> {
    let home = env::var_os("RUSTUP_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".rustup")))?;
    Some(home.join("toolchains"))
}

/// The plain `nightly` before dated ones, the newest of those first.
fn nightly_with_source(toolchains: &Path) -> Option<PathBuf> {
    let mut found: Vec<_> = fs::read_dir(toolchains)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|dir| {
            dir.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with("nightly-"))
        })
        .filter(|dir| {
            dir.join("lib/rustlib/src/rust/library/core/Cargo.toml")
                .is_file()
        })
        .collect();
    // A dated name goes on with a digit, a plain one with the architecture: letters sort after digits.
    found.sort();
    found.pop()
}

fn has_own_linker(project: &Project) -> bool {
    let tools = project.tools();
    let wanted = format!("\"bpf-linker {LINKER_VERSION} ");
    tools.join("bin/bpf-linker").is_file()
        && fs::read_to_string(tools.join(".crates.toml")).is_ok_and(|list| list.contains(&wanted))
}

impl Toolchain {
    /// Finds the toolchain, installing what is missing.
    pub(crate) fn ensure(project: &Project) -> Result<Self> {
        match choose(Probe::look(project)) {
            Choice::Rustup(nightly) => Ok(Self {
                name: format!(
                    "rustup {}",
                    nightly.file_name().unwrap_or_default().to_string_lossy()
                ),
                cargo: nightly.join("bin/cargo"),
                rustc: nightly.join("bin/rustc"),
                linker_dir: None,
                bootstrap: false,
            }),
            Choice::Debian {
                install,
                build_linker,
            } => {
                install_compiler(&install)?;
                if build_linker {
                    build_own_linker(project)?;
                }
                Ok(Self {
                    name: "Debian's rustc-web".to_owned(),
                    cargo: "/usr/bin/cargo".into(),
                    rustc: "/usr/bin/rustc".into(),
                    linker_dir: Some(project.tools().join("bin")),
                    bootstrap: true,
                })
            }
        }
    }

    /// `cargo VERB` in the eBPF package for the BPF target, with `core` built from source.
    pub(crate) fn cargo(&self, project: &Project, verb: &str) -> Result<Command> {
        self.cargo_with(project, &self.cargo, verb)
    }

    fn cargo_with(&self, project: &Project, program: &Path, verb: &str) -> Result<Command> {
        let mut command = foreign_cargo(program);
        command
            .current_dir(project.ebpf())
            .args([
                verb,
                "--release",
                "--target",
                "bpfel-unknown-none",
                "-Z",
                "build-std=core",
            ])
            .args(["--features", "programs", "--bin", "culvert"])
            .env("CARGO", &self.cargo)
            .env("RUSTC", &self.rustc)
            .env("CARGO_TARGET_DIR", self.target_dir(project))
            .env(
                "CARGO_ENCODED_RUSTFLAGS",
                self.flags(project).join("\u{1f}"),
            );
        if self.bootstrap {
            command.env("RUSTC_BOOTSTRAP", "1");
        }
        if let Some(dir) = &self.linker_dir {
            let path = env::var_os("PATH").unwrap_or_default();
            let path = env::join_paths(std::iter::once(dir.clone()).chain(env::split_paths(&path)))
                .context("PATH cannot be extended")?;
            command.env("PATH", path);
        }
        if project.ebpf().join("Cargo.lock").is_file() {
            command.arg("--locked");
        }
        Ok(command)
    }

    /// Clippy of the same version as the compiler, for the programs as they are compiled.
    pub(crate) fn clippy(&self, project: &Project) -> Result<Command> {
        let bin = self
            .rustc
            .parent()
            .context("the compiler has no directory")?;
        let clippy = bin.join("cargo-clippy");
        if self.bootstrap {
            host::ensure_packages(&CLIPPY, "checking the eBPF programs")?;
        } else if !clippy.is_file() {
            bail!(
                "{} has no clippy: `rustup component add clippy --toolchain nightly`",
                self.name
            );
        }
        let mut command = self.cargo_with(project, &clippy, "clippy")?;
        command.args(["--", "-D", "warnings"]);
        Ok(command)
    }

    /// The eBPF package's own output directory: another compiler, another lock file.
    pub(crate) fn target_dir(&self, project: &Project) -> PathBuf {
        project.target.join("ebpf/build")
    }

    fn flags(&self, project: &Project) -> Vec<String> {
        let mut flags = vec![
            "-Clinker=bpf-linker".to_owned(),
            format!("--cfg=bpf_target_arch=\"{}\"", env::consts::ARCH),
            "-Cdebuginfo=2".to_owned(),
            "-Clink-arg=--btf".to_owned(),
        ];
        // The object must not tell, or depend on, where it was built.
        let cargo_home = env::var_os("CARGO_HOME")
            .map(PathBuf::from)
            .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cargo")));
        if let Some(home) = cargo_home {
            flags.push(format!("--remap-path-prefix={}=/cargo", home.display()));
        }
        if let Some(prefix) = self.rustc.parent().and_then(Path::parent) {
            flags.push(format!(
                "--remap-path-prefix={}=/rust",
                prefix.join("lib/rustlib/src/rust").display()
            ));
        }
        flags.push(format!(
            "--remap-path-prefix={}=/culvert",
            project.root.display()
        ));
        flags
    }

    /// Changes when the same sources would give another object: other flags, another compiler, another linker.
    pub(crate) fn fingerprint(&self, project: &Project) -> String {
        let mut hash = Fnv::new();
        for flag in self.flags(project) {
            hash.field(flag.as_bytes());
        }
        let linker = match &self.linker_dir {
            Some(dir) => Some(dir.join("bpf-linker")),
            None => host::find_program("bpf-linker"),
        };
        for file in [Some(self.rustc.clone()), linker].into_iter().flatten() {
            hash.field(file.as_os_str().as_encoded_bytes());
            // Size and time stand for the content: hashing forty megabytes would be waiting.
            if let Ok(data) = fs::metadata(&file) {
                use std::os::unix::fs::MetadataExt as _;
                hash.field(&data.len().to_le_bytes());
                hash.field(&data.mtime().to_le_bytes());
            }
        }
        hash.hex()
    }

    /// Whether compiler and linker are on the same LLVM, where that is ours to arrange. Asked only before a build: it
    /// starts the compiler.
    pub(crate) fn check(&self) -> Result<()> {
        if !self.bootstrap {
            return Ok(());
        }
        let version = output(foreign_cargo(&self.rustc).arg("-vV"))?;
        match llvm_major(&version) {
            Some(LLVM_MAJOR) => Ok(()),
            _ => bail!(
                "{} is not on LLVM {LLVM_MAJOR}, as bpf-linker here is; it says:\n{version}bring it up to date as root:\n    \
                 apt-get update && apt-get install --yes rustc-web cargo-web rust-web-src\nor, as yourself:\n    {RUSTUP_CURE}",
                self.rustc.display()
            ),
        }
    }

    /// What to add to a failed build: the usual reason for it.
    pub(crate) fn hint(&self) -> &'static str {
        if self.bootstrap {
            "the eBPF programs did not build (compiler messages above)"
        } else {
            "the eBPF programs did not build (messages above); if the linker complains about bitcode, the bpf-linker on \
             PATH is on an older LLVM than the nightly: `cargo install bpf-linker --force`"
        }
    }
}

fn llvm_major(version: &str) -> Option<u32> {
    let llvm = version
        .lines()
        .find_map(|line| line.strip_prefix("LLVM version: "))?;
    llvm.split('.').next()?.trim().parse().ok()
}

fn install_compiler(install: &[Package]) -> Result<()> {
    if install.is_empty() {
        return Ok(());
    }
    if !host::is_root() || host::find_program("apt-get").is_none() {
        bail!(
            "no toolchain for eBPF here. As root, on Debian 12:\n    {}\nor, as yourself:\n    {RUSTUP_CURE}",
            host::install_line(install)
        );
    }
    host::ensure_packages(install, "building the eBPF programs")
        .with_context(|| format!("no toolchain for eBPF from this machine's package lists; the other way is\n    {RUSTUP_CURE}"))
}

fn build_own_linker(project: &Project) -> Result<()> {
    let cargo = env::var_os("CARGO").map_or_else(|| PathBuf::from("cargo"), PathBuf::from);
    eprintln!(
        "building bpf-linker {LINKER_VERSION} into {}: about a minute, once",
        project.tools().display()
    );
    let mut command = foreign_cargo(&cargo);
    if let Some(toolchain) = env::var_os("RUSTUP_TOOLCHAIN") {
        // The same compiler that builds the workspace, not whatever the default is.
        command.env("RUSTUP_TOOLCHAIN", toolchain);
    }
    command
        .args([
            "install",
            "bpf-linker",
            "--locked",
            "--force",
            "--version",
            LINKER_VERSION,
        ])
        .args(["--no-default-features", "--features", "llvm-22", "--root"])
        .arg(project.tools())
        .env("LLVM_PREFIX", LLVM);
    announced(&mut command).context("bpf-linker did not build")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nightly() -> Option<PathBuf> {
        Some("/r/toolchains/nightly-x86_64".into())
    }

    #[test]
    fn nightly_with_a_linker_comes_first() {
        let probe = Probe {
            nightly: nightly(),
            linker_on_path: Some("/bin/bpf-linker".into()),
            own_linker: true,
            ..Probe::default()
        };
        assert_eq!(
            choose(probe),
            Choice::Rustup("/r/toolchains/nightly-x86_64".into())
        );
    }

    #[test]
    fn half_of_the_rustup_way_is_not_a_way() {
        let without_linker = Probe {
            nightly: nightly(),
            own_linker: true,
            ..Probe::default()
        };
        let without_source = Probe {
            linker_on_path: Some("/bin/bpf-linker".into()),
            own_linker: true,
            ..Probe::default()
        };
        for probe in [without_linker, without_source] {
            assert_eq!(
                choose(probe),
                Choice::Debian {
                    install: vec![],
                    build_linker: false
                }
            );
        }
    }

    #[test]
    fn a_fresh_machine_gets_compiler_and_linker() {
        let probe = Probe {
            missing_compiler: COMPILER.to_vec(),
            missing_linker_build: LINKER_BUILD.to_vec(),
            ..Probe::default()
        };
        let Choice::Debian {
            install,
            build_linker: true,
        } = choose(probe)
        else {
            panic!("wrong way")
        };
        assert_eq!(install, [&COMPILER[..], &LINKER_BUILD[..]].concat());
    }

    #[test]
    fn what_built_the_linker_is_not_needed_once_it_is_there() {
        let probe = Probe {
            missing_linker_build: LINKER_BUILD.to_vec(),
            own_linker: true,
            ..Probe::default()
        };
        assert_eq!(
            choose(probe),
            Choice::Debian {
                install: vec![],
                build_linker: false
            }
        );
    }

    #[test]
    fn the_linker_alone_is_built_without_packages() {
        assert_eq!(
            choose(Probe::default()),
            Choice::Debian {
                install: vec![],
                build_linker: true
            }
        );
    }

    #[test]
    fn nightlies_are_ranked_and_need_their_source() {
        let toolchains = env::temp_dir().join(format!("culvert-toolchains-{}", std::process::id()));
        let add = |name: &str, source: bool| {
            let library = toolchains
                .join(name)
                .join("lib/rustlib/src/rust/library/core");
            fs::create_dir_all(&library).unwrap();
            if source {
                fs::write(library.join("Cargo.toml"), "").unwrap();
            }
        };
        let found = || {
            let dir = nightly_with_source(&toolchains)?;
            Some(dir.file_name()?.to_str()?.to_owned())
        };
        assert_eq!(found(), None, "no rustup at all");
        add("stable-x86_64", true);
        add("nightly-x86_64", false);
        assert_eq!(found(), None, "a nightly without source");
        add("nightly-2026-01-02-x86_64", true);
        add("nightly-2026-03-01-x86_64", true);
        assert_eq!(found().as_deref(), Some("nightly-2026-03-01-x86_64"));
        add("nightly-x86_64", true);
        assert_eq!(found().as_deref(), Some("nightly-x86_64"));
        fs::remove_dir_all(&toolchains).unwrap();
    }

    #[test]
    fn llvm_is_read_from_what_rustc_says() {
        let text = "rustc 1.96.0\nrelease: 1.96.0\nLLVM version: 22.1.8\n";
        assert_eq!(llvm_major(text), Some(22));
        assert_eq!(llvm_major("rustc 1.96.0\n"), None);
    }
}
