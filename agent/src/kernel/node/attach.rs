//! The node's programs in their places: attaching this build's, and putting back what somebody took away.
//!
//! Knows nothing of pods; the caller of everything but [`Node::mend`] holds the lock.

use std::{
    fs::{self, File},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    time::Instant,
};

use culvert_ebpf::abi::programs as names;

use super::{Node, ProgramAction, ProgramReport};
use crate::kernel::{
    cgroup, dns,
    error::{Error, Result},
    object::{ATTACH_SETSOCKOPT, ATTACH_SOCK_CREATE, ATTACH_SOCK_OPS},
    pins, sys,
};

/// `BPF_CGROUP_INET4_CONNECT`, from linux/bpf.h.
const ATTACH_INET4_CONNECT: u32 = 10;

/// Programs attached to the cgroup, and where.
pub(super) const ATTACHED: [(&str, u32); 3] = [
    (names::CONNECT, ATTACH_SOCK_OPS),
    (names::SOCKOPT, ATTACH_SETSOCKOPT),
    (names::VOUCH, ATTACH_SOCK_CREATE),
];

impl Node {
    /// Puts back pins of maps, programs and their links, as far as they are gone, and says which: they belong to no pod,
    /// and no attach of a pod brings them.
    ///
    /// The maps are those this process holds, so that pods that are captured stay so.
    pub fn mend(&self) -> Result<Vec<&'static str>> {
        let cgroup = self.cgroup.as_ref().ok_or_else(|| {
            Error::wrong(
                "mend",
                "the node's programs",
                "this process has not loaded them and does not know where they belong",
                "run `culvert load`",
            )
        })?;
        let _lock = self.pins.lock()?;
        let mut mended = Vec::new();
        if !self.pins.exist() {
            self.pin_maps()?;
            mended.push("pins of the maps");
        }
        // What another build put there and what runs is left alone.
        let current = true;
        let mut reports = vec![self.place_steer(current)?];
        for (name, kind) in ATTACHED {
            reports.push(self.attach(name, kind, cgroup, current)?);
        }
        let again = reports
            .into_iter()
            .filter(|r| !matches!(r.action, ProgramAction::Kept));
        mended.extend(again.map(|r| r.name));
        if dns::wanted(self)? {
            mended.extend(dns::restore(self)?);
        }
        Ok(mended)
    }

    /// Whether a program of this name answers `connect()` over IPv4 at the root of the cgroups, whosever it is.
    pub fn runs_at_root(&self, name: &str) -> Result<bool> {
        let path = cgroup::find_root()?;
        let root = cgroup::open(&path, true)?;
        let ids = sys::prog_query_effective(root.as_fd(), ATTACH_INET4_CONNECT)
            .map_err(|e| Error::system("list programs of", path.display(), e))?;
        // As the kernel keeps names.
        let name = name.get(..15).unwrap_or(name);
        let named = |id: &u32| {
            sys::prog_by_id(*id)
                .and_then(|prog| sys::prog_info(prog.as_fd()))
                .is_ok_and(|info| info.name == name)
        };
        Ok(ids.iter().any(named))
    }

    fn pin_maps(&self) -> Result<()> {
        let scratch = self.pins.scratch()?;
        let dir = scratch.join("maps");
        let result = (|| {
            fs::create_dir(&dir).map_err(|e| Error::system("make directory", dir.display(), e))?;
            for (name, fd) in self.maps.fds() {
                let path = dir.join(name);
                sys::obj_pin(fd, &path).map_err(|e| Error::system("pin map", path.display(), e))?;
            }
            pins::publish(&dir, &self.pins.root().join("maps"))
        })();
        let swept = pins::remove(&scratch);
        result.and(swept)
    }

    /// Makes sure that this build's program is attached there, pinned, and nowhere else.
    pub(in crate::kernel) fn attach(
        &self,
        name: &'static str,
        kind: u32,
        cgroup: &File,
        current: bool,
    ) -> Result<ProgramReport> {
        let path = self.pins.link(name);
        let existing = sys::obj_get(&path).ok();
        if let Some(link) = &existing
            && current
            && let Ok(info) = sys::cgroup_link_info(link.as_fd())
            && info.target == cgroup::id(cgroup)?
            && let Ok(prog) = sys::prog_by_id(info.prog_id)
        {
            return report(name, &prog, ProgramAction::Kept, None);
        }
        let started = Instant::now();
        let prog = self.programs.load_node(name)?;
        let took = started.elapsed();
        let mut action = ProgramAction::Loaded;
        let same_place = |link: &OwnedFd| {
            let id = cgroup::id(cgroup).ok();
            sys::cgroup_link_info(link.as_fd()).is_ok_and(|info| Some(info.target) == id)
        };
        match existing {
            Some(link) if same_place(&link) => {
                action = ProgramAction::Replaced;
                sys::link_update(link.as_fd(), prog.as_fd())
                    .map_err(|e| Error::system("replace program", name, e))?;
            }
            elsewhere => {
                // With two places a query would run through both, and the second take it for one that asks ztunnel by
                // itself. Without any it goes to its resolver.
                if let Some(link) = elsewhere
                    && names::DNS_QUERIES.contains(&name)
                {
                    sys::link_detach(link.as_fd())
                        .map_err(|e| Error::system("detach program", name, e))?;
                }
                // Attached elsewhere, or not at all: the new link takes the old one's pin, in one step.
                // What names an address must see it before others replace it.
                let create = if names::DNS.iter().any(|(dns, _)| *dns == name) {
                    sys::link_create_first
                } else {
                    sys::link_create
                };
                let link = create(prog.as_fd(), cgroup.as_fd(), kind).map_err(|e| {
                    Error::system("attach program", name, e).cured_by(
                        "another program may be attached there exclusively: `bpftool cgroup show DIR` names it",
                    )
                })?;
                let scratch = self.pins.scratch()?;
                let temporary = scratch.join(name);
                let pinned = sys::obj_pin(link.as_fd(), &temporary)
                    .map_err(|e| Error::system("pin link", temporary.display(), e))
                    .and_then(|()| pins::publish(&temporary, &path));
                pins::remove(&scratch)?;
                pinned?;
            }
        }
        report(name, &prog, action, Some(took))
    }

    /// Puts this build's `culvert_steer` behind every pod's jump, all at once.
    pub(super) fn place_steer(&self, current: bool) -> Result<ProgramReport> {
        let existing = self.maps.steer.get(&0)?;
        if let Some(id) = existing
            && current
            && let Ok(prog) = sys::prog_by_id(id)
        {
            return report(names::STEER, &prog, ProgramAction::Kept, None);
        }
        let started = Instant::now();
        let prog = self.programs.load_node(names::STEER)?;
        let took = started.elapsed();
        self.maps.steer.set(&0, &prog.as_raw_fd().unsigned_abs())?;
        let action = if existing.is_some() {
            ProgramAction::Replaced
        } else {
            ProgramAction::Loaded
        };
        report(names::STEER, &prog, action, Some(took))
    }

    /// Loads the part that each pod gets a copy of, to see that it passes.
    pub(super) fn check_enter(&self) -> Result<ProgramReport> {
        let started = Instant::now();
        let prog = self.programs.load_enter(0)?;
        let took = Some(started.elapsed());
        report(names::ENTER, &prog, ProgramAction::Checked, took)
    }

    /// Loads a program that is attached later, to see that it passes.
    pub(in crate::kernel) fn check(&self, name: &'static str) -> Result<ProgramReport> {
        let started = Instant::now();
        let prog = self.programs.load_node(name)?;
        let took = Some(started.elapsed());
        report(name, &prog, ProgramAction::Checked, took)
    }
}

fn report(
    name: &'static str,
    prog: &OwnedFd,
    action: ProgramAction,
    took: Option<std::time::Duration>,
) -> Result<ProgramReport> {
    let info =
        sys::prog_info(prog.as_fd()).map_err(|e| Error::system("examine program", name, e))?;
    Ok(ProgramReport {
        name,
        kind: match name {
            names::CONNECT => "sock_ops",
            names::SOCKOPT => "cgroup/setsockopt",
            names::VOUCH => "cgroup/sock_create",
            names::ENTER | names::STEER => "sk_lookup",
            _ => "cgroup/sock_addr",
        },
        action,
        tag: info.tag.iter().map(|b| format!("{b:02x}")).collect(),
        bytes_xlated: info.xlated_len,
        bytes_jited: info.jited_len,
        verified_instructions: info.verified_insns,
        load_time_us: took.map(|t| u64::try_from(t.as_micros()).unwrap_or(u64::MAX)),
    })
}
