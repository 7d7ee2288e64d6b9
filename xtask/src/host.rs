//! Changes to the machine: Debian packages and the bpffs mount. Each is looked for first (files only, no network),
//! announced before it is made, and refused with the command to type when we are not root.

use std::{
    env, fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

use crate::cmd::{announced, command};

/// A Debian package, and a file that tells that it (or the same thing from elsewhere) is there: an absolute path, or
/// the name of a program to be found on PATH.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Package {
    pub(crate) name: &'static str,
    pub(crate) proof: &'static str,
}

/// Programs that the demonstration, the end-to-end tests and the benchmarks run, as they come from Debian.
pub(crate) const PROGRAMS: &[Package] = &[
    Package {
        name: "bind9-dnsutils",
        proof: "dig",
    },
    // `bridge` and `host-local`: what the plugin is chained behind.
    Package {
        name: "containernetworking-plugins",
        proof: "/usr/lib/cni/bridge",
    },
    Package {
        name: "curl",
        proof: "curl",
    },
    Package {
        name: "dnsmasq-base",
        proof: "dnsmasq",
    },
    Package {
        name: "iperf3",
        proof: "iperf3",
    },
    Package {
        name: "iproute2",
        proof: "ip",
    },
    Package {
        name: "iptables",
        proof: "iptables-restore",
    },
    Package {
        name: "nftables",
        proof: "nft",
    },
    Package {
        name: "libc-ares-dev",
        proof: "/usr/include/ares.h",
    },
    Package {
        name: "musl-tools",
        proof: "musl-gcc",
    },
    Package {
        name: "nginx",
        proof: "nginx",
    },
];

/// What runs the nodes of a test cluster, as it comes from Debian.
pub(crate) const CLUSTER: &[Package] = &[
    Package {
        name: "busybox-static",
        proof: "busybox",
    },
    Package {
        name: "conntrack",
        proof: "conntrack",
    },
    Package {
        name: "containerd",
        proof: "containerd",
    },
    Package {
        name: "containernetworking-plugins",
        proof: "/usr/lib/cni/bridge",
    },
    Package {
        name: "curl",
        proof: "curl",
    },
    Package {
        name: "iproute2",
        proof: "ip",
    },
    Package {
        name: "iptables",
        proof: "iptables-restore",
    },
    Package {
        name: "nftables",
        proof: "nft",
    },
    Package {
        name: "runc",
        proof: "runc",
    },
    // What is seen on a node's wires.
    Package {
        name: "tcpdump",
        proof: "tcpdump",
    },
];

/// The compiler that Cilium's agent runs when it starts.
pub(crate) const CILIUM: &[Package] = &[
    Package {
        name: "clang-19",
        proof: "/usr/lib/llvm-19/bin/clang",
    },
    Package {
        name: "llvm-19",
        proof: "/usr/lib/llvm-19/bin/llvm-objcopy",
    },
];

impl Package {
    fn is_there(self) -> bool {
        if self.proof.starts_with('/') {
            Path::new(self.proof).exists()
        } else {
            find_program(self.proof).is_some()
        }
    }
}

/// The packages of the list that are not there.
pub(crate) fn missing(packages: &[Package]) -> Vec<Package> {
    packages
        .iter()
        .copied()
        .filter(|package| !package.is_there())
        .collect()
}

/// Looks a program up on PATH, and where Debian keeps programs for root.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

/// True when the effective user is root.
pub(crate) fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|data| data.uid() == 0)
}

/// Fails unless root, saying what to type.
pub(crate) fn require_root(verb: &str) -> Result<()> {
    if is_root() {
        return Ok(());
    }
    bail!(
        "`cargo xtask {verb}` works with network namespaces and eBPF programs and needs root. Run as root:\n    \
         cargo xtask {verb}\nor, if root has no Rust of its own:\n    \
         sudo env \"PATH=$PATH\" \"HOME=$HOME\" cargo xtask {verb}"
    );
}

/// The line that installs packages.
pub(crate) fn install_line(packages: &[Package]) -> String {
    let names: Vec<_> = packages.iter().map(|package| package.name).collect();
    format!(
        "apt-get install --yes --no-install-recommends {}",
        names.join(" ")
    )
}

