//! The kernels that are booted, and how they get from Debian's archive to `target/vm/kernels/SERIES`, once. The
//! machine's own package lists and its set of packages stay as they are. It does not know what is run on them.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

use super::mirror::{Mirrors, Repository};
use crate::{
    cmd::{announce, command, output, run, show},
    project::Project,
};

/// Debian's public key ring, from the package `debian-archive-keyring`, which every Debian has.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// What is expected of Culvert on a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// The tests pass.
    Works,
    /// Too old: refused, with the reason, and nothing is changed.
    Refused,
}

/// A kernel series and where Debian has it.
#[derive(Debug)]
pub(super) struct Series {
    pub(super) name: &'static str,
    pub(super) role: Role,
    /// Packages are called PREFIX…SUFFIX, with numbers between; the highest is taken.
    prefix: &'static str,
    suffix: &'static str,
    suites: &'static [(Repository, &'static str)],
}

/// Every kernel that is tried, oldest supported first.
pub(super) const SERIES: [Series; 3] = [
    Series {
        name: "6.1",
        role: Role::Works,
        prefix: "linux-image-6.1.0-",
        suffix: "-cloud-amd64-unsigned",
        suites: &[
            (Repository::Main, "bookworm"),
            (Repository::Security, "bookworm-security"),
        ],
    },
    Series {
        name: "6.12",
        role: Role::Works,
        prefix: "linux-image-6.12.",
        suffix: "+deb12-cloud-amd64-unsigned",
        // Once bookworm is in long-term support, newer ones come by way of security.
        suites: &[
            (Repository::Main, "bookworm-backports"),
            (Repository::Security, "bookworm-security"),
        ],
    },
    Series {
        name: "5.10",
        role: Role::Refused,
        prefix: "linux-image-5.10.0-",
        suffix: "-cloud-amd64-unsigned",
        suites: &[
            (Repository::Main, "bullseye"),
            (Repository::Security, "bullseye-security"),
        ],
    },
];

/// An unpacked kernel package.
#[derive(Debug)]
pub(super) struct Kernel {
    /// As `uname -r` says.
    pub(super) release: String,
    pub(super) image: PathBuf,
    pub(super) modules: PathBuf,
}

/// The kernel of a series, fetched if this is the first time.
pub(super) fn ensure(project: &Project, series: &Series) -> Result<Kernel> {
    let place = project.target.join("vm/kernels").join(series.name);
    if !place.is_dir() {
        fetch(project, series, &place)
            .with_context(|| format!("cannot get a kernel {} from Debian", series.name))?;
    }
    find(&place)
}

fn find(place: &Path) -> Result<Kernel> {
    let cure = || {
        format!(
            "{} is not whole: remove it and run this again",
            place.display()
        )
    };
    for entry in fs::read_dir(place.join("boot")).with_context(cure)? {
        let entry = entry.with_context(cure)?;
        let name = entry.file_name();
        if let Some(release) = name.to_str().and_then(|name| name.strip_prefix("vmlinuz-")) {
            let modules = place.join("lib/modules").join(release);
            if modules.is_dir() {
                return Ok(Kernel {
                    release: release.to_owned(),
                    image: entry.path(),
                    modules,
                });
            }
        }
    }
    bail!(cure())
}

/// Works in a directory of its own and publishes by rename: a kernel is there whole or not at all.
fn fetch(project: &Project, series: &Series, place: &Path) -> Result<()> {
    let work = project
        .target
        .join("vm")
        .join(format!("fetch-{}", series.name));
    remove(&work)?;
    let apt = Apt::set_up(&work, &Mirrors::of_this_machine()?, series.suites)?;
    announce(&format!(
        "read the package lists of {} into {} (the lists of this machine stay as they are)",
        series
            .suites
            .iter()
            .map(|(_, suite)| *suite)
            .collect::<Vec<_>>()
            .join(" and "),
        work.display()
    ));
    run(command("apt-get")
        .arg("--config-file")
        .arg(&apt.config)
        .args(["--quiet", "update"]))?;
    let names = output(
        command("apt-cache")
            .arg("--config-file")
            .arg(&apt.config)
            .arg("pkgnames")
            .arg(series.prefix),
    )?;
    let package = apt.download(&newest_first(&names, series.prefix, series.suffix))?;

    let root = work.join("root");
    announce(&format!(
        "unpack {} into {}",
        package.display(),
        place.display()
    ));
    run(command("dpkg").arg("--extract").arg(&package).arg(&root))?;
    fs::create_dir_all(place.parent().context("no parent")?)?;
    fs::rename(&root, place).with_context(|| format!("cannot create {}", place.display()))?;
    remove(&work)
}

