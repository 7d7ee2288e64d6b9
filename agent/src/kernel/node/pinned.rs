//! The maps as they are pinned: whose they are, opening them, making them.

use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
};

use culvert_ebpf::abi::{ABI_VERSION, Config, PROBES_NODE, maps as map_names};

use crate::kernel::{
    earlier,
    error::{Error, Result},
    maps::Maps,
    netns::Netns,
    object,
    pins::{self, Pins},
    sys,
};

/// Maps that are pinned.
pub(in crate::kernel) enum Pinned {
    /// This build can use them.
    Usable(Box<Maps>),
    /// Those of another version, and of which.
    Other(String),
}

/// Opens the pinned maps and says whose they are.
pub(in crate::kernel) fn look(pins: &Pins) -> Result<Pinned> {
    // Before the others: another version may have other maps.
    match earlier::version(pins)? {
        Some(ABI_VERSION) => {}
        Some(version) => return Ok(Pinned::Other(format!("of ABI version {version}"))),
        None => return Ok(Pinned::Other("without a configuration".to_owned())),
    }
    let mut fds: Vec<OwnedFd> = Vec::with_capacity(map_names::ALL.len());
    for (name, want) in object::map_specs()? {
        let path = pins.map(name);
        let fd = open(&path)?;
        let have =
            sys::map_info(fd.as_fd()).map_err(|e| Error::system("examine", path.display(), e))?;
        if (have.map_type, have.key_size, have.value_size)
            != (want.map_type, want.key_size, want.value_size)
        {
            return Ok(Pinned::Other("of another layout".to_owned()));
        }
        fds.push(fd);
    }
    Ok(match fds.try_into() {
        Ok(fds) => Pinned::Usable(Box::new(Maps::from_fds(fds))),
        Err(_) => Pinned::Other("of another layout".to_owned()),
    })
}

/// Opens a map that has to be there.
pub(in crate::kernel) fn open(path: &std::path::Path) -> Result<OwnedFd> {
    sys::obj_get(path).map_err(|e| {
        let missing = e.kind() == io::ErrorKind::NotFound;
        let error = Error::system("open pinned map", path.display(), e);
        if missing {
            error.cured_by(
                "the pin directory is incomplete: `culvert unload --force` removes it (running pods lose capture)",
            )
        } else {
            error
        }
    })
}

pub(super) fn open_maps(pins: &Pins) -> Result<Maps> {
    match look(pins)? {
        Pinned::Usable(maps) => Ok(*maps),
        Pinned::Other(what) => Err(other_abi(pins, &what)),
    }
}

pub(in crate::kernel) fn other_abi(pins: &Pins, what: &str) -> Error {
    Error::wrong(
        "adopt",
        pins.root().display(),
        format!("the maps pinned there are {what}, this is ABI version {ABI_VERSION}"),
        "start `culvert agent`, which takes their pods over; or run the culvert that made them, or remove them with \
         `culvert unload --force` (running pods lose capture) and attach again",
    )
}

/// Makes the maps, with what [`earlier`] ones know that is needed on.
pub(super) fn create_maps(pins: &Pins) -> Result<()> {
    let scratch = pins.scratch()?;
    let dir = scratch.join("maps");
    let result = (|| {
        fs::create_dir(&dir).map_err(|e| Error::system("make directory", dir.display(), e))?;
        for (name, spec) in object::map_specs()? {
            let fd = object::create_map(name, &spec)?;
            earlier::carry_over(pins, name, &spec, fd.as_fd())?;
            let path = dir.join(name);
            sys::obj_pin(fd.as_fd(), &path)
                .map_err(|e| Error::system("pin map", path.display(), e))?;
            if name == map_names::CONFIG {
                let config = Config {
                    abi_version: ABI_VERSION,
                    probe_source: PROBES_NODE,
                    node_cookie: Netns::current()?.cookie().0,
                    events_until: 0,
                    object_id: 0,
                };
                sys::map_update(fd.as_fd(), &0_u32.to_ne_bytes(), sys::bytes_of(&config), 0)
                    .map_err(|e| Error::system("write to", "map CONFIG", e))?;
            }
        }
        pins::publish(&dir, &pins.root().join("maps"))
    })();
    let swept = pins::remove(&scratch);
    result.and(swept)
}
