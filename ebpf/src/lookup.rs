//! `culvert_dns_*`: DNS over UDP of enrolled pods, to ztunnel and back.
//!
//! On the way out (`connect`, `sendmsg`) a datagram for port 53 is sent to ztunnel's listener in the pod, if one is
//! there, and the resolver it was for is remembered under its socket; on the way back (`recvmsg`, `getpeername`) that
//! resolver's address is put in the place of ztunnel's. All other datagrams leave on the first compares. The kernel
//! holds the socket's lock around each of these programs, so what is stored with it needs none of its own.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::{bpf_sock, bpf_sock_addr, bpf_sock_tuple},
    helpers::{bpf_bind, bpf_sk_lookup_udp, bpf_sk_release, bpf_sk_storage_get},
};
use culvert_ebpf::{
    abi::{Asked, FourTuple, Pod, mark, pod_flags, port},
    addr::Addr,
    decide::Verdict,
    dns::{self, Lookup, LookupFacts},
};

use crate::{
    kernel::{
        AF_INET, captures_dns, cidr_excluded, field, is_own, netns_cookie, port_excluded,
        set_field, ztunnel_storage,
    },
    maps,
    report::{count, decided},
};

const IPPROTO_UDP: u32 = 17;
const AF_INET6: u32 = 10;
/// State of a datagram socket that has a peer.
const TCP_ESTABLISHED: u32 = 1;
const F_CREATE: u64 = 1;

/// The peer's address as the hook sees it. Hooks of each family may read their own fields only.
#[inline(always)]
fn peer<const V6: bool>(ctx: *mut bpf_sock_addr) -> Addr {
    if V6 {
        Addr::v6([
            field!(bpf_sock_addr, ctx, user_ip6, 0),
            field!(bpf_sock_addr, ctx, user_ip6, 4),
            field!(bpf_sock_addr, ctx, user_ip6, 8),
            field!(bpf_sock_addr, ctx, user_ip6, 12),
        ])
    } else {
        Addr::v4(field!(bpf_sock_addr, ctx, user_ip4))
    }
}

#[inline(always)]
fn peer_port(ctx: *mut bpf_sock_addr) -> u16 {
    u16::from_be(field!(bpf_sock_addr, ctx, user_port) as u16)
}

#[inline(always)]
fn set_peer<const V6: bool>(ctx: *mut bpf_sock_addr, addr: &Addr, port: u16) {
    if V6 {
        set_field!(bpf_sock_addr, ctx, user_ip6, 0, addr.words[0]);
        set_field!(bpf_sock_addr, ctx, user_ip6, 4, addr.words[1]);
        set_field!(bpf_sock_addr, ctx, user_ip6, 8, addr.words[2]);
        set_field!(bpf_sock_addr, ctx, user_ip6, 12, addr.words[3]);
    } else {
        set_field!(bpf_sock_addr, ctx, user_ip4, 0, addr.words[3]);
    }
    set_field!(bpf_sock_addr, ctx, user_port, 0, u32::from(port.to_be()));
}

/// The source a datagram is to have; unspecified while the kernel is to choose it. Only in `sendmsg` hooks.
#[inline(always)]
fn source_is_open<const V6: bool>(ctx: *mut bpf_sock_addr) -> bool {
    if V6 {
        field!(bpf_sock_addr, ctx, msg_src_ip6, 0)
            | field!(bpf_sock_addr, ctx, msg_src_ip6, 4)
            | field!(bpf_sock_addr, ctx, msg_src_ip6, 8)
            | field!(bpf_sock_addr, ctx, msg_src_ip6, 12)
            == 0
    } else {
        field!(bpf_sock_addr, ctx, msg_src_ip4) == 0
    }
}

#[inline(always)]
fn set_source<const V6: bool>(ctx: *mut bpf_sock_addr, addr: &Addr) {
    if V6 {
        set_field!(bpf_sock_addr, ctx, msg_src_ip6, 0, addr.words[0]);
        set_field!(bpf_sock_addr, ctx, msg_src_ip6, 4, addr.words[1]);
        set_field!(bpf_sock_addr, ctx, msg_src_ip6, 8, addr.words[2]);
        set_field!(bpf_sock_addr, ctx, msg_src_ip6, 12, addr.words[3]);
    } else {
        set_field!(bpf_sock_addr, ctx, msg_src_ip4, 0, addr.words[3]);
    }
}

/// The socket; never null in these hooks.
#[inline(always)]
fn socket(ctx: *mut bpf_sock_addr) -> *mut bpf_sock {
    // SAFETY: one load of a context field, which the verifier checks.
    unsafe { (*ctx).__bindgen_anon_1.sk }
}

