//! bpf(2): each command Culvert needs, wrapped once and safe to call.
//!
//! Owns the layout of `union bpf_attr` for those commands and nothing else. Lengths of keys and values are
//! the callers' business ([`super::maps`] fixes them by type).
#![expect(unsafe_code, reason = "the door to bpf(2)")]

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
    sync::OnceLock,
};

use aya_obj::generated::bpf_insn;

const MAP_CREATE: libc::c_long = 0;
const MAP_LOOKUP: libc::c_long = 1;
const MAP_UPDATE: libc::c_long = 2;
const MAP_DELETE: libc::c_long = 3;
const MAP_NEXT_KEY: libc::c_long = 4;
const PROG_LOAD: libc::c_long = 5;
const OBJ_PIN: libc::c_long = 6;
const OBJ_GET: libc::c_long = 7;
const OBJ_GET_INFO: libc::c_long = 15;
const BTF_LOAD: libc::c_long = 18;
const MAP_LOOKUP_BATCH: libc::c_long = 24;
const LINK_CREATE: libc::c_long = 28;
const LINK_UPDATE: libc::c_long = 29;
const LINK_DETACH: libc::c_long = 34;

/// Largest `bpf_attr` used here.
const ATTR_SIZE: usize = 128;

#[repr(C, align(8))]
struct Attr([u8; ATTR_SIZE]);

impl Attr {
    fn new() -> Self {
        Self([0; ATTR_SIZE])
    }

    fn put(mut self, offset: usize, bytes: &[u8]) -> Self {
        self.0[offset..offset + bytes.len()].copy_from_slice(bytes);
        self
    }

    fn u32(self, offset: usize, value: u32) -> Self {
        self.put(offset, &value.to_ne_bytes())
    }

    fn u64(self, offset: usize, value: u64) -> Self {
        self.put(offset, &value.to_ne_bytes())
    }

    fn fd(self, offset: usize, fd: BorrowedFd<'_>) -> Self {
        self.put(offset, &fd.as_raw_fd().to_ne_bytes())
    }

    fn slice(self, offset: usize, bytes: &[u8]) -> Self {
        self.u64(offset, bytes.as_ptr() as u64)
    }

    fn slice_mut(self, offset: usize, bytes: &mut [u8]) -> Self {
        self.u64(offset, bytes.as_mut_ptr() as u64)
    }

    fn call(&mut self, command: libc::c_long, used: usize) -> io::Result<i32> {
        loop {
            // SAFETY: the attribute is ours and at least `used` bytes long; every pointer in it was made from
            // a slice that outlives this call (see the callers), and unused bytes are zero.
            let ret = unsafe { libc::syscall(libc::SYS_bpf, command, self.0.as_mut_ptr(), used) };
            if ret >= 0 {
                return i32::try_from(ret).map_err(io::Error::other);
            }
            let error = io::Error::last_os_error();
            // The verifier gives up with EAGAIN when a signal is pending.
            if !matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) {
                return Err(error);
            }
        }
    }

    fn call_fd(&mut self, command: libc::c_long, used: usize) -> io::Result<OwnedFd> {
        let fd = self.call(command, used)?;
        // SAFETY: this command returned a descriptor that nobody else owns.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

/// What a map is, for [`map_create`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapSpec {
    /// `BPF_MAP_TYPE_*`.
    pub map_type: u32,
    /// Bytes.
    pub key_size: u32,
    /// Bytes.
    pub value_size: u32,
    /// Entries (bytes for a ring buffer).
    pub max_entries: u32,
    /// `BPF_F_*`.
    pub flags: u32,
}

fn object_name(name: &str) -> [u8; 16] {
    let mut out = [0; 16];
    // The kernel takes 15 bytes of [A-Za-z0-9_.].
    for (to, from) in out.iter_mut().take(15).zip(name.bytes()) {
        *to = from;
    }
    out
}

