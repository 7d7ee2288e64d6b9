//! What the kernel holds of ours, by the kernel's own numbers, so that "gone" can be said of exactly these objects and
//! not of what somebody else has loaded. Reads only.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use aya::maps::{MapInfo, loaded_maps};
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::{loaded_links, loaded_programs};
use culvert_lab::Lab;

use crate::interrupt;

/// The kernel frees programs and maps after a grace period.
const PATIENCE: Duration = Duration::from_secs(10);

/// Numbers of programs, maps and links.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Held {
    programs: BTreeSet<u32>,
    maps: BTreeSet<u32>,
    links: BTreeSet<u32>,
}

impl Held {
    /// What is pinned for this lab, and the programs behind the links.
    pub(crate) fn by(lab: &Lab) -> Result<Self> {
        let mut held = Self::default();
        for pin in pins(lab)? {
            let path = lab.bpffs().join(&pin);
            let what = || format!("asking what is pinned at {}", path.display());
            if pin.starts_with("maps") {
                held.maps
                    .insert(MapInfo::from_pin(&path).with_context(what)?.id());
            } else {
                let link = FdLink::from(PinnedLink::from_pin(&path).with_context(what)?);
                let info = link.info().with_context(what)?;
                held.links.insert(info.id());
                held.programs.insert(info.program_id());
            }
        }
        ensure!(
            held.present() == held,
            "the kernel does not list what is pinned: {held:?}"
        );
        Ok(held)
    }

    /// These and those.
    pub(crate) fn and(mut self, other: Self) -> Self {
        self.programs.extend(other.programs);
        self.maps.extend(other.maps);
        self.links.extend(other.links);
        self
    }

    /// Waits until the kernel lists none of them and nothing is pinned.
    pub(crate) fn gone(&self, lab: &Lab) -> Result<()> {
        interrupt::wait_for(PATIENCE, || {
            let (left, pins) = (self.present(), lab.pins()?);
            Ok(if left == Self::default() && pins.is_empty() {
                Ok(())
            } else {
                Err(format!("still there: {left:?}, pins {pins:?}"))
            })
        })
    }

    /// In a few words.
    pub(crate) fn counts(&self) -> String {
        let (programs, maps, links) = (self.programs.len(), self.maps.len(), self.links.len());
        format!("{programs} programs, {links} links, {maps} maps")
    }

    /// Which of them the kernel lists. Others' objects may go while they are listed, so an error is no answer.
    fn present(&self) -> Self {
        let programs = loaded_programs().flatten().map(|info| info.id());
        let maps = loaded_maps().flatten().map(|info| info.id());
        let links = loaded_links().flatten().map(|info| info.id());
        Self {
            programs: programs.filter(|id| self.programs.contains(id)).collect(),
            maps: maps.filter(|id| self.maps.contains(id)).collect(),
            links: links.filter(|id| self.links.contains(id)).collect(),
        }
    }
}

/// The pinned objects, without the directories.
fn pins(lab: &Lab) -> Result<Vec<PathBuf>> {
    let mut pins = lab.pins()?;
    pins.retain(|pin| !lab.bpffs().join(pin).is_dir());
    Ok(pins)
}