fn remove(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

/// An apt with its own lists and sources.
struct Apt {
    config: PathBuf,
    downloads: PathBuf,
}

impl Apt {
    fn set_up(work: &Path, mirrors: &Mirrors, suites: &[(Repository, &str)]) -> Result<Self> {
        for dir in ["lists/partial", "cache/archives/partial", "downloads"] {
            let dir = work.join(dir);
            fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        }
        let sources = work.join("sources.list");
        fs::write(&sources, source_list(mirrors, suites)?)?;
        let config = work.join("apt.conf");
        fs::write(&config, configuration(work))?;
        Ok(Self {
            config,
            downloads: work.join("downloads"),
        })
    }

    /// Downloads the first of these that the mirror has. Old suites name packages in their lists that are gone from
    /// the pool, so the next older one gets its chance.
    fn download(&self, names: &[String]) -> Result<PathBuf> {
        for name in names {
            let mut apt = command("apt-get");
            apt.current_dir(&self.downloads);
            apt.arg("--config-file")
                .arg(&self.config)
                .args(["--quiet", "download", name]);
            announce(&show(&apt));
            if run(&mut apt).is_ok() {
                let file = fs::read_dir(&self.downloads)?
                    .next()
                    .context("apt-get left no file")??;
                return Ok(file.path());
            }
            eprintln!("the mirror does not have {name}: trying the next older one");
        }
        bail!("the mirror has none of: {}", names.join(" "))
    }
}

fn source_list(mirrors: &Mirrors, suites: &[(Repository, &str)]) -> Result<String> {
    let mut list = String::new();
    for (repository, suite) in suites {
        // A machine without security updates configured still has the kernel of the last point release.
        if let Some(uri) = mirrors.uri(*repository) {
            list.push_str(&format!("deb [arch=amd64 lang=none target=Packages signed-by={KEYRING}] {uri} {suite} main\n"));
        }
    }
    Ok(list)
}

/// The rest of the machine's configuration (proxies, credentials, time-outs) holds as it is. Hooks that run after an
/// update refresh caches of the machine and are none of our business.
fn configuration(work: &Path) -> String {
    let work = work.display();
    format!(
        "#clear APT::Update::Pre-Invoke;\n\
         #clear APT::Update::Post-Invoke;\n\
         #clear APT::Update::Post-Invoke-Success;\n\
         APT::Sandbox::User \"root\";\n\
         Dir::Etc::sourcelist \"{work}/sources.list\";\n\
         Dir::Etc::sourceparts \"-\";\n\
         Dir::State::lists \"{work}/lists\";\n\
         Dir::Cache \"{work}/cache\";\n"
    )
}

/// The packages of this name pattern, highest version first.
fn newest_first(names: &str, prefix: &str, suffix: &str) -> Vec<String> {
    let mut found: Vec<_> = names
        .lines()
        .filter_map(|name| {
            let version = name.strip_prefix(prefix)?.strip_suffix(suffix)?;
            // Only numbers and dots: `0.deb11.52` is a backport to another release.
            let numbers: Option<Vec<u32>> =
                version.split('.').map(|part| part.parse().ok()).collect();
            Some((numbers?, name.to_owned()))
        })
        .collect();
    found.sort();
    found.into_iter().rev().map(|(_, name)| name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_number_wins_not_the_last_in_the_alphabet() {
        let names = "linux-image-6.12.95+deb12-cloud-amd64-unsigned\n\
                     linux-image-6.12.117+deb12-cloud-amd64-unsigned\n\
                     linux-image-6.12.117+deb12-amd64-unsigned\n\
                     linux-image-6.12.117+deb12-cloud-amd64\n";
        let series = &SERIES[1];
        assert_eq!(
            newest_first(names, series.prefix, series.suffix),
            [
                "linux-image-6.12.117+deb12-cloud-amd64-unsigned",
                "linux-image-6.12.95+deb12-cloud-amd64-unsigned"
            ]
        );
    }

    #[test]
    fn a_backport_to_another_release_is_not_taken() {
        let names = "linux-image-6.1.0-0.deb11.52-cloud-amd64-unsigned\n\
                     linux-image-6.1.0-9-cloud-amd64-unsigned\n\
                     linux-image-6.1.0-56-cloud-amd64-unsigned\n";
        let series = &SERIES[0];
        assert_eq!(
            newest_first(names, series.prefix, series.suffix),
            [
                "linux-image-6.1.0-56-cloud-amd64-unsigned",
                "linux-image-6.1.0-9-cloud-amd64-unsigned"
            ]
        );
    }

    #[test]
    fn sources_name_the_machines_mirror_and_demand_debians_key() {
        let mirrors = Mirrors::new("http://mirror.example/debian/", None);
        let list = source_list(&mirrors, SERIES[0].suites).unwrap();
        assert_eq!(
            list,
            "deb [arch=amd64 lang=none target=Packages signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] \
             http://mirror.example/debian/ bookworm main\n"
        );
    }
}
