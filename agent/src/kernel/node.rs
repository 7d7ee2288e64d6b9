//! The node's side: maps and the programs that all pods share, loaded, adopted, replaced, removed.
//!
//! Everything is pinned, so it outlives the process that made it. A later process adopts pins of its own
//! ABI version and puts its programs behind the existing links; between the old program and the new there
//! is no moment without one. Pins of another version: [`earlier`].

mod attach;
mod pinned;

use std::{
    collections::BTreeMap,
    fs::File,
    net::IpAddr,
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
};

use culvert_ebpf::abi::{ABI_VERSION, Config};
pub(super) use pinned::{Pinned, look, open, other_abi};
use pinned::{create_maps, open_maps};
use serde::Serialize;

use super::{
    cgroup, dns, earlier,
    error::{Error, Result},
    maps::Maps,
    netns::{Netns, NetnsCookie},
    object::{self, Programs},
    pins::{self, Lock, Pins},
    preflight,
};

/// Settings of [`Node::load`].
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Where to pin.
    pub bpffs: PathBuf,
    /// Where to attach; none = the v2 root, found by looking.
    pub cgroup_root: Option<PathBuf>,
    /// Where the DNS programs are attached once a pod has them on; none = found by looking, see [`dns`].
    pub dns_cgroup: Option<PathBuf>,
    /// Who may vouch for probes, `PROBES_*`; none = as it is, [`PROBES_NODE`](culvert_ebpf::abi::PROBES_NODE) at first.
    pub probe_source: Option<u32>,
    /// The caller is in the node's own network namespace: from now on that is the one, whichever was taken for it when
    /// the maps were made.
    pub at_home: bool,
    /// Pins of another ABI version are set aside, to be followed by [`earlier::take_over`]; else they are refused.
    pub set_aside: bool,
}

/// The node's maps and programs, as long as this process has them open.
#[derive(Debug)]
pub struct Node {
    pins: Pins,
    maps: Maps,
    programs: Programs,
    /// Where the node's programs are attached, when this process attached them.
    cgroup: Option<File>,
    /// What is known of the DNS programs.
    dns: dns::State,
}

// One node serves all threads of the agent; namespaces are entered by the thread that calls.
const _: () = {
    const fn shareable<T: Send + Sync>() {}
    shareable::<Node>();
    shareable::<Netns>();
};

/// What happened to one program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ProgramAction {
    /// It was not there.
    Loaded,
    /// Another one was there.
    Replaced,
    /// It is there already.
    Kept,
    /// Loaded once to see that it passes the verifier: each pod gets a copy, or it is attached once a pod needs it.
    Checked,
}

/// One program, for `culvert load`.
#[derive(Clone, Debug, Serialize)]
pub struct ProgramReport {
    /// Name.
    pub name: &'static str,
    /// Kind.
    pub kind: &'static str,
    /// What happened.
    pub action: ProgramAction,
    /// Hash of the instructions, hexadecimal.
    pub tag: String,
    /// Size after the verifier, bytes.
    pub bytes_xlated: u32,
    /// Size as machine code, bytes.
    pub bytes_jited: u32,
    /// Instructions the verifier walked.
    pub verified_instructions: u32,
    /// Time the kernel took to verify and compile it, µs; none if it was there already.
    pub load_time_us: Option<u64>,
}

/// What [`Node::load`] did.
#[derive(Clone, Debug, Serialize)]
pub struct LoadReport {
    /// Pin directory.
    pub bpffs: PathBuf,
    /// Cgroup the programs are attached to.
    pub cgroup_root: PathBuf,
    /// ABI of the maps.
    pub abi_version: u32,
    /// Maps were there and are used on.
    pub adopted: bool,
    /// The programs.
    pub programs: Vec<ProgramReport>,
    /// The programs for DNS over UDP and where they are; none until a pod has DNS capture on.
    pub dns: Option<dns::Attached>,
    /// Why they cannot be used. No pod that is to have DNS capture can be attached then; all else works.
    pub dns_problem: Option<String>,
}

impl Node {
    /// Opens what is pinned; none when nothing is.
    pub fn open(bpffs: &Path) -> Result<Option<Self>> {
        let pins = Pins::at(bpffs);
        if !pins.exist() {
            return Ok(None);
        }
        let maps = open_maps(&pins)?;
        let programs = Programs::new(&maps)?;
        Ok(Some(Self {
            pins,
            maps,
            programs,
            cgroup: None,
            dns: dns::State::default(),
        }))
    }

    /// Makes sure that maps and programs are there and are this build's.
    pub fn load(options: &LoadOptions) -> Result<(Self, LoadReport)> {
        let (cgroup_path, cgroup) = match &options.cgroup_root {
            Some(path) => (path.clone(), cgroup::open(path, true)?),
            None => {
                let path = cgroup::find_root()?;
                let dir = cgroup::open(&path, false)?;
                (path, dir)
            }
        };
        let pins = Pins::at(&options.bpffs);
        pins.check_bpffs()?;
        if !pins.exist() {
            preflight::require_features()?;
        }
        let made_root = !pins.root().exists();
        let _lock = pins.lock()?;
        if options.set_aside {
            earlier::make_room(&pins)?;
        }
        let adopted = pins.exist();
        let result = Self::load_locked(options, &pins, adopted, cgroup_path, &cgroup);
        if result.is_err() && !adopted {
            // A first load that fails leaves nothing; the first error is the one that counts.
            let swept = pins.clear().and_then(|()| {
                if made_root {
                    pins::remove(pins.root())
                } else {
                    Ok(())
                }
            });
            if let Err(error) = swept {
                tracing::warn!(%error, "rolling back a failed load");
            }
        }
        result
    }

