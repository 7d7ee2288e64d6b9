//! What lies in the maps, byte for byte, and the numbers both sides agree on.
//!
//! Rules: `#[repr(C)]`, integers and arrays only, padding written out, size asserted. Whoever changes a
//! type or the meaning of a field raises [`ABI_VERSION`]: pins of another version are never adopted. What other versions rely
//! on all the same stands in `kernel::earlier`.

use crate::addr::Addr;

/// Version of everything in this file. Stored in [`Config`]; checked before any pin is reused.
pub const ABI_VERSION: u32 = 4;

/// Socket marks. Compared under [`mark::MASK`]: the other bits belong to whoever set them.
pub mod mark {
    /// Bits of a mark that are ours to read and write.
    pub const MASK: u32 = 0xfff;
    /// ztunnel's own sockets.
    pub const ZTUNNEL: u32 = 0x539;
    /// "The peer of this socket is the co-located ztunnel": an application on its way out.
    pub const OUT: u32 = 0x111;
    /// "ztunnel is away and the grace is over": no route, `connect()` fails at once.
    pub const REFUSE: u32 = 0x112;
    /// Traffic that stays at home: ztunnel delivering to the application, the pod talking to itself.
    pub const HOME: u32 = 0x113;
    /// ztunnel answering an application of its own pod. It takes the local table like anything else; but what
    /// the kernel itself answers to it (the last ACK of a socket in TIME_WAIT, a reset) reflects this mark
    /// and is addressed to the original destination, so it turns round instead of leaving.
    pub const ANSWER: u32 = 0x115;
    /// Like [`OUT`], over IPv6 and while no ztunnel listens: what the kernel would answer is swallowed, so that
    /// the connection waits as it does over IPv4.
    pub const HELD: u32 = 0x119;
    /// Mask under which [`OUT`], [`REFUSE`], [`HOME`] and [`HELD`] all read [`FAMILY`]: what must never leave.
    pub const FAMILY_MASK: u32 = 0xff4;
    /// Mask under which all of ours read [`FAMILY`]: what no process may set or change.
    pub const OURS_MASK: u32 = 0xff0;
    /// See [`FAMILY_MASK`] and [`OURS_MASK`].
    pub const FAMILY: u32 = 0x110;
    /// Mask under which [`OUT`], [`HOME`] and [`HELD`] read [`OUT`]: what turns round.
    pub const TURN_MASK: u32 = 0xff5;
}

/// Ports of ztunnel's listeners in a pod, host byte order.
pub mod port {
    /// Outbound traffic of the application.
    pub const OUTBOUND: u16 = 15001;
    /// Inbound plaintext.
    pub const INBOUND: u16 = 15006;
    /// Inbound HBONE (mutual TLS).
    pub const HBONE: u16 = 15008;
    /// DNS.
    pub const DNS: u16 = 15053;
    /// What DNS clients ask.
    pub const DOMAIN: u16 = 53;
}

/// Index of the loopback device, the same in every network namespace.
pub const LOOPBACK_IFINDEX: u32 = 1;