/// Creates a map. `btf` names key and value types where the kind demands it (socket storage).
pub(super) fn map_create(
    name: &str,
    spec: &MapSpec,
    btf: Option<(BorrowedFd<'_>, u32, u32)>,
) -> io::Result<OwnedFd> {
    let mut attr = Attr::new()
        .u32(0, spec.map_type)
        .u32(4, spec.key_size)
        .u32(8, spec.value_size)
        .u32(12, spec.max_entries)
        .u32(16, spec.flags)
        .put(28, &object_name(name));
    if let Some((fd, key, value)) = btf {
        attr = attr.fd(48, fd).u32(52, key).u32(56, value);
    }
    attr.call_fd(MAP_CREATE, 60)
}

/// Loads type information.
pub(super) fn btf_load(btf: &[u8]) -> io::Result<OwnedFd> {
    let size = u32::try_from(btf.len()).map_err(io::Error::other)?;
    Attr::new()
        .slice(0, btf)
        .u32(16, size)
        .call_fd(BTF_LOAD, 28)
}

fn element(map: BorrowedFd<'_>, key: &[u8]) -> Attr {
    Attr::new().fd(0, map).slice(8, key)
}

/// Reads an element; false when there is none.
pub(super) fn map_lookup(map: BorrowedFd<'_>, key: &[u8], value: &mut [u8]) -> io::Result<bool> {
    absent(element(map, key).slice_mut(16, value).call(MAP_LOOKUP, 32))
}

/// Writes an element.
pub(super) fn map_update(
    map: BorrowedFd<'_>,
    key: &[u8],
    value: &[u8],
    flags: u64,
) -> io::Result<()> {
    element(map, key)
        .slice(16, value)
        .u64(24, flags)
        .call(MAP_UPDATE, 32)
        .map(drop)
}

/// Deletes an element; false when there was none.
pub(super) fn map_delete(map: BorrowedFd<'_>, key: &[u8]) -> io::Result<bool> {
    absent(element(map, key).call(MAP_DELETE, 32))
}

/// The key after `key` (the first without one); false at the end.
pub(super) fn map_next_key(
    map: BorrowedFd<'_>,
    key: Option<&[u8]>,
    next: &mut [u8],
) -> io::Result<bool> {
    let attr = Attr::new().fd(0, map).slice_mut(16, next);
    let mut attr = if let Some(key) = key {
        attr.slice(8, key)
    } else {
        attr
    };
    absent(attr.call(MAP_NEXT_KEY, 32))
}

/// Where a walk through a map in batches has come to. Tables count buckets, others remember the last key.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place([u8; 64]);

/// The next elements of a map after `place`, which is none at first. Fills as much of `keys` and `values` as there are
/// elements; how many, and where to go on, none at the end.
pub(super) fn map_batch(
    map: BorrowedFd<'_>,
    place: Option<Place>,
    count: usize,
    keys: &mut [u8],
    values: &mut [u8],
) -> io::Result<(usize, Option<Place>)> {
    const COUNT: usize = 32;
    let mut next = Place([0; 64]);
    let mut attr = Attr::new()
        .slice_mut(8, &mut next.0)
        .slice_mut(16, keys)
        .slice_mut(24, values)
        .u32(COUNT, u32::try_from(count).map_err(io::Error::other)?)
        .fd(36, map);
    if let Some(place) = &place {
        attr = attr.slice(0, &place.0);
    }
    let more = absent(attr.call(MAP_LOOKUP_BATCH, 56))?;
    let found = u32::from_ne_bytes([
        attr.0[COUNT],
        attr.0[COUNT + 1],
        attr.0[COUNT + 2],
        attr.0[COUNT + 3],
    ]);
    let found = usize::try_from(found).map_err(io::Error::other)?;
    Ok((found.min(count), more.then_some(next)))
}

fn absent(result: io::Result<i32>) -> io::Result<bool> {
    match result {
        Ok(_) => Ok(true),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Loads a program. With a `log` the verifier explains itself there.
pub(super) fn prog_load(
    name: &str,
    prog_type: u32,
    attach_type: u32,
    insns: &[bpf_insn],
    log: Option<&mut [u8]>,
) -> io::Result<OwnedFd> {
    let count = u32::try_from(insns.len()).map_err(io::Error::other)?;
    let license = c"Dual BSD/GPL";
    let mut attr = Attr::new()
        .u32(0, prog_type)
        .u32(4, count)
        .u64(8, insns.as_ptr() as u64)
        .u64(16, license.as_ptr() as u64)
        .put(48, &object_name(name))
        .u32(68, attach_type);
    if let Some(log) = log {
        let size = u32::try_from(log.len()).map_err(io::Error::other)?;
        attr = attr.u32(24, 1).u32(28, size).slice_mut(32, log);
    }
    attr.call_fd(PROG_LOAD, 72)
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}

/// Pins a map, program or link.
pub(super) fn obj_pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    Attr::new()
        .u64(0, path.as_ptr() as u64)
        .fd(8, object)
        .call(OBJ_PIN, 16)
        .map(drop)
}

/// Opens what is pinned.
pub(super) fn obj_get(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    Attr::new()
        .u64(0, path.as_ptr() as u64)
        .call_fd(OBJ_GET, 16)
}

/// Attaches a program to a cgroup or network namespace.
pub(super) fn link_create(
    prog: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    attach_type: u32,
) -> io::Result<OwnedFd> {
    Attr::new()
        .fd(0, prog)
        .fd(4, target)
        .u32(8, attach_type)
        .call_fd(LINK_CREATE, 16)
}

/// As [`link_create`], in front of what the cgroup runs already; where the kernel knows no order (before 6.17), behind.
pub(super) fn link_create_first(
    prog: BorrowedFd<'_>,
    cgroup: BorrowedFd<'_>,
    attach_type: u32,
) -> io::Result<OwnedFd> {
    const BEFORE: u32 = 1 << 3;
    let first = Attr::new()
        .fd(0, prog)
        .fd(4, cgroup)
        .u32(8, attach_type)
        .u32(12, BEFORE)
        .call_fd(LINK_CREATE, 32);
    match first {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => link_create(prog, cgroup, attach_type),
        other => other,
    }
}

/// Puts another program behind a link, without a moment in which neither runs.
pub(super) fn link_update(link: BorrowedFd<'_>, prog: BorrowedFd<'_>) -> io::Result<()> {
    Attr::new()
        .fd(0, link)
        .fd(4, prog)
        .call(LINK_UPDATE, 16)
        .map(drop)
}

/// Ends an attachment at once; a link that is closed ends it some time later.
pub(super) fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    Attr::new().fd(0, link).call(LINK_DETACH, 4).map(drop)
}

fn info<const N: usize>(object: BorrowedFd<'_>) -> io::Result<[u8; N]> {
    let mut out = [0; N];
    let size = u32::try_from(N).map_err(io::Error::other)?;
    Attr::new()
        .fd(0, object)
        .u32(4, size)
        .slice_mut(8, &mut out)
        .call(OBJ_GET_INFO, 16)?;
    Ok(out)
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    let mut out = [0; 4];
    out.copy_from_slice(&bytes[offset..offset + 4]);
    u32::from_ne_bytes(out)
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    let mut out = [0; 8];
    out.copy_from_slice(&bytes[offset..offset + 8]);
    u64::from_ne_bytes(out)
}

/// What the kernel says of a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ProgInfo {
    /// Kernel's number.
    pub id: u32,
    /// Name, cut to fifteen bytes by the kernel.
    pub name: String,
    /// Hash of the instructions.
    pub tag: [u8; 8],
    /// Bytes of machine code.
    pub jited_len: u32,
    /// Bytes of BPF code after the verifier.
    pub xlated_len: u32,
    /// Instructions the verifier walked.
    pub verified_insns: u32,
    /// Runs and nanoseconds, counted while statistics are on.
    pub run_count: u64,
    /// See `run_count`.
    pub run_time_ns: u64,
}

