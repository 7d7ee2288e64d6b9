//! Lookups over UDP: which of them ztunnel answers, and how an answer finds the resolver it stands for.
//!
//! ztunnel listens on one loopback address of each family and answers from there, whoever was asked. Most sockets ask the
//! resolver that their pod asked first and need no memory of their own: an answer to a socket without one is that
//! resolver's. A socket that asks another remembers whom. One that asks several (musl's, a forwarder's) must be told
//! whose answer it has: from the second resolver on, the query's source address says which slot of [`Asked`] it is
//! ([`stand_in`]), ztunnel's answer goes back to that address, and is given it as its own source on the way.
//!
//! Pure functions; `lookup.rs` reads the context and the maps for them.

use crate::abi::{ASKED_SLOTS, Asked, MAX_ANSWERED_AT, Pod};
use crate::addr::Addr;
use crate::decide::Verdict;

/// What happens to a query.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lookup {
    /// ztunnel is asked.
    Captured,
    /// ztunnel would be, but does not listen: the resolver is asked.
    Away,
    /// The resolver is asked, by the pod's own settings.
    Left,
    /// It is ztunnel that asks.
    Ztunnel,
}

impl Lookup {
    /// As it is counted.
    #[inline(always)]
    pub const fn verdict(self, v4: bool) -> Verdict {
        match (self, v4) {
            (Self::Captured, true) => Verdict::DnsUdp4,
            (Self::Captured, false) => Verdict::DnsUdp6,
            (Self::Away, true) => Verdict::DnsAway4,
            (Self::Away, false) => Verdict::DnsAway6,
            (Self::Left, true) => Verdict::DnsLeft4,
            (Self::Left, false) => Verdict::DnsLeft6,
            (Self::Ztunnel, true) => Verdict::DnsZtunnel4,
            (Self::Ztunnel, false) => Verdict::DnsZtunnel6,
        }
    }
}

/// What the decision about a query may ask.
pub trait LookupFacts {
    /// The socket is ztunnel's, by more than its mark where that is known.
    fn is_ztunnel(&self) -> bool;
    /// The socket's own port is 53: it belongs to a resolver, which answers.
    fn serves(&self) -> bool;
    /// The socket is connected, and not to ztunnel: it takes nobody's answers but its peer's.
    fn has_another_peer(&self) -> bool;
    /// The resolver is one of a link, and the datagram says which: no program can give the answer's sender its link back.
    fn loses_its_link(&self) -> bool;
    /// The pod is a resolver itself, and asks itself.
    fn resolver_is_own(&self) -> bool;
    /// The socket is bound to a device, and by that no answer of ztunnel's would reach it.
    fn hears_nothing(&self) -> bool;
    /// The resolver's port or network is excluded.
    fn resolver_is_excluded(&self) -> bool;
    /// Capture is on for this resolver.
    fn captures(&self) -> bool;
    /// A ztunnel listens for datagrams.
    fn ztunnel_listens(&self) -> bool;
}

/// The decision on a datagram, or on a datagram socket's `connect()`, to port 53.
#[inline(always)]
pub fn lookup(resolver: &Addr, facts: &impl LookupFacts) -> Lookup {
    if facts.is_ztunnel() {
        return Lookup::Ztunnel;
    }
    let near = resolver.is_loopback() || resolver.is_unspecified() || resolver.is_multicast();
    if near
        || facts.serves()
        || facts.hears_nothing()
        || facts.has_another_peer()
        || facts.loses_its_link()
        || !facts.captures()
        || facts.resolver_is_own()
        || facts.resolver_is_excluded()
    {
        return Lookup::Left;
    }
    if facts.ztunnel_listens() {
        Lookup::Captured
    } else {
        Lookup::Away
    }
}

/// 127.0.0.1 or ::1: where ztunnel listens.
#[inline(always)]
#[must_use]
pub const fn listener(v4: bool) -> Addr {
    if v4 {
        Addr::v4(u32::from_ne_bytes([127, 0, 0, 1]))
    } else {
        Addr::v6([0, 0, 0, 1_u32.to_be()])
    }
}

/// Is this one of a pod's addresses, as far as its list tells? A full list tells nothing of those that are not in it, and
/// none tells of link-local ones.
#[inline(always)]
#[must_use]
pub fn listed(own: &[Addr; MAX_ANSWERED_AT], addr: &Addr) -> Option<bool> {
    for known in own {
        if known.is_unspecified() {
            return if addr.is_link_local() {
                None
            } else {
                Some(false)
            };
        }
        if known == addr {
            return Some(true);
        }
    }
    None
}

/// Would an answer of ztunnel's reach a socket that is bound to this device? The kernel delivers it by `lo`, and says that
/// it came by the interface that has the address it is for. So the lookup has to come from an address of the device's;
/// which one a socket that has none yet is given, unless it has a port and connects: then the routes give it a loopback
/// address, whatever we do.
#[inline(always)]
#[must_use]
pub fn heard_by(device: u32, pod: &Pod, bound: &Addr, v4: bool, connects_with_port: bool) -> bool {
    let source = pod.lookup_source(v4);
    device == pod.lookup_ifindex()
        && !source.is_unspecified()
        && (*bound == source || bound.is_unspecified() && !connects_with_port)
}

/// Would a datagram from ztunnel's port, with this source and destination, pass for an answer of ztunnel's? An unspecified
/// source is chosen later, by the destination.
#[inline(always)]
#[must_use]
pub fn passes_for_an_answer(source: &Addr, to: &Addr) -> bool {
    if source.is_unspecified() {
        to.is_loopback() || to.is_unspecified() || to.is_multicast()
    } else {
        slot_of(source).is_some()
    }
}

