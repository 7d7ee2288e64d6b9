//! Kernel modules: which files of a kernel package a guest has to load, and in what order. Read from the modules
//! themselves, because a package that is only unpacked has no `modules.dep`. It loads nothing.
//!
//! What was found on Debian's cloud kernels 5.10, 6.1 and 6.12: IPv6, AF_PACKET, AF_UNIX, policy routing, MPTCP (not
//! 5.10), the BPF parts, cgroup v2, the serial port and devtmpfs are built in; everything in [`WANTED`] is a module,
//! and none is loaded on demand in the guest, as there is no modprobe with an index. 6.12 packs its modules with xz and
//! is built without `CONFIG_MODULE_DECOMPRESS`, so they are unpacked here.

use std::{
    collections::{HashMap, HashSet},
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

use crate::cmd::{command, run};

/// What the tests use beyond what is built in: pods on veth pairs and a bridge, interfaces added later, a VM's tap,
/// and the netlink interface by which sockets that still carry our marks are found.
pub(super) const WANTED: [&str; 7] = [
    "veth",
    "bridge",
    "dummy",
    "tun",
    "inet_diag",
    "tcp_diag",
    "udp_diag",
];

/// A module ready to be handed to the kernel.
pub(super) struct Module {
    pub(super) name: String,
    pub(super) content: Vec<u8>,
}

/// The wanted modules and what they need, each after its needs. What is built into the kernel is left out.
/// `unpacked` is a directory for the unpacked form of packed modules.
pub(super) fn load_order(
    tree: &Path,
    wanted: &[&str],
    busybox: &Path,
    unpacked: &Path,
) -> Result<Vec<Module>> {
    let built_in = fs::read_to_string(tree.join("modules.builtin")).with_context(|| {
        format!(
            "cannot read the list of built-in modules in {}",
            tree.display()
        )
    })?;
    let mut loader = Loader {
        files: HashMap::new(),
        built_in: built_in
            .lines()
            .filter_map(|line| module_name(Path::new(line)))
            .collect(),
        seen: HashSet::new(),
        order: Vec::new(),
        busybox,
        unpacked,
    };
    index(&tree.join("kernel"), &mut loader.files)?;
    for name in wanted {
        loader.visit(name)?;
    }
    Ok(loader.order)
}

struct Loader<'a> {
    files: HashMap<String, PathBuf>,
    built_in: HashSet<String>,
    seen: HashSet<String>,
    order: Vec<Module>,
    busybox: &'a Path,
    unpacked: &'a Path,
}

impl Loader<'_> {
    fn visit(&mut self, name: &str) -> Result<()> {
        // Dependencies cannot form a circle: the kernel's build refuses that.
        if self.built_in.contains(name) || !self.seen.insert(name.to_owned()) {
            return Ok(());
        }
        let file = self.files.get(name).with_context(|| {
            format!("this kernel has no module {name}, neither built in nor as a file")
        })?;
        let content = self.read(file)?;
        for needed in depends(&content)
            .with_context(|| format!("{} does not say what it depends on", file.display()))?
        {
            self.visit(&needed)?;
        }
        self.order.push(Module {
            name: name.to_owned(),
            content,
        });
        Ok(())
    }

    fn read(&self, file: &Path) -> Result<Vec<u8>> {
        let plain = match file.extension().and_then(|extension| extension.to_str()) {
            Some("ko") => return read(file),
            Some("xz") => self
                .unpacked
                .join(file.file_name().context("a module without a name")?),
            _ => bail!(
                "{} is packed in a way that is not known here: teach it to {}",
                file.display(),
                file!()
            ),
        };
        fs::copy(file, &plain).with_context(|| format!("cannot copy {}", file.display()))?;
        // The busybox that goes into the guest can unpack, so that no other program is needed.
        run(command(self.busybox).arg("unxz").arg("-f").arg(&plain))?;
        read(&plain.with_extension(""))
    }
}

fn read(file: &Path) -> Result<Vec<u8>> {
    fs::read(file).with_context(|| format!("cannot read {}", file.display()))
}

fn index(dir: &Path, files: &mut HashMap<String, PathBuf>) -> Result<()> {
    let entries = fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))?;
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            index(&entry.path(), files)?;
        } else if let Some(name) = module_name(&entry.path()) {
            files.insert(name, entry.path());
        }
    }
    Ok(())
}

/// The module's name as the kernel writes it, if the file is a module: `kernel/lib/crc32-x.ko.xz` is `crc32_x`.
fn module_name(file: &Path) -> Option<String> {
    let (name, _) = file.file_name()?.to_str()?.split_once(".ko")?;
    Some(name.replace('-', "_"))
}

/// The names in the module's `depends=` line. It lies in the section `.modinfo`, a list of NUL-terminated strings,
/// where every module has exactly one.
fn depends(module: &[u8]) -> Option<Vec<String>> {
    const KEY: &[u8] = b"\0depends=";
    let start = module.windows(KEY.len()).position(|window| window == KEY)? + KEY.len();
    let end = start + module[start..].iter().position(|&byte| byte == 0)?;
    let names = str::from_utf8(&module[start..end]).ok()?;
    Some(
        names
            .split(',')
            .filter(|name| !name.is_empty())
            .map(|name| name.replace('-', "_"))
            .collect(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_kernels_own() {
        assert_eq!(
            module_name(Path::new("kernel/net/veth.ko")).as_deref(),
            Some("veth")
        );
        assert_eq!(
            module_name(Path::new("kernel/virtio-rng.ko.xz")).as_deref(),
            Some("virtio_rng")
        );
        assert_eq!(module_name(Path::new("modules.order")), None);
    }

    #[test]
    fn dependencies_are_read_from_modinfo() {
        assert_eq!(
            depends(b"ELF\0license=GPL\0depends=llc,stp\0name=bridge\0").unwrap(),
            ["llc", "stp"]
        );
        assert!(depends(b"ELF\0depends=\0name=veth\0").unwrap().is_empty());
        assert_eq!(depends(b"ELF\0name=veth\0"), None);
    }

    #[test]
    fn needs_come_first_and_once_and_built_in_ones_not_at_all() {
        let tree = std::env::temp_dir().join(format!("culvert-modules-{}", std::process::id()));
        let net = tree.join("kernel/net");
        fs::create_dir_all(&net).unwrap();
        fs::write(
            tree.join("modules.builtin"),
            "kernel/net/packet/af_packet.ko\n",
        )
        .unwrap();
        for (name, needs) in [
            ("bridge", "llc,stp,af_packet"),
            ("stp", "llc"),
            ("llc", ""),
            ("veth", ""),
        ] {
            fs::write(
                net.join(format!("{name}.ko")),
                format!("ELF\0depends={needs}\0name={name}\0"),
            )
            .unwrap();
        }
        let order = load_order(
            &tree,
            &["veth", "bridge", "af_packet"],
            Path::new("busybox"),
            &tree,
        );
        let missing = load_order(&tree, &["dummy"], Path::new("busybox"), &tree);
        fs::remove_dir_all(&tree).unwrap();

        let names: Vec<_> = order
            .unwrap()
            .into_iter()
            .map(|module| module.name)
            .collect();
        assert_eq!(names, ["veth", "llc", "stp", "bridge"]);
        assert!(missing.err().unwrap().to_string().contains("dummy"));
    }
}
