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
        CidrKey, Config, Counters, Event, FourTuple, ListenerKey, Named, PidNamespace, Pod,
        PodAddr, PortKey, ProbeCounts, ProcessKey, Record, Role, RoleKey, UsualKey, maps,
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
    Named,
    PidNamespace,
    Pod,
    PodAddr,
    PortKey,
    ProbeCounts,
    ProcessKey,
    Record,
    Role,
    RoleKey,
    UsualKey,
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
        // Not every kind of map can be read in batches.
        self.keys_in_batches()
            .or_else(|_| self.keys_one_by_one())
            .map_err(|e| self.error("list", e))
    }

    fn keys_in_batches(&self) -> io::Result<Vec<K>> {
        // More than any bucket holds: one that does not fit is refused.
        const COUNT: usize = 256;
        let (mut keys, mut values) = (
            vec![0; COUNT * size_of::<K>()],
            vec![0; COUNT * size_of::<V>()],
        );
        let (mut found, mut place) = (Vec::new(), None);
        loop {
            let (count, next) =
                sys::map_batch(self.fd.as_fd(), place, COUNT, &mut keys, &mut values)?;
            let batch = keys.chunks_exact(size_of::<K>()).take(count);
            found.extend(batch.filter_map(sys::from_bytes::<K>));
            if next.is_none() {
                return Ok(found);
            }
            place = next;
        }
    }

    fn keys_one_by_one(&self) -> io::Result<Vec<K>> {
        let mut keys = Vec::new();
        let mut next = vec![0; size_of::<K>()];
        let mut current: Option<Vec<u8>> = None;
        // A key deleted between two steps makes the kernel start over: no map holds more than this.
        const LIMIT: usize = 1 << 20;
        while keys.len() < LIMIT
            && sys::map_next_key(self.fd.as_fd(), current.as_deref(), &mut next)?
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

impl<K: Plain, V: Plain> Map<K, V> {
    /// All CPUs' values of a key, of a map that has one for each.
    fn get_per_cpu(&self, key: &K) -> Result<Option<Vec<V>>> {
        let cpus = sys::possible_cpus().map_err(|e| self.error("count CPUs for", e))?;
        let mut raw = vec![0; size_of::<V>() * cpus];
        let found = sys::map_lookup(self.fd.as_fd(), sys::bytes_of(key), &mut raw)
            .map_err(|e| self.error("read from", e))?;
        let values = raw.chunks_exact(size_of::<V>());
        Ok(found.then(|| values.filter_map(sys::from_bytes::<V>).collect()))
    }
}

/// Connections from the node to enrolled pods: one value per CPU, summed here.
#[derive(Debug)]
pub struct ProbeCountMap(Map<u32, ProbeCounts>);

impl ProbeCountMap {
    /// Sum over all CPUs, since the maps were made.
    pub fn get(&self) -> Result<ProbeCounts> {
        let all = self.0.get_per_cpu(&0)?.unwrap_or_default();
        Ok(all
            .into_iter()
            .fold(ProbeCounts::default(), |sum, one| ProbeCounts {
                kubelet: sum.kubelet + one.kubelet,
                node: sum.node + one.node,
                not_vouched: sum.not_vouched + one.not_vouched,
            }))
    }
}

/// The counters: one value per CPU, summed here.
#[derive(Debug)]
pub struct CounterMap(Map<u64, Counters>);

impl CounterMap {
    /// Sum over all CPUs.
    pub fn get(&self, cookie: u64) -> Result<Option<Counters>> {
        let Some(all) = self.0.get_per_cpu(&cookie)? else {
            return Ok(None);
        };
        let mut sum = Counters { by_verdict: [0; _] };
        for one in all {
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
    pub ztunnels: Map<ProcessKey, Named>,
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
    /// Processes that may vouch for their connections.
    pub vouchers: Map<ProcessKey, Named>,
    /// Sockets they made.
    pub voucher_sockets: OwnedFd,
    /// PID namespaces processes are named by, by slot.
    pub pid_namespaces: Map<u32, PidNamespace>,
    /// Connections from the node to enrolled pods.
    pub probe_counts: ProbeCountMap,
    /// Resolvers whose lookups are captured, of pods where not all are.
    pub resolvers: Map<PodAddr, u8>,
    /// The resolver each pod asked first.
    pub usual_resolvers: Map<UsualKey, Addr>,
    /// Which resolvers a socket asked.
    pub asked: OwnedFd,
}

impl Maps {
    /// From descriptors in the order of [`maps::ALL`].
    pub fn from_fds(fds: [OwnedFd; maps::ALL.len()]) -> Self {
        let [
            c,
            p,
            pa,
            pb,
            v,
            i,
            l,
            r,
            ec,
            ep,
            z,
            zs,
            co,
            ev,
            re,
            st,
            en,
            vo,
            vs,
            pn,
            pc,
            rs,
            ur,
            ak,
        ] = fds;
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
            vouchers: Map::new(maps::VOUCHERS, vo),
            voucher_sockets: vs,
            pid_namespaces: Map::new(maps::PID_NAMESPACES, pn),
            probe_counts: ProbeCountMap(Map::new(maps::PROBE_COUNTS, pc)),
            resolvers: Map::new(maps::RESOLVERS, rs),
            usual_resolvers: Map::new(maps::USUAL_RESOLVERS, ur),
            asked: ak,
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
            (maps::VOUCHERS, self.vouchers.as_fd()),
            (maps::VOUCHER_SOCKETS, self.voucher_sockets.as_fd()),
            (maps::PID_NAMESPACES, self.pid_namespaces.as_fd()),
            (maps::PROBE_COUNTS, self.probe_counts.0.as_fd()),
            (maps::RESOLVERS, self.resolvers.as_fd()),
            (maps::USUAL_RESOLVERS, self.usual_resolvers.as_fd()),
            (maps::ASKED, self.asked.as_fd()),
        ]
    }
}
