//! Maps with their types: what `culvert_ebpf::abi` says, so that nobody passes a wrong length.
#![expect(
    unsafe_code,
    reason = "the one place that says which types may be read as bytes"
)]

use std::{
    io,
    marker::PhantomData,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use culvert_ebpf::{
    abi::{
        CidrKey, Config, Counters, Event, FourTuple, ListenerKey, Pod, PodAddr, PortKey, Record,
        Role, RoleKey, maps,
    },
    addr::Addr,
};

use super::{
    error::{Error, Result},
    sys,
};

/// Types that are their bytes.
///
/// # Safety
/// `repr(C)`, integers and arrays of them only, no padding: `culvert_ebpf::abi` asserts the sizes.
pub unsafe trait Plain: Copy + 'static {}

macro_rules! plain {
    // SAFETY: each type listed below is of the kind the trait asks for.
    ($($t:ty),+) => { $(unsafe impl Plain for $t {})+ };
}
plain!(
    u8,
    u32,
    u64,
    Addr,
    CidrKey,
    Config,
    Counters,
    Event,
    FourTuple,
    ListenerKey,
    Pod,
    PodAddr,
    PortKey,
    Record,
    Role,
    RoleKey,
    LpmCidr
);

/// Key of the LPM trie as the kernel wants it: prefix length, then data, unpadded.
#[repr(C, packed)]
#[derive(Clone, Copy, Debug)]
pub struct LpmCidr {
    /// Bits that count, the cookie's 64 included.
    pub prefix_len: u32,
    /// Cookie and network.
    pub data: CidrKey,
}

/// One map, by the types of its key and value.
#[derive(Debug)]
pub struct Map<K, V> {
    name: &'static str,
    fd: OwnedFd,
    types: PhantomData<(K, V)>,
}

impl<K: Plain, V: Plain> Map<K, V> {
    /// Takes a descriptor whose sizes were checked (see [`super::node`]).
    pub fn new(name: &'static str, fd: OwnedFd) -> Self {
        Self {
            name,
            fd,
            types: PhantomData,
        }
    }

    fn error(&self, operation: &'static str, cause: io::Error) -> Error {
        Error::system(operation, format_args!("map {}", self.name), cause)
    }

    /// The value of a key.
    pub fn get(&self, key: &K) -> Result<Option<V>> {
        let mut value = vec![0; size_of::<V>()];
        let found = sys::map_lookup(self.fd.as_fd(), sys::bytes_of(key), &mut value)
            .map_err(|e| self.error("read from", e))?;
        Ok(if found { sys::from_bytes(&value) } else { None })
    }

    /// Writes a key.
    pub fn set(&self, key: &K, value: &V) -> Result<()> {
        sys::map_update(self.fd.as_fd(), sys::bytes_of(key), sys::bytes_of(value), 0)
            .map_err(|e| self.error("write to", e))
    }

    /// Deletes a key; false when it was not there.
    pub fn remove(&self, key: &K) -> Result<bool> {
        sys::map_delete(self.fd.as_fd(), sys::bytes_of(key))
            .map_err(|e| self.error("delete from", e))
    }

    /// All keys. Entries that come and go meanwhile may be missed or seen.
    pub fn keys(&self) -> Result<Vec<K>> {
        let mut keys = Vec::new();
        let mut next = vec![0; size_of::<K>()];
        let mut current: Option<Vec<u8>> = None;
        // A key deleted between two steps makes the kernel start over: no map holds more than this.
        const LIMIT: usize = 1 << 20;
        while keys.len() < LIMIT
            && sys::map_next_key(self.fd.as_fd(), current.as_deref(), &mut next)
                .map_err(|e| self.error("list", e))?
        {
            keys.extend(sys::from_bytes::<K>(&next));
            current = Some(next.clone());
        }
        Ok(keys)
    }

    /// The descriptor, for relocation and pinning.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The counters: one value per CPU, summed here.
#[derive(Debug)]
pub struct CounterMap(Map<u64, Counters>);

impl CounterMap {
    /// Sum over all CPUs.
    pub fn get(&self, cookie: u64) -> Result<Option<Counters>> {
        let cpus = sys::possible_cpus().map_err(|e| self.0.error("count CPUs for", e))?;
        let mut raw = vec![0; size_of::<Counters>() * cpus];
        let found = sys::map_lookup(self.0.as_fd(), sys::bytes_of(&cookie), &mut raw)
            .map_err(|e| self.0.error("read from", e))?;
        if !found {
            return Ok(None);
        }
        let mut sum = Counters { by_verdict: [0; _] };
        for one in raw
            .chunks_exact(size_of::<Counters>())
            .filter_map(sys::from_bytes::<Counters>)
        {
            for (total, n) in sum.by_verdict.iter_mut().zip(one.by_verdict) {
                *total += n;
            }
        }
        Ok(Some(sum))
    }

    /// Makes room for a pod, unless it has some.
    pub fn ensure(&self, cookie: u64) -> Result<()> {
        let cpus = sys::possible_cpus().map_err(|e| self.0.error("count CPUs for", e))?;
        let zero = vec![0; size_of::<Counters>() * cpus];
        const NO_EXIST: u64 = 1;
        match sys::map_update(self.0.as_fd(), sys::bytes_of(&cookie), &zero, NO_EXIST) {
            Err(e) if e.raw_os_error() != Some(libc::EEXIST) => Err(self.0.error("write to", e)),
            _ => Ok(()),
        }
    }

    /// Forgets a pod.
    pub fn remove(&self, cookie: u64) -> Result<bool> {
        self.0.remove(&cookie)
    }
}

/// All maps of the node.
#[derive(Debug)]
pub struct Maps {
    /// One entry.
    pub config: Map<u32, Config>,
    /// Who is enrolled.
    pub pods: Map<u64, Pod>,
    /// A pod's own addresses.
    pub pod_addrs: Map<PodAddr, u8>,
    /// Which pod has an address.
    pub pod_by_addr: Map<Addr, u64>,
    /// Node probes under way.
    pub vouched: Map<FourTuple, u8>,
    /// Interfaces of inbound SYNs.
    pub ingress: Map<FourTuple, u32>,
    /// ztunnel's listeners; user space reads a socket's cookie.
    pub listeners: Map<ListenerKey, u64>,
    /// Their order, and since when there is none.
    pub roles: Map<RoleKey, Role>,
    /// Excluded networks.
    pub excluded_cidrs: Map<LpmCidr, u8>,
    /// Excluded ports.
    pub excluded_ports: Map<PortKey, u8>,
    /// Processes that may be ztunnel.
    pub ztunnels: Map<u32, u8>,
    /// Sockets they marked.
    pub ztunnel_sockets: OwnedFd,
    /// Decisions.
    pub counters: CounterMap,
    /// Ring buffer.
    pub events: OwnedFd,
    /// User space's notes.
    pub records: Map<u64, Record>,
    /// The program behind each pod's jump; a descriptor goes in, its number comes out.
    pub steer: Map<u32, u32>,
    /// Cookie on its way to that program.
    pub entering: OwnedFd,
}

impl Maps {
    /// From descriptors in the order of [`maps::ALL`].
    pub fn from_fds(fds: [OwnedFd; maps::ALL.len()]) -> Self {
        let [c, p, pa, pb, v, i, l, r, ec, ep, z, zs, co, ev, re, st, en] = fds;
        Self {
            config: Map::new(maps::CONFIG, c),
            pods: Map::new(maps::PODS, p),
            pod_addrs: Map::new(maps::POD_ADDRS, pa),
            pod_by_addr: Map::new(maps::POD_BY_ADDR, pb),
            vouched: Map::new(maps::VOUCHED, v),
            ingress: Map::new(maps::INGRESS, i),
            listeners: Map::new(maps::LISTENERS, l),
            roles: Map::new(maps::ROLES, r),
            excluded_cidrs: Map::new(maps::EXCLUDED_CIDRS, ec),
            excluded_ports: Map::new(maps::EXCLUDED_PORTS, ep),
            ztunnels: Map::new(maps::ZTUNNELS, z),
            ztunnel_sockets: zs,
            counters: CounterMap(Map::new(maps::COUNTERS, co)),
            events: ev,
            records: Map::new(maps::RECORDS, re),
            steer: Map::new(maps::STEER, st),
            entering: en,
        }
    }

    /// Name and descriptor of each, for relocation.
    pub fn fds(&self) -> [(&'static str, BorrowedFd<'_>); maps::ALL.len()] {
        [
            (maps::CONFIG, self.config.as_fd()),
            (maps::PODS, self.pods.as_fd()),
            (maps::POD_ADDRS, self.pod_addrs.as_fd()),
            (maps::POD_BY_ADDR, self.pod_by_addr.as_fd()),
            (maps::VOUCHED, self.vouched.as_fd()),
            (maps::INGRESS, self.ingress.as_fd()),
            (maps::LISTENERS, self.listeners.as_fd()),
            (maps::ROLES, self.roles.as_fd()),
            (maps::EXCLUDED_CIDRS, self.excluded_cidrs.as_fd()),
            (maps::EXCLUDED_PORTS, self.excluded_ports.as_fd()),
            (maps::ZTUNNELS, self.ztunnels.as_fd()),
            (maps::ZTUNNEL_SOCKETS, self.ztunnel_sockets.as_fd()),
            (maps::COUNTERS, self.counters.0.as_fd()),
            (maps::EVENTS, self.events.as_fd()),
            (maps::RECORDS, self.records.as_fd()),
            (maps::STEER, self.steer.as_fd()),
            (maps::ENTERING, self.entering.as_fd()),
        ]
    }
}