/// Reads [`ProgInfo`].
pub(super) fn prog_info(prog: BorrowedFd<'_>) -> io::Result<ProgInfo> {
    let raw: [u8; 232] = info(prog)?;
    let mut tag = [0; 8];
    tag.copy_from_slice(&raw[8..16]);
    Ok(ProgInfo {
        id: u32_at(&raw, 4),
        name: raw[64..80]
            .iter()
            .take_while(|b| **b != 0)
            .map(|b| char::from(*b))
            .collect(),
        tag,
        jited_len: u32_at(&raw, 16),
        xlated_len: u32_at(&raw, 20),
        run_time_ns: u64_at(&raw, 192),
        run_count: u64_at(&raw, 200),
        verified_insns: u32_at(&raw, 216),
    })
}

/// What the kernel says of a map.
pub(super) fn map_info(map: BorrowedFd<'_>) -> io::Result<MapSpec> {
    let raw: [u8; 80] = info(map)?;
    Ok(MapSpec {
        map_type: u32_at(&raw, 0),
        key_size: u32_at(&raw, 8),
        value_size: u32_at(&raw, 12),
        max_entries: u32_at(&raw, 16),
        flags: u32_at(&raw, 20),
    })
}

/// What the kernel says of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LinkInfo {
    /// Program behind it.
    pub prog_id: u32,
    /// For a netns link the namespace's inode, 0 when it is gone; for a cgroup link the cgroup's id.
    pub target: u64,
}