/// Makes sure of a list of packages; `purpose` says in the error what they are for.
pub(crate) fn ensure_packages(packages: &[Package], purpose: &str) -> Result<()> {
    let missing = missing(packages);
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<_> = missing.iter().map(|package| package.name).collect();
    if find_program("apt-get").is_none() {
        bail!(
            "{purpose} needs these Debian packages, or what corresponds to them here: {}",
            names.join(" ")
        );
    }
    if !is_root() {
        bail!(
            "{purpose} needs packages that are not installed. Run as root:\n    {}",
            install_line(&missing)
        );
    }
    eprintln!("{purpose} needs packages: {}", names.join(" "));
    let no_services = NoServices::set()?;
    if apt_install(&names).is_err() {
        // The lists are missing or old: only now is an update worth its time.
        announced(command("apt-get").arg("update"))?;
        apt_install(&names).with_context(|| format!("{purpose} needs: {}", names.join(" ")))?;
    }
    drop(no_services);
    for name in names {
        disable_service(name)?;
    }
    Ok(())
}

/// A service that came with a package we wanted for its program alone must not start at the next boot either.
fn disable_service(package: &str) -> Result<()> {
    let unit = format!("{package}.service");
    if Path::new("/run/systemd/system").exists()
        && Path::new("/lib/systemd/system").join(&unit).exists()
    {
        announced(command("systemctl").args(["disable", &unit]))?;
    }
    Ok(())
}

fn apt_install(names: &[&str]) -> Result<()> {
    announced(
        command("apt-get")
            .args(["install", "--yes", "--no-install-recommends"])
            .args(names)
            .env("DEBIAN_FRONTEND", "noninteractive"),
    )
}

/// Keeps packages from starting their services on this machine while they are installed: a test tool must not leave a
/// web server on port 80.
struct NoServices(Option<&'static Path>);

impl NoServices {
    fn set() -> Result<Self> {
        let policy = Path::new("/usr/sbin/policy-rc.d");
        if policy.exists() {
            return Ok(Self(None));
        }
        crate::cmd::announce(&format!(
            "create {} while packages are installed, so that no service starts",
            policy.display()
        ));
        fs::write(policy, "#!/bin/sh\nexit 101\n")
            .with_context(|| format!("cannot write {}", policy.display()))?;
        let this = Self(Some(policy));
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(policy, mode)
            .with_context(|| format!("cannot make {} executable", policy.display()))?;
        Ok(this)
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        let Some(policy) = self.0 else { return };
        crate::cmd::announce(&format!("remove {}", policy.display()));
        if let Err(error) = fs::remove_file(policy) {
            eprintln!(
                "cannot remove {}: {error}; remove it, or no package can start its service",
                policy.display()
            );
        }
    }
}

/// Mounts bpffs where everybody expects it.
pub(crate) fn ensure_bpffs() -> Result<()> {
    let mounts =
        fs::read_to_string("/proc/self/mounts").context("cannot read /proc/self/mounts")?;
    if has_bpffs(&mounts) {
        return Ok(());
    }
    announced(command("mount").args(["-t", "bpf", "bpf", "/sys/fs/bpf"]))
        .context("cannot mount bpffs at /sys/fs/bpf: in a container it needs CAP_SYS_ADMIN and a writable /sys")
}

fn has_bpffs(mounts: &str) -> bool {
    mounts.lines().any(|line| {
        let mut fields = line.split(' ').skip(1);
        fields.next() == Some("/sys/fs/bpf") && fields.next() == Some("bpf")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bpffs_is_found_where_it_counts() {
        assert!(has_bpffs(
            "proc /proc proc rw 0 0\nbpf /sys/fs/bpf bpf rw,mode=700 0 0\n"
        ));
        assert!(has_bpffs("none /sys/fs/bpf bpf rw 0 0"));
        assert!(!has_bpffs(
            "bpf /tmp/bpf bpf rw 0 0\ntmpfs /sys/fs/bpf tmpfs rw 0 0\n"
        ));
        assert!(!has_bpffs(""));
    }

    #[test]
    fn packages_are_proven_by_a_program_or_a_file() {
        let there = Package {
            name: "a",
            proof: "sh",
        };
        let file = Package {
            name: "b",
            proof: "/proc/self/mounts",
        };
        let absent = Package {
            name: "c",
            proof: "no-such-program-anywhere",
        };
        let gone = Package {
            name: "d",
            proof: "/no/such/file",
        };
        assert_eq!(missing(&[there, absent, file, gone]), [absent, gone]);
        assert_eq!(
            install_line(&[absent, gone]),
            "apt-get install --yes --no-install-recommends c d"
        );
        assert!(
            ensure_packages(&[there, file], "nothing").is_ok(),
            "nothing to do is done without root"
        );
    }
}
