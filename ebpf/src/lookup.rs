//! `culvert_dns_*`: DNS over UDP of enrolled pods, to ztunnel and back.
//!
//! On the way out (`connect`, `sendmsg`) a datagram for port 53 is sent to ztunnel's listener in the pod, if one is
//! there. Which resolver it was for is remembered for the pod, if it is the first that the pod asked, else under the
//! socket; on the way back (`recvmsg`, `getpeername`) that resolver's address is put in the place of ztunnel's. An answer
//! of ztunnel's to one of several resolvers' slots gets that slot's address as its source, and nobody else may send what
//! would pass for one. All other datagrams leave on the first compares. The kernel holds the socket's lock around each of
//! these programs, so what is stored with it needs none of its own.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::{BPF_NOEXIST, bpf_sock, bpf_sock_addr, bpf_sock_tuple},
    helpers::{bpf_bind, bpf_sk_lookup_udp, bpf_sk_release, bpf_sk_storage_get},
};
use culvert_ebpf::{
    abi::{Asked, FourTuple, Pod, UsualKey, mark, pod_flags, port},
    addr::Addr,
    decide::Verdict,
    dns::{self, Lookup, LookupFacts, Reach},
};

use crate::{
    kernel::{
        AF_INET, captures_dns, cidr_excluded, field, is_own, netns_cookie, port_excluded,
        ztunnel_storage,
    },
    maps,
    report::{count, decided_by},
    sockaddr::{bound_to, own_port, peer, peer_port, set_peer, set_source, socket, source},
};

const IPPROTO_UDP: u32 = 17;
const AF_INET6: u32 = 10;
/// State of a datagram socket that has a peer.
const TCP_ESTABLISHED: u32 = 1;
const F_CREATE: u64 = 1;

/// The device that the socket is bound to; 0 = none.
#[inline(always)]
fn device(sk: *mut bpf_sock) -> u32 {
    field!(bpf_sock, sk, bound_dev_if)
}

#[inline(always)]
fn connected(sk: *mut bpf_sock) -> bool {
    field!(bpf_sock, sk, state) == TCP_ESTABLISHED
}

/// Has the socket ztunnel's mark?
#[inline(always)]
fn marked(sk: *mut bpf_sock) -> bool {
    field!(bpf_sock, sk, mark) & mark::MASK == mark::ZTUNNEL
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
    /// A peer that the socket has stays.
    keeps_peer: bool,
}

impl LookupFacts for Facts<'_> {
    #[inline(always)]
    fn is_ztunnel(&self) -> bool {
        if !marked(self.sk) {
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
        own_port(self.sk) == port::DOMAIN
    }

    #[inline(always)]
    fn hears_nothing(&self) -> bool {
        let device = device(self.sk);
        device != 0 && {
            let v4 = self.resolver.is_v4();
            let connects_with_port = !self.keeps_peer && own_port(self.sk) != 0;
            let bound = bound_to(self.sk, v4);
            !dns::heard_by(device, self.pod, &bound, v4, connects_with_port)
        }
    }

    #[inline(always)]
    fn has_another_peer(&self) -> bool {
        self.keeps_peer && connected(self.sk) && {
            // Network byte order in the lower half.
            let port = field!(bpf_sock, self.sk, dst_port) as u16;
            u16::from_be(port) != port::DNS
        }
    }

    #[inline(always)]
    fn loses_its_link(&self) -> bool {
        self.keeps_peer && self.resolver.is_link_local() && !connected(self.sk)
    }

    #[inline(always)]
    fn resolver_is_own(&self) -> bool {
        dns::listed(&self.pod.answered_at, &self.resolver)
            .unwrap_or_else(|| is_own(self.cookie, self.resolver))
    }

    #[inline(always)]
    fn resolver_is_excluded(&self) -> bool {
        self.pod.leaves_alone(&self.resolver)
            || self.pod.flags & pod_flags::OUT_PORTS != 0
                && port_excluded(self.cookie, port::DOMAIN, 0)
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
    let known = marked(found) && (!named || ztunnel_storage(found, false));
    // SAFETY: the reference that the look-up returned, given back once.
    unsafe { bpf_sk_release(found.cast()) };
    known
}

/// A query that goes to ztunnel.
struct Captured<'a> {
    cookie: u64,
    pod: &'a Pod,
    resolver: Addr,
    v4: bool,
}