/// Reads [`LinkInfo`] of a cgroup link.
pub(super) fn cgroup_link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    let raw: [u8; 64] = info(link)?;
    Ok(LinkInfo {
        prog_id: u32_at(&raw, 8),
        target: u64_at(&raw, 16),
    })
}

/// Reads [`LinkInfo`] of a netns link.
pub(super) fn netns_link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    let raw: [u8; 64] = info(link)?;
    Ok(LinkInfo {
        prog_id: u32_at(&raw, 8),
        target: u64::from(u32_at(&raw, 16)),
    })
}

/// Opens a program by its number.
pub(super) fn prog_by_id(id: u32) -> io::Result<OwnedFd> {
    const PROG_GET_FD_BY_ID: libc::c_long = 13;
    Attr::new().u32(0, id).call_fd(PROG_GET_FD_BY_ID, 12)
}

/// Numbers of the programs a cgroup runs at this attach point, those of its parents included.
pub(super) fn prog_query_effective(
    cgroup: BorrowedFd<'_>,
    attach_type: u32,
) -> io::Result<Vec<u32>> {
    const PROG_QUERY: libc::c_long = 16;
    const QUERY_EFFECTIVE: u32 = 1;
    const MOST: usize = 64;
    let mut ids = [0; MOST * 4];
    let mut attr = Attr::new()
        .fd(0, cgroup)
        .u32(4, attach_type)
        .u32(8, QUERY_EFFECTIVE)
        .slice_mut(16, &mut ids)
        .u32(24, 64);
    attr.call(PROG_QUERY, 32)?;
    let count = u32_at(&attr.0, 24) as usize;
    Ok((0..count.min(MOST)).map(|i| u32_at(&ids, i * 4)).collect())
}

/// Number of CPUs whose values a per-CPU map returns. The kernel fixes it at boot.
pub(super) fn possible_cpus() -> io::Result<usize> {
    static CPUS: OnceLock<usize> = OnceLock::new();
    if let Some(cpus) = CPUS.get() {
        return Ok(*cpus);
    }
    let text = std::fs::read_to_string("/sys/devices/system/cpu/possible")?;
    let last = text.trim().rsplit([',', '-']).next().unwrap_or("0");
    let last: usize = last.parse().map_err(io::Error::other)?;
    Ok(*CPUS.get_or_init(|| last + 1))
}

/// Bytes of a plain value.
///
/// # Safety of the trait bound
/// [`super::maps::Plain`] promises no padding, so every byte is initialised.
pub(super) fn bytes_of<T: super::maps::Plain>(value: &T) -> &[u8] {
    // SAFETY: see above; the slice borrows the value.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast::<u8>(), size_of::<T>()) }
}

/// A plain value from its bytes.
pub(super) fn from_bytes<T: super::maps::Plain>(bytes: &[u8]) -> Option<T> {
    if bytes.len() < size_of::<T>() {
        return None;
    }
    // SAFETY: long enough, and any bit pattern is a valid `Plain`; the read tolerates any alignment.
    Some(unsafe { std::ptr::read_unaligned(bytes.as_ptr().cast::<T>()) })
}

/// Lets an owned descriptor be borrowed where a generic is in the way.
pub(super) fn fd(owned: &OwnedFd) -> BorrowedFd<'_> {
    owned.as_fd()
}
