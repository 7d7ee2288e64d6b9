//! The lab as a whole: what it makes at the start and how all of it goes away at the end, also when a test panics.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::cgroup::Cgroup;
use crate::ns::Face;
use crate::paths::lab_id;
use crate::{Ns, PodBuilder, Route, bpffs, cgroup, sweep};

/// The bridge that pods are joined to.
pub(crate) const BRIDGE: &str = "br0";
/// The node's address on that bridge. Each lab has its own namespaces, so all labs use the same ones.
pub(crate) const GATEWAY4: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
pub(crate) const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 1);
/// Wide enough for hundreds of pods.
pub(crate) const PREFIX4: u8 = 16;
pub(crate) const PREFIX6: u8 = 64;

const OUTSIDE_NODE4: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 1);
const OUTSIDE_NODE6: Ipv6Addr = Ipv6Addr::new(0xfd88, 0, 0, 0, 0, 0, 0, 1);
const OUTSIDE4: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 2);
const OUTSIDE6: Ipv6Addr = Ipv6Addr::new(0xfd88, 0, 0, 0, 0, 0, 0, 2);

/// Labs of one name in one process before it is taken for a mistake.
const ATTEMPTS: u32 = 1000;

/// A node with its pods. Dropping it ends its processes and removes all it made.
#[derive(Debug)]
pub struct Lab {
    id: String,
    cgroup: Cgroup,
    bpffs: PathBuf,
    scratch: PathBuf,
    namespaces: Mutex<Vec<Ns>>,
    /// Always there after `new`; apart from `namespaces` so that it can be lent out.
    node: Option<Ns>,
    outside: std::sync::OnceLock<Ns>,
    addresses: AtomicU16,
    ifnames: AtomicU16,
}