/// Names of maps, as in the object and below the pin directory.
pub mod maps {
    /// [`Config`](super::Config), one entry.
    pub const CONFIG: &str = "CONFIG";
    /// Netns cookie to [`Pod`](super::Pod).
    pub const PODS: &str = "PODS";
    /// [`PodAddr`](super::PodAddr) to nothing: a pod's own addresses.
    pub const POD_ADDRS: &str = "POD_ADDRS";
    /// [`Addr`](crate::addr::Addr) to netns cookie.
    pub const POD_BY_ADDR: &str = "POD_BY_ADDR";
    /// [`FourTuple`](super::FourTuple) of node probes between `connect()` and established.
    pub const VOUCHED: &str = "VOUCHED";
    /// [`FourTuple`](super::FourTuple) to an interface: the one an inbound SYN came in by, in pods with several;
    /// the one an outbound SYN will turn round by, from a socket bound to a device.
    pub const INGRESS: &str = "INGRESS";
    /// [`ListenerKey`](super::ListenerKey) to ztunnel's listening socket.
    pub const LISTENERS: &str = "LISTENERS";
    /// [`RoleKey`](super::RoleKey) to [`Role`](super::Role): which listener first, since when none.
    pub const ROLES: &str = "ROLES";
    /// [`CidrKey`](super::CidrKey): destinations left alone.
    pub const EXCLUDED_CIDRS: &str = "EXCLUDED_CIDRS";
    /// [`PortKey`](super::PortKey): ports left alone.
    pub const EXCLUDED_PORTS: &str = "EXCLUDED_PORTS";
    /// [`ProcessKey`](super::ProcessKey) of each process that may be ztunnel to [`Named`](super::Named).
    pub const ZTUNNELS: &str = "ZTUNNELS";
    /// Socket storage: present on sockets that a process of `ZTUNNELS` marked as ztunnel's.
    pub const ZTUNNEL_SOCKETS: &str = "ZTUNNEL_SOCKETS";
    /// Netns cookie to [`Counters`](super::Counters), per CPU.
    pub const COUNTERS: &str = "COUNTERS";
    /// Ring buffer of [`Event`](super::Event).
    pub const EVENTS: &str = "EVENTS";
    /// Netns cookie to [`Record`](super::Record): user space's notes, no program reads them.
    pub const RECORDS: &str = "RECORDS";
    /// One entry: the `culvert_steer` all pods' entry programs jump to.
    pub const STEER: &str = "STEER";
    /// One entry, per CPU: the cookie an entry program hands to `culvert_steer`.
    pub const ENTERING: &str = "ENTERING";
    /// [`ProcessKey`](super::ProcessKey) of each process that may vouch to [`Named`](super::Named).
    pub const VOUCHERS: &str = "VOUCHERS";
    /// Socket storage: present on sockets that a process of `VOUCHERS` made.
    pub const VOUCHER_SOCKETS: &str = "VOUCHER_SOCKETS";
    /// The [`PidNamespace`](super::PidNamespace)s that processes are known by besides the initial one.
    pub const PID_NAMESPACES: &str = "PID_NAMESPACES";
    /// [`ProbeCounts`](super::ProbeCounts), one entry, per CPU.
    pub const PROBE_COUNTS: &str = "PROBE_COUNTS";
    /// [`PodAddr`](super::PodAddr) to nothing: the resolvers whose lookups are captured, where not all are.
    pub const RESOLVERS: &str = "RESOLVERS";
    /// [`UsualKey`](super::UsualKey) to [`Addr`](crate::addr::Addr): the resolver a pod asked first.
    pub const USUAL_RESOLVERS: &str = "USUAL_RESOLVERS";
    /// Socket storage: [`Asked`](super::Asked), on datagram sockets that asked another than the pod's usual resolver.
    pub const ASKED: &str = "ASKED";
    /// All of them, in the order they are created.
    pub const ALL: [&str; 24] = [
        CONFIG,
        PODS,
        POD_ADDRS,
        POD_BY_ADDR,
        VOUCHED,
        INGRESS,
        LISTENERS,
        ROLES,
        EXCLUDED_CIDRS,
        EXCLUDED_PORTS,
        ZTUNNELS,
        ZTUNNEL_SOCKETS,
        COUNTERS,
        EVENTS,
        RECORDS,
        STEER,
        ENTERING,
        VOUCHERS,
        VOUCHER_SOCKETS,
        PID_NAMESPACES,
        PROBE_COUNTS,
        RESOLVERS,
        USUAL_RESOLVERS,
        ASKED,
    ];
}

/// Names of programs in the object.
pub mod programs {
    /// sock_ops at the cgroup root: marks, listeners, vouching.
    pub const CONNECT: &str = "culvert_connect";
    /// cgroup/setsockopt at the same place: who may set our marks, no device binding.
    pub const SOCKOPT: &str = "culvert_sockopt";
    /// cgroup/sock_create at the same place: whose sockets may vouch.
    pub const VOUCH: &str = "culvert_vouch";
    /// sk_lookup, one per pod, a few instructions: knows the pod and jumps to [`STEER`].
    pub const ENTER: &str = "culvert_enter";
    /// sk_lookup, one for the node: where a SYN goes.
    pub const STEER: &str = "culvert_steer";
    /// cgroup socket address hooks, attached together: DNS over UDP to ztunnel and back. Each with the kernel's
    /// number of its attach point.
    pub const DNS: [(&str, u32); 8] = [
        ("culvert_dns_recvmsg4", 19),
        ("culvert_dns_recvmsg6", 20),
        ("culvert_dns_getpeername4", 29),
        ("culvert_dns_getpeername6", 30),
        ("culvert_dns_sendmsg4", 14),
        ("culvert_dns_sendmsg6", 15),
        ("culvert_dns_connect4", 10),
        ("culvert_dns_connect6", 11),
    ];
    /// Those of them that send queries elsewhere.
    pub const DNS_QUERIES: [&str; 4] = [DNS[4].0, DNS[5].0, DNS[6].0, DNS[7].0];
}