impl Captured<'_> {
    /// The pod's address that its lookups come from; unspecified where the routes choose.
    #[inline(always)]
    fn source(&self) -> Addr {
        self.pod.lookup_source(self.v4)
    }

    /// The pod's usual resolver: the one it asked first, this one if it has asked none.
    #[inline(always)]
    fn usual(&self) -> Option<Addr> {
        let known = usual(self.cookie, self.v4);
        if known.is_some() {
            return known;
        }
        let made = maps::USUAL_RESOLVERS.insert(
            usual_key(self.cookie, self.v4),
            self.resolver,
            BPF_NOEXIST.into(),
        );
        // Another socket may have been first just now; then that one's is read the next time.
        made.ok().map(|()| self.resolver)
    }
}

#[inline(always)]
fn usual_key(cookie: u64, v4: bool) -> UsualKey {
    let family = if v4 { 4 } else { 6 };
    UsualKey { cookie, family }
}

#[inline(always)]
fn usual(cookie: u64, v4: bool) -> Option<Addr> {
    // SAFETY: written once, before anybody can find it.
    unsafe { maps::USUAL_RESOLVERS.get(usual_key(cookie, v4)) }.copied()
}

/// The pod, if its lookups are captured.
#[inline(always)]
fn pod_with_capture<'a>(cookie: u64) -> Option<&'a Pod> {
    // SAFETY: entries are replaced whole; each field stands alone.
    let pod = unsafe { maps::PODS.get(cookie) }?;
    if pod.flags & pod_flags::DNS == 0 {
        return None;
    }
    Some(pod)
}

/// Decides and reports.
#[inline(always)]
fn captured<'a>(
    ctx: *mut bpf_sock_addr,
    sk: *mut bpf_sock,
    resolver: Addr,
    keeps_peer: bool,
) -> Option<Captured<'a>> {
    let cookie = netns_cookie(ctx);
    let pod = pod_with_capture(cookie)?;
    let facts = Facts {
        ctx,
        sk,
        cookie,
        pod,
        resolver,
        keeps_peer,
    };
    let lookup = dns::lookup(&resolver, &facts);
    let v4 = resolver.is_v4();
    let client = || FourTuple {
        src: bound_to(sk, v4),
        dst: resolver,
        src_port: own_port(sk),
        dst_port: port::DOMAIN,
    };
    decided_by(cookie, lookup.verdict(v4), client, 0);
    if lookup != Lookup::Captured {
        return None;
    }
    Some(Captured {
        cookie,
        pod,
        resolver,
        v4,
    })
}

/// Somebody talks to ztunnel under its own name: no answer to that socket is to be renamed.
#[inline(always)]
fn asks_ztunnel_itself(ctx: *mut bpf_sock_addr, sk: *mut bpf_sock) {
    if pod_with_capture(netns_cookie(ctx)).is_some()
        && let Some(asked) = asked(sk, true)
    {
        asked.count = 0;
    }
}