    fn load_locked(
        options: &LoadOptions,
        pins: &Pins,
        adopted: bool,
        cgroup_path: PathBuf,
        cgroup: &File,
    ) -> Result<(Self, LoadReport)> {
        if !adopted {
            create_maps(pins)?;
        }
        let maps = open_maps(pins)?;
        let programs = Programs::new(&maps)?;
        let node = Self {
            pins: pins.clone(),
            maps,
            programs,
            cgroup: cgroup.try_clone().ok(),
            dns: dns::State::at(dns::Place {
                root: Some(cgroup_path.clone()),
                named: options.dns_cgroup.clone(),
            }),
        };
        let mut config = node.config()?;
        let current = config.object_id == object::id();
        let mut report = LoadReport {
            bpffs: options.bpffs.clone(),
            cgroup_root: cgroup_path,
            abi_version: ABI_VERSION,
            adopted,
            programs: Vec::new(),
            dns: None,
            dns_problem: None,
        };
        // Before any pod can jump there.
        report.programs.push(node.place_steer(current)?);
        for (name, kind) in attach::ATTACHED {
            report
                .programs
                .push(node.attach(name, kind, cgroup, current)?);
        }
        report.programs.push(node.check_enter()?);
        let dns = node.load_dns(current, adopted, &mut report);
        if let Err(error) = &dns {
            node.dns.failed(error);
            tracing::warn!(%error, "lookups cannot be captured; everything else can");
            report.dns_problem = Some(error.to_string());
        }
        let wanted = Config {
            // Of those that could not be replaced the next load is to know.
            object_id: dns.map_or(config.object_id, |()| object::id()),
            probe_source: options.probe_source.unwrap_or(config.probe_source),
            node_cookie: node.home(options, &config)?,
            ..config
        };
        if wanted != config {
            config = wanted;
            node.maps.config.set(&0, &config)?;
        }
        Ok((node, report))
    }

    /// The cookie of the node's own namespace, as far as the caller can tell.
    fn home(&self, options: &LoadOptions, config: &Config) -> Result<u64> {
        let here = Netns::current()?.cookie();
        // Somebody may have entered a pod to call us.
        if !options.at_home
            || here.0 == config.node_cookie
            || self.maps.pods.get(&here.0)?.is_some()
        {
            return Ok(config.node_cookie);
        }
        tracing::warn!(
            before = %NetnsCookie(config.node_cookie),
            now = %here,
            "another network namespace was taken for the node's own: probes from the node were not vouched for"
        );
        Ok(here.0)
    }

    /// The DNS programs: this build's in place of those that are attached, or whether this kernel takes them.
    fn load_dns(&self, current: bool, adopted: bool, report: &mut LoadReport) -> Result<()> {
        report.dns = dns::reload(self, current)?;
        if !adopted {
            report.programs.extend(dns::check(self)?);
        }
        Ok(())
    }

    /// The maps.
    #[must_use]
    pub fn maps(&self) -> &Maps {
        &self.maps
    }

    /// The pin directory.
    #[must_use]
    pub fn pins(&self) -> &Pins {
        &self.pins
    }

    /// The programs, ready to be loaded.
    #[must_use]
    pub fn programs(&self) -> &Programs {
        &self.programs
    }

    /// Where the node's programs are attached, as far as this process knows.
    pub(super) fn cgroup(&self) -> Option<BorrowedFd<'_>> {
        self.cgroup.as_ref().map(AsFd::as_fd)
    }

    /// Takes the lock under which kernel state changes.
    pub fn lock(&self) -> Result<Lock> {
        self.pins.lock_existing()
    }

    /// Node-wide settings.
    pub fn config(&self) -> Result<Config> {
        self.maps
            .config
            .get(&0)?
            .ok_or_else(|| other_abi(&self.pins, "without a configuration"))
    }

    /// The resolvers whose lookups are captured, sorted, of pods where not all are.
    pub(super) fn resolvers(&self) -> Result<BTreeMap<NetnsCookie, Vec<IpAddr>>> {
        let mut resolvers: BTreeMap<NetnsCookie, Vec<IpAddr>> = BTreeMap::new();
        for key in self.maps.resolvers.keys()? {
            let of_pod = resolvers.entry(NetnsCookie(key.cookie)).or_default();
            of_pod.push(key.addr.into());
        }
        for list in resolvers.values_mut() {
            list.sort_unstable();
        }
        Ok(resolvers)
    }

    /// What is known of the DNS programs.
    pub(super) fn dns(&self) -> &dns::State {
        &self.dns
    }
}

/// Removes programs, links and maps. With pods enrolled only if forced: they would lose capture.
pub fn unload(bpffs: &Path, force: bool) -> Result<bool> {
    let pins = Pins::at(bpffs);
    pins.check_bpffs()?;
    if !pins.root().exists() {
        return Ok(false);
    }
    let _lock = pins.lock_existing()?;
    let mut pods = pins.pods();
    pods.extend(pins.earlier().iter().flat_map(Pins::pods));
    if !pods.is_empty() && !force {
        return Err(Error::wrong(
            "unload",
            bpffs.display(),
            format!("{} pods are enrolled", pods.len()),
            "let them go first: `culvert netns list`, `culvert netns detach --netns PATH`; or add --force, which leaves \
             their rules behind and their traffic uncaptured",
        ));
    }
    pins.clear()?;
    pins::remove(pins.root())?;
    Ok(true)
}