/// Stands in `culvert_enter`'s instructions for the pod's netns cookie, which sk_lookup programs cannot
/// ask for: the loader replaces it before each load.
pub const COOKIE_PLACEHOLDER: u64 = 0xC01D_C0DE_C0C0_C1E5;

/// Stands in the instructions of the programs that ask for the calling process: the loader replaces it by 1 where the
/// kernel can answer for any PID namespace, else by 0, and the verifier drops what it then cannot reach.
pub const PIDNS_PLACEHOLDER: u64 = 0xC01D_C0DE_9D15_9D15;

/// Node-wide settings, map `CONFIG[0]`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Config {
    /// [`ABI_VERSION`] of the programs that use these pins.
    pub abi_version: u32,
    /// One of the `PROBES_*` constants.
    pub probe_source: u32,
    /// Cookie of the node's own network namespace.
    pub node_cookie: u64,
    /// Decisions are reported until this moment of CLOCK_MONOTONIC, ns; 0 = nobody listens. A lease, so
    /// that a watcher that was killed costs nothing.
    pub events_until: u64,
    /// Hash of the object the loaded programs come from; another one replaces them.
    pub object_id: u64,
}
const _: () = assert!(size_of::<Config>() == 32);

/// No process of the node may vouch for its connections.
pub const PROBES_NONE: u32 = 0;
/// Every process in the node's network namespace may.
pub const PROBES_NODE: u32 = 1;
/// The processes of `VOUCHERS` may: the kubelet's.
pub const PROBES_KUBELET: u32 = 2;

/// A process, as the programs can tell it.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct ProcessKey {
    /// 0 = the initial PID namespace, n = the one in `PID_NAMESPACES[n - 1]`.
    pub pid_namespace: u32,
    /// Thread group id there.
    pub tgid: u32,
}
const _: () = assert!(size_of::<ProcessKey>() == 8);

/// User space's notes on a process it named: whether it is still the same. No program reads them.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Named {
    /// When it started, in clock ticks since boot: process ids are reused.
    pub started: u64,
    /// Its id where it was named.
    pub pid: u32,
    /// Inode of the PID namespace in which it was named.
    pub named_in: u32,
}
const _: () = assert!(size_of::<Named>() == 16);

/// A PID namespace, as the kernel wants it named.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PidNamespace {
    /// Device of the nsfs, in the kernel's own encoding: major << 20 | minor.
    pub dev: u64,
    /// Inode there; 0 = this slot is free.
    pub inode: u64,
}
const _: () = assert!(size_of::<PidNamespace>() == 16);

/// Most PID namespaces besides the initial one from which processes are named.
pub const MAX_PID_NAMESPACES: u32 = 8;

/// Connections from the node to enrolled pods, by what became of them.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ProbeCounts {
    /// Vouched for: made by a process of `VOUCHERS`.
    pub kubelet: u64,
    /// Vouched for: every process of the node may.
    pub node: u64,
    /// Not vouched for: they went through ztunnel.
    pub not_vouched: u64,
}
const _: () = assert!(size_of::<ProbeCounts>() == 24);

/// One enrolled pod.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pod {
    /// `pod_flags::*`.
    pub flags: u32,
    /// The interface inbound traffic comes by when there is only one besides `lo`; 0 = several or none.
    pub single_ifindex: u32,
    /// How long new connections wait for an absent ztunnel before they are refused, ns.
    pub hold: u64,
    /// Interfaces behind which others than the pod's own processes send (a VM's tap): 0 ends the list.
    pub virtual_ifindexes: [u32; MAX_VIRTUAL],
    /// Interfaces with a default route, in pods with several: a socket bound to one of these can answer
    /// whoever reached it by it. 0 ends the list.
    pub answering_ifindexes: [u32; MAX_ANSWERING],
    /// The address of [`Pod::lookup_ifindex`] that captured lookups come from, one of each family; unspecified = left to
    /// the routes.
    pub lookup_sources: [Addr; 2],
    /// Own addresses at which answers from several resolvers are told apart; unspecified ends the list.
    pub answered_at: [Addr; MAX_ANSWERED_AT],
}
const _: () = assert!(size_of::<Pod>() == 368);

impl Pod {
    /// Traffic to this address is none of ours.
    #[inline(always)]
    #[must_use]
    pub const fn leaves_alone(&self, destination: &Addr) -> bool {
        self.flags & pod_flags::IPV4_ONLY != 0 && !destination.is_v4()
    }