/// Gives a socket that has neither address nor port the source it would have got without us. Left to the routes it
/// would be a loopback address, which stays when the socket connects again, and leads nowhere from there.
#[inline(always)]
fn keep_source<const V6: bool>(ctx: *mut bpf_sock_addr, sk: *mut bpf_sock, source: Addr) {
    if own_port(sk) != 0 || source.is_unspecified() {
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

/// Somebody else than ztunnel sends from its port what whoever asked a resolver would take for an answer, under that
/// resolver's name: without us nobody could do that without a raw socket. Where no lookup is captured nor ever was,
/// nothing is taken for one.
#[inline(always)]
fn forges(ctx: *mut bpf_sock_addr, source: &Addr, to: &Addr) -> bool {
    if !dns::passes_for_an_answer(source, to) {
        return false;
    }
    let cookie = netns_cookie(ctx);
    // SAFETY: entries are replaced whole; each field stands alone.
    let Some(pod) = (unsafe { maps::PODS.get(cookie) }) else {
        return false;
    };
    if pod.flags & pod_flags::DNS == 0 && usual(cookie, to.is_v4()).is_none() {
        return false;
    }
    count(cookie, Verdict::Impostor);
    true
}

/// `connect()` of a datagram socket.
#[inline(always)]
pub fn connect<const V6: bool>(ctx: *mut bpf_sock_addr) -> i32 {
    let to_port = peer_port(ctx);
    let sk = socket(ctx);
    let from_port = own_port(sk);
    if to_port != port::DOMAIN && to_port != port::DNS && from_port != port::DNS {
        return 1;
    }
    if field!(bpf_sock_addr, ctx, protocol) != IPPROTO_UDP {
        return 1;
    }
    if from_port == port::DNS && !marked(sk) {
        let to = peer::<V6>(ctx);
        if forges(ctx, &bound_to(sk, to.is_v4()), &to) {
            return 0;
        }
    }
    if to_port == port::DNS {
        asks_ztunnel_itself(ctx, sk);
        return 1;
    }
    if to_port != port::DOMAIN {
        return 1;
    }
    let Some(query) = captured(ctx, sk, peer::<V6>(ctx), false) else {
        return 1;
    };
    let usual = query.usual() == Some(query.resolver);
    match asked(sk, !usual) {
        Some(asked) => asked.alone(&query.resolver),
        None if usual => {}
        // No memory to remember it in: whoever is asked answers.
        None => return 1,
    }
    keep_source::<V6>(ctx, sk, query.source());
    set_peer::<V6>(ctx, &dns::listener(query.v4), port::DNS);
    1
}

/// A datagram that says itself where it goes.
#[inline(always)]
pub fn sendmsg<const V6: bool>(ctx: *mut bpf_sock_addr) -> i32 {
    let to_port = peer_port(ctx);
    let sk = socket(ctx);
    if own_port(sk) == port::DNS {
        if marked(sk) {
            return answer::<V6>(ctx, to_port);
        }
        if forges(ctx, &source::<V6>(ctx), &peer::<V6>(ctx)) {
            return 0;
        }
    }
    if to_port != port::DOMAIN {
        // With a peer it said so at connect(). And the kernel itself names the peer here, for a socket of IPv6 whose peer
        // is of IPv4.
        if to_port == port::DNS && !connected(sk) {
            asks_ztunnel_itself(ctx, sk);
        }
        return 1;
    }
    if field!(bpf_sock_addr, ctx, protocol) != IPPROTO_UDP {
        return 1;
    }
    let Some(query) = captured(ctx, sk, peer::<V6>(ctx), true) else {
        return 1;
    };
    // A socket with a peer is answered under that one's name alone, and keeps what it noted when it connected.
    if !connected(sk) && !remember::<V6>(ctx, sk, &query) {
        return 1;
    }
    set_peer::<V6>(ctx, &dns::listener(query.v4), port::DNS);
    1
}

/// Remembers whom a socket asks, and gives the query the source that tells its answer from others, or that makes its device
/// hear the answer. False where there is no memory to remember it in.
#[inline(always)]
fn remember<const V6: bool>(
    ctx: *mut bpf_sock_addr,
    sk: *mut bpf_sock,
    query: &Captured<'_>,
) -> bool {
    let usual = query.usual();
    let is_usual = usual == Some(query.resolver);
    let mut answered_at = bound_to(sk, query.v4);
    if device(sk) != 0 {
        answered_at = query.source();
        set_source::<V6>(ctx, &answered_at);
    }
    let Some(asked) = asked(sk, !is_usual) else {
        return is_usual;
    };
    let Some(reach) = Reach::of(&answered_at, &query.pod.answered_at) else {
        asked.only(&query.resolver);
        return true;
    };
    let slot = asked.one_of(&usual.unwrap_or(query.resolver), &query.resolver);
    if slot != 0 {
        set_source::<V6>(ctx, &dns::stand_in(query.v4, reach, slot));
    }
    true
}

/// An answer of ztunnel's: one to an address that stands for a slot is to come from there.
#[inline(always)]
fn answer<const V6: bool>(ctx: *mut bpf_sock_addr, to_port: u16) -> i32 {
    let to = peer::<V6>(ctx);
    let Some((reach, _)) = dns::stands_for(&to) else {
        return 1;
    };
    // SAFETY: entries are replaced whole; each field stands alone.
    let pod = (reach != Reach::Any).then(|| unsafe { maps::PODS.get(netns_cookie(ctx)) });
    let own = pod.flatten().map(|pod| &pod.answered_at);
    let Some(near) = dns::delivered_to(&to, reach, own) else {
        return 1;
    };
    set_source::<V6>(ctx, &to);
    set_peer::<V6>(ctx, &near, to_port);
    1
}

/// A datagram that came, and whose sender is asked for; or a connected socket whose peer is. The latter is asked of streams
/// as well, and none of those was sent elsewhere by us.
#[inline(always)]
pub fn answered<const V6: bool>(ctx: *mut bpf_sock_addr) -> i32 {
    if peer_port(ctx) != port::DNS || field!(bpf_sock_addr, ctx, protocol) != IPPROTO_UDP {
        return 1;
    }
    let from = peer::<V6>(ctx);
    let Some(slot) = dns::slot_of(&from) else {
        return 1;
    };
    let v4 = from.is_v4();
    let resolver = match asked(socket(ctx), false) {
        None => usual(netns_cookie(ctx), v4),
        Some(asked) => match asked.resolver(slot) {
            // The first slot is of one family, and the socket may have asked the other's usual resolver.
            Some(other) if other.is_v4() != v4 => usual(netns_cookie(ctx), v4),
            known => known,
        },
    };
    if let Some(resolver) = resolver {
        set_peer::<V6>(ctx, &resolver, port::DOMAIN);
    }
    1
}