/// What the socket remembers; with `create`, from now on.
#[inline(always)]
fn asked<'a>(sk: *mut bpf_sock, create: bool) -> Option<&'a mut Asked> {
    let map = (&raw const maps::ASKED).cast_mut();
    let flags = if create { F_CREATE } else { 0 };
    // SAFETY: the socket comes from the context, the map is socket storage with values of this type.
    let found = unsafe { bpf_sk_storage_get(map.cast(), sk.cast(), core::ptr::null_mut(), flags) };
    // SAFETY: lives as long as the socket, which is locked while this program runs.
    unsafe { found.cast::<Asked>().as_mut() }
}

struct Facts<'a> {
    ctx: *mut bpf_sock_addr,
    sk: *mut bpf_sock,
    cookie: u64,
    pod: &'a Pod,
    resolver: Addr,
}

impl LookupFacts for Facts<'_> {
    #[inline(always)]
    fn is_ztunnel(&self) -> bool {
        if field!(bpf_sock, self.sk, mark) & mark::MASK != mark::ZTUNNEL {
            return false;
        }
        if self.pod.flags & pod_flags::NAMED_ZTUNNEL == 0 || ztunnel_storage(self.sk, false) {
            return true;
        }
        count(self.cookie, Verdict::Impostor);
        false
    }

    #[inline(always)]
    fn serves(&self) -> bool {
        field!(bpf_sock, self.sk, src_port) as u16 == port::DOMAIN
    }

    #[inline(always)]
    fn bound_to_device(&self) -> bool {
        field!(bpf_sock, self.sk, bound_dev_if) != 0
    }

    #[inline(always)]
    fn resolver_is_own(&self) -> bool {
        is_own(self.cookie, self.resolver)
    }

    #[inline(always)]
    fn resolver_is_excluded(&self) -> bool {
        self.pod.flags & pod_flags::OUT_PORTS != 0 && port_excluded(self.cookie, port::DOMAIN, 0)
            || self.pod.flags & pod_flags::CIDRS != 0 && cidr_excluded(self.cookie, self.resolver)
    }

    #[inline(always)]
    fn captures(&self) -> bool {
        captures_dns(self.cookie, self.pod, self.resolver)
    }

    #[inline(always)]
    fn ztunnel_listens(&self) -> bool {
        let named = self.pod.flags & pod_flags::NAMED_ZTUNNEL != 0;
        ztunnel_listens(self.ctx, self.resolver.is_v4(), named)
    }
}

/// Is there a socket of ztunnel's to take a datagram? Asked for each query, so that names go on resolving while
/// ztunnel restarts: sent to a closed port, most clients would give up at once.
#[inline(always)]
fn ztunnel_listens(ctx: *mut bpf_sock_addr, v4: bool, named: bool) -> bool {
    const CURRENT_NETNS: u64 = u64::MAX;
    let ports = u32::from_ne_bytes({
        let (from, to) = (port::DOMAIN.to_be_bytes(), port::DNS.to_be_bytes());
        [from[0], from[1], to[0], to[1]]
    });
    let [.., near] = dns::listener(v4).words;
    // struct bpf_sock_tuple is a union of both families, laid out here by hand: source, destination, ports.
    let mut v4_tuple = [near, near, ports];
    let mut v6_tuple = [0, 0, 0, near, 0, 0, 0, near, ports];
    let (tuple, words) = if v4 {
        (v4_tuple.as_mut_ptr(), v4_tuple.len())
    } else {
        (v6_tuple.as_mut_ptr(), v6_tuple.len())
    };
    // SAFETY: our own context; the tuple lives on our stack for the length of the call.
    let found = unsafe {
        bpf_sk_lookup_udp(
            ctx.cast::<c_void>(),
            tuple.cast::<bpf_sock_tuple>(),
            words as u32 * 4,
            CURRENT_NETNS,
            0,
        )
    };
    if found.is_null() {
        return false;
    }
    // Anybody may bind a port beside ztunnel, or while it is away.
    let marked = field!(bpf_sock, found, mark) & mark::MASK == mark::ZTUNNEL;
    let known = marked && (!named || ztunnel_storage(found, false));
    // SAFETY: the reference that the look-up returned, given back once.
    unsafe { bpf_sk_release(found.cast()) };
    known
}

/// Decides and reports.
#[inline(always)]
fn decide<'a>(
    ctx: *mut bpf_sock_addr,
    sk: *mut bpf_sock,
    resolver: Addr,
) -> Option<(Lookup, &'a Pod)> {
    let cookie = netns_cookie(ctx);
    // SAFETY: entries are replaced whole; each field stands alone.
    let pod = unsafe { maps::PODS.get(cookie) }?;
    if pod.flags & pod_flags::DNS == 0 {
        return None;
    }
    let facts = Facts {
        ctx,
        sk,
        cookie,
        pod,
        resolver,
    };
    let lookup = dns::lookup(&resolver, &facts);
    let v4 = resolver.is_v4();
    let tuple = FourTuple {
        src: if v4 {
            Addr::v4(field!(bpf_sock, sk, src_ip4))
        } else {
            Addr::v6([
                field!(bpf_sock, sk, src_ip6, 0),
                field!(bpf_sock, sk, src_ip6, 4),
                field!(bpf_sock, sk, src_ip6, 8),
                field!(bpf_sock, sk, src_ip6, 12),
            ])
        },
        dst: resolver,
        src_port: field!(bpf_sock, sk, src_port) as u16,
        dst_port: port::DOMAIN,
    };
    decided(cookie, lookup.verdict(v4), &tuple, 0);
    Some((lookup, pod))
}