    /// The interface that lookups leave by: the only one, or the only one with a default route; 0 = which one is left to
    /// the routes.
    #[inline(always)]
    #[must_use]
    pub const fn lookup_ifindex(&self) -> u32 {
        let [first, second, ..] = self.answering_ifindexes;
        if self.single_ifindex != 0 {
            self.single_ifindex
        } else if second == 0 {
            first
        } else {
            0
        }
    }

    /// The address that lookups of this family come from; unspecified where it is left to the routes.
    #[inline(always)]
    #[must_use]
    pub const fn lookup_source(&self, v4: bool) -> Addr {
        let [source4, source6] = self.lookup_sources;
        if v4 { source4 } else { source6 }
    }
}

/// Most virtual interfaces of one pod.
pub const MAX_VIRTUAL: usize = 8;

/// Most interfaces with a default route that are remembered of one pod.
pub const MAX_ANSWERING: usize = 8;

/// Most own addresses of one pod at which a socket's answers from several resolvers are told apart.
pub const MAX_ANSWERED_AT: usize = 16;

/// Bits of [`Pod::flags`].
pub mod pod_flags {
    /// Lookups (port 53, TCP and UDP) go to ztunnel's DNS listener.
    pub const DNS: u32 = 1;
    /// Inbound plaintext is not steered.
    pub const BYPASS_INBOUND: u32 = 1 << 1;
    /// There are entries in `EXCLUDED_CIDRS`.
    pub const CIDRS: u32 = 1 << 2;
    /// There are outbound entries in `EXCLUDED_PORTS`.
    pub const OUT_PORTS: u32 = 1 << 3;
    /// There are inbound entries in `EXCLUDED_PORTS`.
    pub const IN_PORTS: u32 = 1 << 4;
    /// ztunnel is told by its process (`ZTUNNELS`), not by its mark alone.
    pub const NAMED_ZTUNNEL: u32 = 1 << 5;
    /// [`Pod::virtual_ifindexes`](super::Pod) is not empty.
    pub const VIRTUAL: u32 = 1 << 6;
    /// Several interfaces: remember by which one a steered SYN came.
    pub const MULTI_INTERFACE: u32 = 1 << 7;
    /// Refuse new connections whatever the grace says.
    pub const REFUSE: u32 = 1 << 8;
    /// With [`DNS`]: only lookups that ask a resolver of `RESOLVERS`.
    pub const DNS_LISTED: u32 = 1 << 9;
    /// Without [`DNS_LISTED`]: there is to be a list, but it was not known yet. User space's note.
    pub const DNS_PENDING: u32 = 1 << 10;
    /// It leaves: every destination is excluded, and it is in the map for deliveries alone. User space's note.
    pub const LEAVING: u32 = 1 << 11;
    /// With [`DNS_LISTED`]: the list is that of the pod's `resolv.conf`. User space's note.
    pub const DNS_FOLLOWED: u32 = 1 << 12;
    /// What goes by IPv6 is left alone, in both directions.
    pub const IPV4_ONLY: u32 = 1 << 13;
}

/// Key of `POD_ADDRS`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PodAddr {
    /// Netns cookie.
    pub cookie: u64,
    /// One of the pod's own addresses.
    pub addr: Addr,
}
const _: () = assert!(size_of::<PodAddr>() == 24);

/// Key of `VOUCHED` and `INGRESS`: as the client sees it.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FourTuple {
    /// Client.
    pub src: Addr,
    /// Server.
    pub dst: Addr,
    /// Host byte order.
    pub src_port: u16,
    /// Host byte order.
    pub dst_port: u16,
}
const _: () = assert!(size_of::<FourTuple>() == 36);

/// Which of ztunnel's listeners.
pub mod role {
    /// 15001.
    pub const OUTBOUND: u32 = 0;
    /// 15006.
    pub const INBOUND: u32 = 1;
    /// 15008.
    pub const HBONE: u32 = 2;
    /// 15053 over TCP, IPv4.
    pub const DNS4: u32 = 3;
    /// 15053 over TCP, IPv6.
    pub const DNS6: u32 = 4;
    /// How many roles.
    pub const COUNT: u32 = 5;
}

/// Listeners of one role that can be alive at once: during a hand-off two ztunnels serve a pod.
pub const LISTENER_SLOTS: u32 = 4;

/// Key of `LISTENERS`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ListenerKey {
    /// Netns cookie.
    pub cookie: u64,
    /// `role::*`.
    pub role: u32,
    /// Below [`LISTENER_SLOTS`].
    pub slot: u32,
}
const _: () = assert!(size_of::<ListenerKey>() == 16);

/// Key of `ROLES`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RoleKey {
    /// Netns cookie.
    pub cookie: u64,
    /// `role::*`.
    pub role: u32,
    /// Zero.
    pub pad: u32,
}
const _: () = assert!(size_of::<RoleKey>() == 16);

