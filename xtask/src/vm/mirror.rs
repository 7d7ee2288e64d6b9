//! Which Debian mirror this machine uses, from its own apt configuration. No host is ever named here.

use std::fs;

use anyhow::{Context as _, Result};

use crate::cmd::{command, output};

/// The two archives of Debian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Repository {
    Main,
    Security,
}

/// Where this machine gets Debian packages from.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Mirrors {
    main: String,
    security: Option<String>,
}

/// One package index that apt is configured for.
struct Index<'a> {
    origin: &'a str,
    release: &'a str,
    uri: &'a str,
}

impl Mirrors {
    #[cfg(test)]
    pub(super) fn new(main: &str, security: Option<&str>) -> Self {
        Self {
            main: main.to_owned(),
            security: security.map(str::to_owned),
        }
    }

    /// Asks apt, which answers from its configuration even before any list was fetched.
    pub(super) fn of_this_machine() -> Result<Self> {
        let indexes = output(command("apt-get").args([
            "indextargets",
            "--format",
            "$(ORIGIN)\t$(RELEASE)\t$(COMPONENT)\t$(REPO_URI)",
            "Created-By: Packages",
        ]))
        .context("the kernels come from Debian's archive, by way of apt")?;
        let system =
            fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
        Self::choose(&indexes, codename(&system).unwrap_or("stable")).with_context(|| {
            "no Debian mirror among this machine's apt sources: add a line such as \
             `deb http://MIRROR/debian bookworm main` to /etc/apt/sources.list"
        })
    }

    pub(super) fn uri(&self, repository: Repository) -> Option<&str> {
        match repository {
            Repository::Main => Some(&self.main),
            Repository::Security => self.security.as_deref(),
        }
    }

    /// Third parties call their releases by Debian's names as well; the origin tells, once the lists were fetched.
    /// A wrong guess before that fails on the signature, it is never believed.
    fn choose(indexes: &str, codename: &str) -> Option<Self> {
        let indexes: Vec<_> = indexes.lines().filter_map(index).collect();
        let find = |releases: &[&str]| {
            let of_release = |index: &&Index<'_>| releases.contains(&index.release);
            let debians = indexes
                .iter()
                .filter(of_release)
                .find(|index| index.origin == "Debian");
            let unknown = indexes
                .iter()
                .filter(of_release)
                .find(|index| index.origin.is_empty());
            Some(debians.or(unknown)?.uri.to_owned())
        };
        let security = format!("{codename}-security");
        Some(Self {
            main: find(&[codename, "stable", "oldstable"])?,
            security: find(&[&security, "stable-security", "oldstable-security"]),
        })
    }
}

fn index(line: &str) -> Option<Index<'_>> {
    let mut fields = line.split('\t');
    let (origin, release, component, uri) = (
        fields.next()?,
        fields.next()?,
        fields.next()?,
        fields.next()?,
    );
    // A field that is not known comes back as it was asked for.
    let origin = if origin.starts_with('$') { "" } else { origin };
    (component == "main").then_some(Index {
        origin,
        release,
        uri,
    })
}

fn codename(os_release: &str) -> Option<&str> {
    os_release
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debians_own_are_chosen_among_third_parties() {
        let indexes = "Docker\tbookworm\tmain\thttps://docker.example/debian/\n\
                       Debian\tbookworm-updates\tmain\thttp://mirror.example/debian/\n\
                       Debian\tbookworm\tcontrib\thttp://contrib.example/debian/\n\
                       Debian\tbookworm\tmain\thttp://mirror.example/debian/\n\
                       Debian\tbookworm-security\tmain\thttp://mirror.example/debian-security/\n";
        assert_eq!(
            Mirrors::choose(indexes, "bookworm").unwrap(),
            Mirrors::new(
                "http://mirror.example/debian/",
                Some("http://mirror.example/debian-security/")
            )
        );
    }

    #[test]
    fn lists_that_were_never_fetched_have_no_origin() {
        let indexes = "$(ORIGIN)\ttrixie\tmain\thttp://mirror.example/debian/\n";
        assert_eq!(
            Mirrors::choose(indexes, "trixie").unwrap(),
            Mirrors::new("http://mirror.example/debian/", None)
        );
    }

    #[test]
    fn no_debian_no_mirror() {
        assert_eq!(
            Mirrors::choose("Ubuntu\tnoble\tmain\thttp://u.example/ubuntu/\n", "noble"),
            None
        );
        assert_eq!(Mirrors::choose("", "bookworm"), None);
    }
}
