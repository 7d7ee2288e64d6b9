//! A few bpf(2) calls, so that tests look at the kernel's own answer and not at culvert's. Knows pins by path and maps by
//! their bytes, nothing of what culvert keeps in them.
#![expect(unsafe_code, reason = "bpf(2) has no safe wrapper here")]

use std::collections::BTreeSet;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::{Context as _, Result};

const MAP_LOOKUP: libc::c_int = 1;
const MAP_UPDATE: libc::c_int = 2;
const MAP_DELETE: libc::c_int = 3;
const MAP_NEXT_KEY: libc::c_int = 4;
const OBJ_GET: libc::c_int = 7;
const PROG_NEXT_ID: libc::c_int = 11;
const MAP_NEXT_ID: libc::c_int = 12;
const PROG_FD_BY_ID: libc::c_int = 13;
const MAP_FD_BY_ID: libc::c_int = 14;
const INFO_BY_FD: libc::c_int = 15;
const LINK_DETACH: libc::c_int = 34;

/// Size of the attribute union as far as the calls here need it.
const ATTR: usize = 64;
/// Room for `struct bpf_prog_info` and `struct bpf_map_info`; the kernel fills what it knows.
const INFO: usize = 256;

fn call(command: libc::c_int, attr: &mut [u8; ATTR]) -> io::Result<i64> {
    // SAFETY: the attribute is ours and as long as said; pointers in it are to buffers that outlive the call.
    let code = unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_mut_ptr(), ATTR) };
    if code < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(code)
    }
}

fn put(attr: &mut [u8; ATTR], at: usize, bytes: &[u8]) {
    attr[at..at + bytes.len()].copy_from_slice(bytes);
}

fn new_fd(command: libc::c_int, attr: &mut [u8; ATTR]) -> io::Result<OwnedFd> {
    let fd = call(command, attr)?;
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the call has just made this descriptor, and nothing else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Opens whatever is pinned there.
pub fn open_pin(path: &Path) -> Result<OwnedFd> {
    let name = CString::new(path.as_os_str().as_bytes()).context("a path with a zero in it")?;
    let mut attr = [0; ATTR];
    put(&mut attr, 0, &(name.as_ptr() as u64).to_ne_bytes());
    new_fd(OBJ_GET, &mut attr).with_context(|| format!("opening the pin {}", path.display()))
}

/// Detaches a pinned link by force; its pin stays.
pub fn detach_link(path: &Path) -> Result<()> {
    let link = open_pin(path)?;
    let mut attr = [0; ATTR];
    put(&mut attr, 0, &link.as_raw_fd().to_ne_bytes());
    call(LINK_DETACH, &mut attr).with_context(|| format!("detaching {}", path.display()))?;
    Ok(())
}

fn info(fd: &OwnedFd) -> Result<[u8; INFO]> {
    let mut info = [0_u8; INFO];
    let mut attr = [0; ATTR];
    put(&mut attr, 0, &fd.as_raw_fd().to_ne_bytes());
    put(&mut attr, 4, &u32::try_from(INFO)?.to_ne_bytes());
    put(&mut attr, 8, &(info.as_mut_ptr() as u64).to_ne_bytes());
    call(INFO_BY_FD, &mut attr).context("asking about a BPF object")?;
    Ok(info)
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_ne_bytes(word)
}

/// A pinned map.
#[derive(Debug)]
pub struct Map {
    fd: OwnedFd,
    kind: u32,
    key: usize,
    value: usize,
    /// The kernel's number for it.
    pub id: u32,
}

const PERCPU_HASH: u32 = 5;
const RINGBUF: u32 = 27;
const SK_STORAGE: u32 = 24;

impl Map {
    /// Opens a map by its pin.
    pub fn pinned(path: &Path) -> Result<Self> {
        let fd = open_pin(path)?;
        let info = info(&fd)?;
        // struct bpf_map_info: type, id, key_size, value_size.
        Ok(Self {
            fd,
            kind: word(&info, 0),
            id: word(&info, 4),
            key: word(&info, 8) as usize,
            value: word(&info, 12) as usize,
        })
    }

    /// Whether its keys can be listed at all: not of a ring buffer or of socket storage.
    pub fn has_keys(&self) -> bool {
        self.kind != RINGBUF && self.kind != SK_STORAGE
    }

    /// All keys.
    pub fn keys(&self) -> Result<Vec<Vec<u8>>> {
        let mut keys: Vec<Vec<u8>> = Vec::new();
        loop {
            let mut next = vec![0_u8; self.key];
            let previous = keys.last().map_or(0, |key| key.as_ptr() as u64);
            let mut attr = [0; ATTR];
            put(&mut attr, 0, &self.fd.as_raw_fd().to_ne_bytes());
            put(&mut attr, 8, &previous.to_ne_bytes());
            put(&mut attr, 16, &(next.as_mut_ptr() as u64).to_ne_bytes());
            match call(MAP_NEXT_KEY, &mut attr) {
                Ok(_) => keys.push(next),
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(keys),
                Err(error) => return Err(error).context("listing a map"),
            }
        }
    }

    /// The value of a key; not for maps with a value for each CPU.
    pub fn get(&self, key: &[u8]) -> Result<Vec<u8>> {
        anyhow::ensure!(self.kind != PERCPU_HASH, "a value for each CPU");
        let mut value = vec![0_u8; self.value];
        let mut attr = self.element(key, value.as_mut_ptr() as u64);
        call(MAP_LOOKUP, &mut attr).context("reading a map")?;
        Ok(value)
    }

    /// Sets the value of a key.
    pub fn set(&self, key: &[u8], value: &[u8]) -> Result<()> {
        anyhow::ensure!(value.len() == self.value, "a value of another length");
        let mut attr = self.element(key, value.as_ptr() as u64);
        call(MAP_UPDATE, &mut attr).context("writing a map")?;
        Ok(())
    }

    /// Deletes a key.
    pub fn delete(&self, key: &[u8]) -> Result<()> {
        call(MAP_DELETE, &mut self.element(key, 0)).context("deleting from a map")?;
        Ok(())
    }

    fn element(&self, key: &[u8], value: u64) -> [u8; ATTR] {
        let mut attr = [0; ATTR];
        put(&mut attr, 0, &self.fd.as_raw_fd().to_ne_bytes());
        put(&mut attr, 8, &(key.as_ptr() as u64).to_ne_bytes());
        put(&mut attr, 16, &value.to_ne_bytes());
        attr
    }
}

fn ids(command: libc::c_int) -> Result<Vec<u32>> {
    let mut ids = Vec::new();
    loop {
        let mut attr = [0; ATTR];
        put(&mut attr, 0, &ids.last().unwrap_or(&0_u32).to_ne_bytes());
        match call(command, &mut attr) {
            Ok(_) => ids.push(word(&attr, 4)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(ids),
            Err(error) => return Err(error).context("listing BPF objects"),
        }
    }
}

/// Whether the kernel still has a map of this number.
pub fn map_exists(id: u32) -> Result<bool> {
    let mut attr = [0; ATTR];
    put(&mut attr, 0, &id.to_ne_bytes());
    match new_fd(MAP_FD_BY_ID, &mut attr) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error).context("opening a map by its number"),
    }
}