/// Gives a socket that has neither address nor port the source it would have got without us. Left to the routes it
/// would be a loopback address, which stays when the socket connects again, and leads nowhere from there.
#[inline(always)]
fn keep_source<const V6: bool>(ctx: *mut bpf_sock_addr, sk: *mut bpf_sock, pod: &Pod, v4: bool) {
    let [source4, source6] = &pod.lookup_sources;
    let source = if v4 { source4 } else { source6 };
    if field!(bpf_sock, sk, src_port) != 0 || source.is_unspecified() {
        return;
    }
    if V6 {
        // struct sockaddr_in6: family and port, flow, address, scope.
        let [a, b, c, d] = source.words;
        let mut address = [AF_INET6, 0, a, b, c, d, 0];
        // SAFETY: our own context; the address lives on our stack for the length of the call.
        unsafe { bpf_bind(ctx, address.as_mut_ptr().cast(), 28) };
    } else {
        // struct sockaddr_in: family and port, address, padding.
        let mut address = [AF_INET, source.words[3], 0, 0];
        // SAFETY: as above.
        unsafe { bpf_bind(ctx, address.as_mut_ptr().cast(), 16) };
    }
}

/// `connect()` of a datagram socket.
#[inline(always)]
pub fn connect<const V6: bool>(ctx: *mut bpf_sock_addr) -> i32 {
    if field!(bpf_sock_addr, ctx, protocol) != IPPROTO_UDP {
        return 1;
    }
    let to_port = peer_port(ctx);
    if to_port != port::DOMAIN {
        if to_port == port::DNS {
            // Somebody talks to ztunnel under its own name: no answer is to be renamed.
            if let Some(asked) = asked(socket(ctx), false) {
                asked.count = 0;
            }
        }
        return 1;
    }
    let sk = socket(ctx);
    let resolver = peer::<V6>(ctx);
    if let Some((Lookup::Captured, pod)) = decide(ctx, sk, resolver)
        && let Some(asked) = asked(sk, true)
    {
        keep_source::<V6>(ctx, sk, pod, resolver.is_v4());
        asked.count = 0;
        asked.only(&resolver);
        set_peer::<V6>(ctx, &dns::listener(resolver.is_v4()), port::DNS);
    }
    1
}

/// A datagram that says itself where it goes.
#[inline(always)]
pub fn sendmsg<const V6: bool>(ctx: *mut bpf_sock_addr) -> i32 {
    let to_port = peer_port(ctx);
    if to_port != port::DOMAIN {
        // An answer of ztunnel's: it is to come from the address it goes to.
        let to = peer::<V6>(ctx);
        if dns::is_stand_in(&to) && field!(bpf_sock, socket(ctx), src_port) as u16 == port::DNS {
            set_source::<V6>(ctx, &to);
        }
        return 1;
    }
    if field!(bpf_sock_addr, ctx, protocol) != IPPROTO_UDP {
        return 1;
    }
    let sk = socket(ctx);
    let resolver = peer::<V6>(ctx);
    if let Some((Lookup::Captured, _)) = decide(ctx, sk, resolver)
        && let Some(asked) = asked(sk, true)
    {
        let v4 = resolver.is_v4();
        let connected = field!(bpf_sock, sk, state) == TCP_ESTABLISHED;
        if v4 && !connected && source_is_open::<V6>(ctx) {
            let slot = asked.one_of(&resolver);
            if slot != 0 {
                set_source::<V6>(ctx, &dns::stand_in(v4, slot));
            }
        } else {
            asked.only(&resolver);
        }
        set_peer::<V6>(ctx, &dns::listener(v4), port::DNS);
    }
    1
}

/// A datagram that came, and whose sender is asked for; or a connected socket whose peer is.
#[inline(always)]
pub fn answered<const V6: bool>(ctx: *mut bpf_sock_addr) -> i32 {
    let from_port = peer_port(ctx);
    if from_port != port::DNS {
        return 1;
    }
    if let Some(slot) = dns::slot_of(&peer::<V6>(ctx), from_port)
        && let Some(asked) = asked(socket(ctx), false)
        && let Some(resolver) = asked.resolver(slot)
    {
        set_peer::<V6>(ctx, &resolver, port::DOMAIN);
    }
    1
}
