//! The resolvers that a pod's own programs ask: the `nameserver` lines of its `/etc/resolv.conf`, as its processes see it.
//!
//! Reads only. A pod's file system is the pod's: links in it lead nowhere else, and what is no short plain file is not
//! read.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File, OpenOptions},
    io::{self, Read as _},
    net::IpAddr,
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::Path,
};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};

use super::{error::Result, netns::Netns, procfs};

/// Longer files are nobody's `resolv.conf`.
const LONGEST: u64 = 64 * 1024;

/// The first of one file that count; the C libraries stop at three.
const MOST_OF_ONE: usize = 16;
/// Those of one pod that count. All pods share a map, and its processes may have as many roots as they like.
const MOST: usize = 64;

/// The resolvers of all processes in the namespace, sorted; empty while there is no process, or none with such a file.
pub fn of(netns: &Netns) -> Result<Vec<IpAddr>> {
    let of_one = of_each(&[netns])?.into_values().next();
    Ok(of_one.unwrap_or_default())
}

/// The same for several namespaces in one look through the processes, by device and inode of each that has any.
pub fn of_each(wanted: &[&Netns]) -> Result<BTreeMap<(u64, u64), Vec<IpAddr>>> {
    let wanted: BTreeSet<_> = wanted.iter().map(|n| (n.dev(), n.inode())).collect();
    let mut found: BTreeMap<(u64, u64), Vec<IpAddr>> = BTreeMap::new();
    for pid in procfs::processes(Path::new(procfs::PROC))? {
        let Ok(inside) = fs::metadata(format!("/proc/{pid}/ns/net")) else {
            continue;
        };
        let inside = (inside.dev(), inside.ino());
        if !wanted.contains(&inside) {
            continue;
        }
        match read(&format!("/proc/{pid}/root")) {
            Ok(text) => add(found.entry(inside).or_default(), nameservers(&text)),
            // It ended, or has none.
            Err(error) if procfs::vanished(&error) => {}
            Err(error) => tracing::debug!(pid, %error, "reading a pod's resolv.conf"),
        }
    }
    for resolvers in found.values_mut() {
        resolvers.sort_unstable();
    }
    found.retain(|_, resolvers| !resolvers.is_empty());
    Ok(found)
}

/// Adds what one file names, as far as there is room.
fn add(resolvers: &mut Vec<IpAddr>, named: impl Iterator<Item = IpAddr>) {
    for resolver in named.take(MOST_OF_ONE) {
        if resolvers.len() < MOST && !resolvers.contains(&resolver) {
            resolvers.push(resolver);
        }
    }
}

fn read(root: &str) -> io::Result<String> {
    let root = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
        .open(root)?;
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let file = File::from(openat2(&root, "etc/resolv.conf", how)?);
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("no plain file"));
    }
    let mut text = Vec::new();
    file.take(LONGEST).read_to_end(&mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

fn nameservers(text: &str) -> impl Iterator<Item = IpAddr> {
    text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let is = words.next() == Some("nameserver");
        let address = words.next().filter(|_| is)?;
        // A link-local one names its interface.
        let address = address.split('%').next().unwrap_or(address);
        address.parse::<IpAddr>().ok().map(|ip| ip.to_canonical())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nameserver_lines_and_nothing_else() {
        let text = "# nameserver 1.1.1.1\nsearch a.test b.test\nnameserver 10.96.0.10\n nameserver\tfd00::a # x\n\
                    nameserver fe80::1%eth0\nnameservers 9.9.9.9\nnameserver\nnameserver x\noptions ndots:5\n";
        let found: Vec<_> = nameservers(text).map(|ip| ip.to_string()).collect();
        assert_eq!(found, ["10.96.0.10", "fd00::a", "fe80::1"]);
    }

    #[test]
    fn a_pod_that_names_thousands_gets_a_few() {
        let of = |file: u8| {
            let lines = (0..=255).map(move |n| format!("nameserver 10.0.{file}.{n}\n"));
            lines.collect::<String>()
        };
        let mut resolvers = Vec::new();
        for file in [0, 0, 1] {
            add(&mut resolvers, nameservers(&of(file)));
        }
        let named: Vec<_> = resolvers.iter().map(ToString::to_string).collect();
        assert_eq!(named.len(), 2 * MOST_OF_ONE);
        assert_eq!((&*named[0], &*named[16]), ("10.0.0.0", "10.0.1.0"));
        for file in 2..=255 {
            add(&mut resolvers, nameservers(&of(file)));
        }
        assert_eq!(resolvers.len(), MOST);
    }

    #[test]
    fn a_link_leads_nowhere_out_of_the_root() {
        let root = std::env::temp_dir().join(format!("culvert-resolv-{}", std::process::id()));
        fs::create_dir_all(root.join("etc")).unwrap();
        fs::create_dir_all(root.join("run")).unwrap();
        let at = root.join("etc/resolv.conf");
        let of = || read(root.to_str().unwrap());
        std::os::unix::fs::symlink("/run/stub.conf", &at).unwrap();
        assert!(of().is_err());
        fs::write(root.join("run/stub.conf"), "nameserver 10.0.0.1\n").unwrap();
        assert_eq!(of().unwrap(), "nameserver 10.0.0.1\n");
        fs::remove_file(&at).unwrap();
        nix::unistd::mkfifo(&at, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(of().is_err());
        fs::remove_dir_all(&root).unwrap();
    }
}