/// How many maps the kernel has. Others' as well.
pub fn map_count() -> Result<usize> {
    Ok(ids(MAP_NEXT_ID)?.len())
}

/// The numbers of all programs in the kernel that use at least one of these maps: which of them belong to one lab, however
/// many labs there are.
pub fn programs_using(maps: &BTreeSet<u32>) -> Result<BTreeSet<u32>> {
    let mut found = BTreeSet::new();
    for id in ids(PROG_NEXT_ID)? {
        let Some(fd) = program(id)? else { continue };
        if used_maps(&fd)?.iter().any(|map| maps.contains(map)) {
            found.insert(id);
        }
    }
    Ok(found)
}

/// A program by its number; none when it is gone since it was listed.
fn program(id: u32) -> Result<Option<OwnedFd>> {
    let mut attr = [0; ATTR];
    put(&mut attr, 0, &id.to_ne_bytes());
    match new_fd(PROG_FD_BY_ID, &mut attr) {
        Ok(fd) => Ok(Some(fd)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error).context("opening a program by its number"),
    }
}

/// The kernel's hash over the instructions of each of these programs that are still there.
pub fn program_tags(ids: &BTreeSet<u32>) -> Result<BTreeSet<[u8; 8]>> {
    let mut tags = BTreeSet::new();
    for id in ids {
        let Some(fd) = program(*id)? else { continue };
        let mut tag = [0; 8];
        tag.copy_from_slice(&info(&fd)?[TAG..TAG + 8]);
        tags.insert(tag);
    }
    Ok(tags)
}

/// Offsets in `struct bpf_prog_info`.
const TAG: usize = 8;
const NR_MAP_IDS: usize = 52;
const MAP_IDS: usize = 56;

fn used_maps(program: &OwnedFd) -> Result<Vec<u32>> {
    let count = word(&info(program)?, NR_MAP_IDS);
    let mut used = vec![0_u32; count as usize];
    let mut info = [0_u8; INFO];
    info[NR_MAP_IDS..NR_MAP_IDS + 4].copy_from_slice(&count.to_ne_bytes());
    info[MAP_IDS..MAP_IDS + 8].copy_from_slice(&(used.as_mut_ptr() as u64).to_ne_bytes());
    let mut attr = [0; ATTR];
    put(&mut attr, 0, &program.as_raw_fd().to_ne_bytes());
    put(&mut attr, 4, &u32::try_from(INFO)?.to_ne_bytes());
    put(&mut attr, 8, &(info.as_mut_ptr() as u64).to_ne_bytes());
    call(INFO_BY_FD, &mut attr).context("asking which maps a program uses")?;
    Ok(used)
}

/// The maps of a lab, by name.
pub fn maps_of(lab: &culvert_lab::Lab) -> Result<Vec<(String, Map)>> {
    maps_in(&lab.bpffs().join("maps"))
}

/// The maps that are pinned in a directory, by name.
pub fn maps_in(dir: &Path) -> Result<Vec<(String, Map)>> {
    let entries = std::fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))?;
    let mut maps = Vec::new();
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        maps.push((name, Map::pinned(&entry.path())?));
    }
    maps.sort_by(|(a, _), (b, _)| a.cmp(b));
    Ok(maps)
}

/// The numbers of the lab's maps.
pub fn map_ids(lab: &culvert_lab::Lab) -> Result<BTreeSet<u32>> {
    Ok(maps_of(lab)?.into_iter().map(|(_, map)| map.id).collect())
}

/// The keys of all maps of a lab that have some, sorted.
pub fn keys(lab: &culvert_lab::Lab) -> Result<Vec<(String, Vec<Vec<u8>>)>> {
    maps_of(lab)?
        .into_iter()
        .filter(|(_, map)| map.has_keys())
        .map(|(name, map)| {
            let mut keys = map.keys().with_context(|| format!("map {name}"))?;
            keys.sort();
            Ok((name, keys))
        })
        .collect()
}