/// Where a socket takes datagrams, as far as its answers can be told apart there.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reach {
    /// At any of the namespace's addresses.
    Any,
    /// At one of the pod's, by its place in [`Pod::answered_at`](crate::abi::Pod).
    Own(u8),
}

impl Reach {
    /// Of a socket bound to this address, in a pod that has these; none for one bound to another.
    #[inline(always)]
    #[must_use]
    pub fn of(bound: &Addr, own: &[Addr; MAX_ANSWERED_AT]) -> Option<Self> {
        if bound.is_unspecified() {
            return Some(Self::Any);
        }
        for (place, addr) in own.iter().enumerate() {
            if addr == bound {
                return Some(Self::Own(place as u8));
            }
        }
        None
    }
}

/// 127.53.0.0, to which a slot's number is added.
const STAND_IN: u32 = 0x7f35_0000;
/// 127.53.16.0, to which for [`Reach::Own`] the place is added as well, one step in the third number.
const AT_OWN: u32 = STAND_IN | 0x1000;
const PLACE_SHIFT: u32 = 8;
/// A mask and not a bound: the verifier believes it wherever the compiler computes the place.
const PLACES: u32 = MAX_ANSWERED_AT as u32 - 1;
const _: () = assert!(MAX_ANSWERED_AT == 16 && ASKED_SLOTS <= 256);

/// The address that stands for a slot, as the source of its queries and of their answers: 127.53.0.N, or 127.53.P.N with
/// P from 16 for a socket bound to an address of the pod's; in IPv6 the same behind `::`, which no host has.
#[inline(always)]
#[must_use]
pub const fn stand_in(v4: bool, reach: Reach, slot: usize) -> Addr {
    let net = match reach {
        Reach::Any => STAND_IN,
        Reach::Own(place) => AT_OWN | (place as u32 & PLACES) << PLACE_SHIFT,
    };
    let word = (net | slot as u32 & 0xff).to_be();
    if v4 {
        Addr::v4(word)
    } else {
        Addr::v6([0, 0, 0, word])
    }
}

/// The reach and slot that an address stands for, if it is one of [`stand_in`]'s.
#[inline(always)]
#[must_use]
pub const fn stands_for(addr: &Addr) -> Option<(Reach, usize)> {
    if !addr.is_v4() && (addr.words[0] != 0 || addr.words[1] != 0 || addr.words[2] != 0) {
        return None;
    }
    let word = u32::from_be(addr.words[3]);
    let reach = if word & 0xffff_ff00 == STAND_IN {
        Reach::Any
    } else if word & 0xffff_f000 == AT_OWN {
        Reach::Own((word >> PLACE_SHIFT & PLACES) as u8)
    } else {
        return None;
    };
    Some((reach, (word & 0xff) as usize))
}

/// Where an answer to a stand-in is delivered, in a pod that has these addresses.
#[inline(always)]
#[must_use]
pub fn delivered_to(
    stand_in: &Addr,
    reach: Reach,
    own: Option<&[Addr; MAX_ANSWERED_AT]>,
) -> Option<Addr> {
    match reach {
        Reach::Own(place) => {
            let addr = own?.get((u32::from(place) & PLACES) as usize)?;
            (addr.is_v4() == stand_in.is_v4() && !addr.is_unspecified()).then_some(*addr)
        }
        // All of 127.0.0.0/8 is local; of IPv6 but one address is.
        Reach::Any if stand_in.is_v4() => Some(*stand_in),
        Reach::Any => Some(listener(false)),
    }
}

/// The slot of which an answer is, if ztunnel could have sent it.
#[inline(always)]
#[must_use]
pub fn slot_of(from: &Addr) -> Option<usize> {
    if let Some((_, slot)) = stands_for(from) {
        return Some(slot);
    }
    if *from == listener(true) || *from == listener(false) {
        return Some(0);
    }
    None
}

impl Asked {
    /// Remembers the resolver of a socket that asks no other.
    #[inline(always)]
    pub fn alone(&mut self, resolver: &Addr) {
        self.resolvers[0] = *resolver;
        self.count = 1;
    }

    /// Remembers the resolver asked last, of a socket whose answers cannot be told apart.
    #[inline(always)]
    pub fn only(&mut self, resolver: &Addr) {
        self.resolvers[0] = *resolver;
        if self.count == 0 {
            self.count = 1;
        }
    }

    /// Remembers one of several resolvers and returns its slot; with all in use the oldest but the first gives way. The
    /// first of a socket that remembered none is its pod's usual one: the socket may have asked that before.
    #[inline(always)]
    pub fn one_of(&mut self, usual: &Addr, resolver: &Addr) -> usize {
        if self.count == 0 {
            self.alone(usual);
        }
        for (slot, known) in self.resolvers.iter_mut().enumerate() {
            if slot as u32 >= self.count {
                self.count = slot as u32 + 1;
                *known = *resolver;
                return slot;
            }
            if known == resolver {
                return slot;
            }
        }
        let mut slot = (self.replaced as usize).wrapping_add(1);
        if slot >= ASKED_SLOTS {
            slot = 1;
        }
        self.replaced = slot as u32;
        // Always there; an index would bring a panic along, which programs cannot have.
        if let Some(oldest) = self.resolvers.get_mut(slot) {
            *oldest = *resolver;
        }
        slot
    }

    /// The resolver of a slot.
    #[inline(always)]
    #[must_use]
    pub fn resolver(&self, slot: usize) -> Option<Addr> {
        if slot as u32 >= self.count {
            return None;
        }
        self.resolvers.get(slot).copied()
    }
}

#[cfg(test)]
#[path = "dns_tests.rs"]
mod tests;
