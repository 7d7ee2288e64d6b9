//! What the kernel holds of ours, by the kernel's own numbers, so that "gone" can be said of exactly these objects and
//! not of what somebody else has loaded. Reads only.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use aya::maps::{MapError, MapInfo};
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::{loaded_links, loaded_programs};
use culvert_lab::Lab;

use crate::interrupt;

/// The kernel frees programs and maps after a grace period.
const PATIENCE: Duration = Duration::from_secs(10);

/// Numbers of programs, maps and links; for a map also its name, to say which one is left.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Held {
    programs: BTreeSet<u32>,
    maps: BTreeMap<u32, String>,
    links: BTreeSet<u32>,
}

impl Held {
    /// What is pinned for this lab, the programs behind its links, and all others that use its maps.
    pub(crate) fn by(lab: &Lab) -> Result<Self> {
        let mut held = Self::default();
        for pin in pins(lab)? {
            let path = lab.bpffs().join(&pin);
            let what = || format!("asking what is pinned at {}", path.display());
            if pin.starts_with("maps") {
                let info = MapInfo::from_pin(&path).with_context(what)?;
                held.maps.insert(info.id(), name(&info));
            } else {
                let link = FdLink::from(PinnedLink::from_pin(&path).with_context(what)?);
                let info = link.info().with_context(what)?;
                held.links.insert(info.id());
                held.programs.insert(info.program_id());
            }
        }
        for program in loaded_programs().flatten() {
            let maps = program.map_ids().ok().flatten().unwrap_or_default();
            if maps.iter().any(|id| held.maps.contains_key(id)) {
                held.programs.insert(program.id());
            }
        }
        ensure!(
            held.programs_and_links() == (held.programs.clone(), held.links.clone())
                && held.maps_left()? == held.maps,
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
            let (programs, links) = self.programs_and_links();
            let pins = lab.pins()?;
            if !(programs.is_empty() && links.is_empty() && pins.is_empty()) {
                return Ok(Err(format!(
                    "still there: programs {programs:?}, links {links:?}, pins {pins:?}"
                )));
            }
            // Maps last: to ask by number for a program array that is just being let go makes the kernel count it wrong,
            // and keep it for good.
            let maps = self.maps_left()?;
            Ok(if maps.is_empty() {
                Ok(())
            } else {
                Err(format!("still there: maps {maps:?}"))
            })
        })
    }

    /// In a few words.
    pub(crate) fn counts(&self) -> String {
        let (programs, maps, links) = (self.programs.len(), self.maps.len(), self.links.len());
        format!("{programs} programs, {links} links, {maps} maps")
    }

    /// Which of the programs and links the kernel lists. Others' may go while they are listed, so an error is no answer.
    fn programs_and_links(&self) -> (BTreeSet<u32>, BTreeSet<u32>) {
        let programs = loaded_programs().flatten().map(|info| info.id());
        let links = loaded_links().flatten().map(|info| info.id());
        (
            programs.filter(|id| self.programs.contains(id)).collect(),
            links.filter(|id| self.links.contains(id)).collect(),
        )
    }

    /// Which of the maps are still there. Asks for these alone, for the reason given in `gone`.
    fn maps_left(&self) -> Result<BTreeMap<u32, String>> {
        let mut left = BTreeMap::new();
        for (id, name) in &self.maps {
            match MapInfo::from_id(*id) {
                Ok(_) => {
                    left.insert(*id, name.clone());
                }
                Err(MapError::SyscallError(error))
                    if error.io_error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => {
                    return Err(error).with_context(|| format!("asking for map {name}"));
                }
            }
        }
        Ok(left)
    }
}

fn name(info: &MapInfo) -> String {
    String::from_utf8_lossy(info.name()).into_owned()
}

/// The pinned objects, without the directories.
fn pins(lab: &Lab) -> Result<Vec<PathBuf>> {
    let mut pins = lab.pins()?;
    pins.retain(|pin| !lab.bpffs().join(pin).is_dir());
    Ok(pins)
}
