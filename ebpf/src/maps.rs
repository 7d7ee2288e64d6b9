//! The maps, as `culvert_ebpf::abi` describes them.
//!
//! Pods come and go while the node runs, so what is keyed by pod is not preallocated; what is touched at
//! `connect()` of a probe is (LRU).

use core::cell::UnsafeCell;

use aya_ebpf::{
    bindings::{BPF_F_NO_PREALLOC, bpf_map_type::BPF_MAP_TYPE_SK_STORAGE},
    macros::map,
    maps::{
        Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, PerCpuHashMap, ProgramArray, RingBuf,
        SockHash,
    },
};
use culvert_ebpf::abi::{
    Asked, CidrKey, Config, Counters, FourTuple, ListenerKey, MAX_PID_NAMESPACES, Named,
    PidNamespace, Pod, PodAddr, PortKey, ProbeCounts, ProcessKey, Record, Role, RoleKey, UsualKey,
};
use culvert_ebpf::addr::Addr;

/// Most pods of one node; Kubernetes itself stops far below.
const MAX_PODS: u32 = 8192;

#[map]
pub static CONFIG: Array<Config> = Array::with_max_entries(1, 0);
#[map]
pub static PODS: HashMap<u64, Pod> = HashMap::with_max_entries(MAX_PODS, BPF_F_NO_PREALLOC);
#[map]
pub static POD_ADDRS: HashMap<PodAddr, u8> = HashMap::with_max_entries(65536, BPF_F_NO_PREALLOC);
#[map]
pub static POD_BY_ADDR: HashMap<Addr, u64> = HashMap::with_max_entries(65536, BPF_F_NO_PREALLOC);
#[map]
pub static VOUCHED: LruHashMap<FourTuple, u8> = LruHashMap::with_max_entries(16384, 0);
#[map]
pub static INGRESS: LruHashMap<FourTuple, u32> = LruHashMap::with_max_entries(16384, 0);
#[map]
pub static LISTENERS: SockHash<ListenerKey> = SockHash::with_max_entries(65536, 0);
#[map]
pub static ROLES: HashMap<RoleKey, Role> = HashMap::with_max_entries(65536, BPF_F_NO_PREALLOC);
#[map]
pub static EXCLUDED_CIDRS: LpmTrie<CidrKey, u8> = LpmTrie::with_max_entries(65536, 0);
#[map]
pub static EXCLUDED_PORTS: HashMap<PortKey, u8> =
    HashMap::with_max_entries(65536, BPF_F_NO_PREALLOC);
#[map]
pub static ZTUNNELS: HashMap<ProcessKey, Named> = HashMap::with_max_entries(64, BPF_F_NO_PREALLOC);
#[map]
pub static VOUCHERS: HashMap<ProcessKey, Named> = HashMap::with_max_entries(64, BPF_F_NO_PREALLOC);
#[map]
pub static PID_NAMESPACES: Array<PidNamespace> = Array::with_max_entries(MAX_PID_NAMESPACES, 0);
#[map]
pub static PROBE_COUNTS: PerCpuArray<ProbeCounts> = PerCpuArray::with_max_entries(1, 0);
#[map]
pub static COUNTERS: PerCpuHashMap<u64, Counters> =
    PerCpuHashMap::with_max_entries(MAX_PODS, BPF_F_NO_PREALLOC);
#[map]
pub static EVENTS: RingBuf = RingBuf::with_byte_size(256 * 1024, 0);
#[map]
pub static STEER: ProgramArray = ProgramArray::with_max_entries(1, 0);
#[map]
pub static ENTERING: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);
#[map]
pub static RECORDS: HashMap<u64, Record> = HashMap::with_max_entries(MAX_PODS, BPF_F_NO_PREALLOC);
#[map]
pub static RESOLVERS: HashMap<PodAddr, u8> = HashMap::with_max_entries(65536, BPF_F_NO_PREALLOC);
#[map]
pub static USUAL_RESOLVERS: HashMap<UsualKey, Addr> =
    HashMap::with_max_entries(2 * MAX_PODS, BPF_F_NO_PREALLOC);

/// The legacy definition of a map: what the `maps` section holds. aya-ebpf has none for socket storage
/// that other programs than sock_addr's can use.
#[repr(C)]
pub struct StorageDef {
    /// The cell makes the section writable, as aya-ebpf's maps are: both must share one.
    map_type: UnsafeCell<u32>,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    id: u32,
    pinning: u32,
}

// SAFETY: nobody reads or writes the definition; its address names the map to the loader.
unsafe impl Sync for StorageDef {}

impl StorageDef {
    const fn new(value_size: u32) -> Self {
        Self {
            map_type: UnsafeCell::new(BPF_MAP_TYPE_SK_STORAGE),
            key_size: 4,
            value_size,
            max_entries: 0,
            map_flags: BPF_F_NO_PREALLOC,
            id: 0,
            pinning: 0,
        }
    }

    /// Presence is all that counts.
    const fn flag() -> Self {
        Self::new(4)
    }
}

#[unsafe(link_section = "maps")]
#[unsafe(export_name = "ZTUNNEL_SOCKETS")]
pub static ZTUNNEL_SOCKETS: StorageDef = StorageDef::flag();

#[unsafe(link_section = "maps")]
#[unsafe(export_name = "VOUCHER_SOCKETS")]
pub static VOUCHER_SOCKETS: StorageDef = StorageDef::flag();

#[unsafe(link_section = "maps")]
#[unsafe(export_name = "ASKED")]
pub static ASKED: StorageDef = StorageDef::new(size_of::<Asked>() as u32);