impl Lab {
    /// Makes a lab with its node and bridge. Needs root; the error says so.
    pub fn new(name: &str) -> Result<Self> {
        ensure!(
            nix::unistd::geteuid().is_root(),
            "the lab makes network namespaces and cgroups: run as root"
        );
        raise_file_limit();
        sweep::leftovers().context("sweeping what earlier runs left")?;
        let bpffs_root = bpffs::root()?;
        let (id, cgroup) = own_cgroup(name)?;
        let mut lab = Self {
            bpffs: bpffs_root.join(&id),
            scratch: std::env::temp_dir().join(&id),
            id,
            cgroup,
            namespaces: Mutex::default(),
            node: None,
            outside: std::sync::OnceLock::new(),
            addresses: AtomicU16::new(10),
            ifnames: AtomicU16::new(0),
        };
        // From here on Drop cleans up whatever was made.
        for dir in [&lab.bpffs, &lab.scratch] {
            std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
        }
        let node = lab.new_ns("node")?;
        for key in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"] {
            node.set_sysctl(key, "1")?;
        }
        node.add_bridge(BRIDGE)?;
        node.add_addr(BRIDGE, IpNet::V4(Ipv4Net::new_assert(GATEWAY4, PREFIX4)))?;
        node.add_addr(BRIDGE, IpNet::V6(Ipv6Net::new_assert(GATEWAY6, PREFIX6)))?;
        let ifname = BRIDGE.to_owned();
        node.set_face(Face {
            addr4: Some(GATEWAY4),
            addr6: Some(GATEWAY6),
            ifname,
            host_ifname: String::new(),
        });
        lab.node = Some(node);
        Ok(lab)
    }

    /// What everything of this lab is called: `culvert-test-<name>-<pid>`.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The node's namespace: `br0` with 10.77.0.1/16 and fd77::1/64.
    #[expect(clippy::expect_used, reason = "set before `new` hands the lab out")]
    pub fn node(&self) -> &Ns {
        self.node
            .as_ref()
            .expect("a lab has its node from the start")
    }

    /// A pod on `br0` with the next free addresses.
    pub fn pod(&self, name: &str) -> Result<Ns> {
        self.pod_builder(name).build()
    }

    /// A pod with options.
    pub fn pod_builder(&self, name: &str) -> PodBuilder<'_> {
        PodBuilder::new(self, name)
    }

    /// The rest of the world: 10.88.0.2 and fd88::2, routed through the node. Made at the first call.
    pub fn outside(&self) -> Result<Ns> {
        if let Some(ns) = self.outside.get() {
            return Ok(ns.clone());
        }
        let ns = self.new_ns("outside")?;
        let node = self.node();
        ns.add_veth("eth0", node, "out0")?;
        let nets: [(IpNet, IpNet); 2] = [
            (
                Ipv4Net::new_assert(OUTSIDE_NODE4, 24).into(),
                Ipv4Net::new_assert(OUTSIDE4, 24).into(),
            ),
            (
                Ipv6Net::new_assert(OUTSIDE_NODE6, 64).into(),
                Ipv6Net::new_assert(OUTSIDE6, 64).into(),
            ),
        ];
        for (near, far) in nets {
            node.add_addr("out0", near)?;
            ns.add_addr("eth0", far)?;
            ns.add_route(&Route::default_via(near.addr()))?;
        }
        let (ifname, host_ifname) = ("eth0".to_owned(), "out0".to_owned());
        ns.set_face(Face {
            addr4: Some(OUTSIDE4),
            addr6: Some(OUTSIDE6),
            ifname,
            host_ifname,
        });
        Ok(self.outside.get_or_init(|| ns).clone())
    }

    /// Adds an interface to a namespace and sets it up: one end of a pair whose other end, on the node, is without address
    /// or bridge. Returns that end's name, to capture what leaves.
    pub fn add_interface(&self, ns: &Ns, name: &str) -> Result<String> {
        let host_ifname = self.next_ifname();
        ns.add_veth(name, self.node(), &host_ifname)?;
        Ok(host_ifname)
    }

    /// Deletes a namespace, as when a pod ends. Fails while another handle to it is left, which would keep it alive.
    pub fn delete(&self, ns: Ns) -> Result<()> {
        let mut namespaces = self
            .namespaces
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        namespaces.retain(|kept| kept.cookie() != ns.cookie());
        ensure!(
            ns.handles() == 1,
            "{} other handles keep namespace {} alive",
            ns.handles() - 1,
            ns.name()
        );
        sweep::remove_netns(ns.path())
    }

    /// The directory below bpffs that is this lab's: `--bpffs`.
    pub fn bpffs(&self) -> &Path {
        &self.bpffs
    }

    /// The lab's cgroup: `--cgroup-root`.
    pub fn cgroup(&self) -> &Path {
        self.cgroup.dir()
    }

    /// A directory for files of the test.
    pub fn scratch(&self) -> &Path {
        &self.scratch
    }

    /// Everything below the lab's bpffs directory, relative to it, sorted.
    pub fn pins(&self) -> Result<Vec<PathBuf>> {
        bpffs::list(&self.bpffs)
    }

    pub(crate) fn new_ns(&self, name: &str) -> Result<Ns> {
        let ns = Ns::create(&self.id, name, self.cgroup.dir(), &self.scratch)?;
        self.namespaces
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(ns.clone());
        Ok(ns)
    }

    pub(crate) fn ensure_bridge(&self, name: &str) -> Result<()> {
        if self.node().ifindex(name).is_ok() {
            return Ok(());
        }
        self.node().add_bridge(name)
    }

    pub(crate) fn next_address(&self) -> u16 {
        self.addresses.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn next_ifname(&self) -> String {
        format!("veth{}", self.ifnames.fetch_add(1, Ordering::Relaxed))
    }

    fn teardown(&self) -> Vec<anyhow::Error> {
        let namespaces = std::mem::take(
            &mut *self
                .namespaces
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        );
        let mut errors = Vec::new();
        // The cgroup first: it ends the processes that use the rest.
        errors.extend(cgroup::remove(self.cgroup.dir()).err());
        errors.extend(sweep::remove_tree(&self.bpffs).err());
        errors.extend(
            namespaces
                .iter()
                .filter_map(|ns| sweep::remove_netns(ns.path()).err()),
        );
        errors.extend(sweep::remove_tree(&self.scratch).err());
        errors
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if keep() {
            eprintln!(
                "lab {} is kept: pins in {}, files in {}",
                self.id,
                self.bpffs.display(),
                self.scratch.display()
            );
            for ns in self
                .namespaces
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .iter()
            {
                eprintln!(
                    "  look into {}: nsenter --net={} bash",
                    ns.name(),
                    ns.path().display()
                );
            }
            return;
        }
        if std::thread::panicking() {
            eprintln!(
                "lab {} is removed; CULVERT_KEEP=1 keeps it and prints how to enter it",
                self.id
            );
        }
        for error in self.teardown() {
            eprintln!("lab {}: cleaning up: {error:?}", self.id);
        }
    }
}

/// Whether labs are to be kept for inspection.
pub(crate) fn keep() -> bool {
    std::env::var_os("CULVERT_KEEP").is_some_and(|value| value == "1")
}

fn own_cgroup(name: &str) -> Result<(String, Cgroup)> {
    for attempt in 0..ATTEMPTS {
        let id = lab_id(name, attempt)?;
        if let Some(cgroup) = Cgroup::create(&id)? {
            return Ok((id, cgroup));
        }
    }
    bail!("{ATTEMPTS} labs named {name} in one process: are they dropped?")
}

/// Every namespace costs two file descriptors, and shells start with a limit of 1024.
fn raise_file_limit() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
    {
        // Only labs with hundreds of pods need it; those then fail with EMFILE, which says it.
        let _unchanged = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}