/// What is known of one role's listeners.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Role {
    /// The slots, newest first, two bits each from the lowest.
    pub order: u32,
    /// Listeners that registered and have not closed.
    pub live: i32,
    /// Since when nobody listens, CLOCK_MONOTONIC ns; 0 = somebody does.
    pub away_since: u64,
}
const _: () = assert!(size_of::<Role>() == 16);

/// [`Role::order`] of a role nobody ever listened in: slots 0, 1, 2, 3.
pub const INITIAL_ORDER: u32 = 0b11_10_01_00;

/// `order` with `slot` moved to the front.
#[inline(always)]
#[must_use]
pub const fn newest_first(order: u32, slot: u32) -> u32 {
    let mut out = slot;
    let mut filled = 1;
    let mut i = 0;
    while i < LISTENER_SLOTS {
        let s = (order >> (2 * i)) & 3;
        if s != slot && filled < LISTENER_SLOTS {
            out |= s << (2 * filled);
            filled += 1;
        }
        i += 1;
    }
    out
}

/// Data of the LPM key of `EXCLUDED_CIDRS`; the prefix length counts the cookie's 64 bits.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CidrKey {
    /// Netns cookie.
    pub cookie: u64,
    /// Network; IPv4 v4-mapped, its prefix length counts from bit 96.
    pub addr: Addr,
}
const _: () = assert!(size_of::<CidrKey>() == 24);

/// Key of `EXCLUDED_PORTS`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PortKey {
    /// Netns cookie.
    pub cookie: u64,
    /// Host byte order.
    pub port: u16,
    /// 1 = the port is one of the pod's own (inbound), 0 = a destination (outbound).
    pub inbound: u8,
    /// Zero.
    pub pad: [u8; 5],
}
const _: () = assert!(size_of::<PortKey>() == 16);

/// Room for verdicts in [`Counters`].
pub const COUNTER_SLOTS: usize = 48;

/// Decisions of one pod on one CPU, indexed by [`Verdict`](crate::decide::Verdict).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Counters {
    /// How often each verdict fell.
    pub by_verdict: [u64; COUNTER_SLOTS],
}
const _: () = assert!(size_of::<Counters>() == 384);

/// Key of `USUAL_RESOLVERS`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct UsualKey {
    /// Netns cookie.
    pub cookie: u64,
    /// 4 or 6, the version of IP.
    pub family: u64,
}
const _: () = assert!(size_of::<UsualKey>() == 16);

/// Resolvers that are told apart on one socket; more than a `resolv.conf` may name.
pub const ASKED_SLOTS: usize = 8;

/// Which resolvers a datagram socket asked when ztunnel was asked in their place; only on those that asked another than
/// the pod's usual one. The rules are in [`dns`](crate::dns).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Asked {
    /// The resolvers, by slot.
    pub resolvers: [Addr; ASKED_SLOTS],
    /// How many slots are in use.
    pub count: u32,
    /// Which slot was given to another resolver last, once all are in use.
    pub replaced: u32,
}
const _: () = assert!(size_of::<Asked>() == 136);

/// One decision, as it goes through the ring buffer.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Event {
    /// CLOCK_MONOTONIC, ns.
    pub time: u64,
    /// Netns cookie of the pod.
    pub cookie: u64,
    /// Client.
    pub src: Addr,
    /// Server.
    pub dst: Addr,
    /// Host byte order.
    pub src_port: u16,
    /// Host byte order.
    pub dst_port: u16,
    /// [`Verdict`](crate::decide::Verdict).
    pub verdict: u32,
    /// Interface it was reported on; 0 at `connect()`.
    pub ifindex: u32,
    /// Zero.
    pub pad: u32,
}
const _: () = assert!(size_of::<Event>() == 64);

/// User space's notes on a pod: what to put back when it is let go.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Record {
    /// Inode of the namespace, which finds its path again.
    pub netns_inode: u64,
    /// When it was enrolled, CLOCK_REALTIME seconds.
    pub enrolled_at: u64,
    /// Device of the nsfs the inode lives on.
    pub netns_dev: u64,
    /// Earlier values of the sysctls we changed, one byte each, in the kernel door's order; [`NO_SYSCTL`]
    /// where there is none.
    pub sysctls: [u8; 4],
    /// Zero.
    pub pad: u32,
}
const _: () = assert!(size_of::<Record>() == 32);

/// In [`Record::sysctls`]: this kernel or pod has no such setting.
pub const NO_SYSCTL: u8 = 0xff;
