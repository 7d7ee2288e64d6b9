//! Lookups over UDP: which of them ztunnel answers, and how an answer finds the resolver it stands for.
//!
//! ztunnel listens on one loopback address of each family and answers from there, whoever was asked. A socket that asks
//! one resolver needs no more than its address remembered. One that asks several (musl's, a forwarder's) must be told
//! whose answer it has: from the second resolver on, the query's source address says which slot of [`Asked`] it is
//! ([`stand_in`]), ztunnel's answer goes back to that address, and is given it as its own source on the way.
//!
//! Pure functions; `lookup.rs` reads the context and the maps for them.

use crate::abi::{ASKED_SLOTS, Asked, port};
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
    /// The pod is a resolver itself, and asks itself.
    fn resolver_is_own(&self) -> bool;
    /// The socket is bound to a device: it cannot reach ztunnel, which listens on loopback.
    fn bound_to_device(&self) -> bool;
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
        || facts.bound_to_device()
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

/// 127.53.0.0, to which a slot's number is added.
const STAND_IN: u32 = 0x7f35_0000;

/// The address that stands for a slot, as the source of its queries and of their answers: 127.53.0.N, and ::127.53.0.N
/// in IPv6, where the rule for it is.
#[inline(always)]
#[must_use]
pub const fn stand_in(v4: bool, slot: usize) -> Addr {
    let word = (STAND_IN | (slot as u32 & 0xff)).to_be();
    if v4 {
        Addr::v4(word)
    } else {
        Addr::v6([0, 0, 0, word])
    }
}

/// Is it one of [`stand_in`]'s?
#[inline(always)]
#[must_use]
pub const fn is_stand_in(addr: &Addr) -> bool {
    (addr.is_v4() || addr.words[0] == 0 && addr.words[1] == 0 && addr.words[2] == 0)
        && u32::from_be(addr.words[3]) & 0xffff_ff00 == STAND_IN
}

/// The slot of which an answer is, if ztunnel could have sent it.
#[inline(always)]
#[must_use]
pub fn slot_of(from: &Addr, from_port: u16) -> Option<usize> {
    if from_port != port::DNS {
        return None;
    }
    if is_stand_in(from) {
        return Some((u32::from_be(from.words[3]) & 0xff) as usize);
    }
    if *from == listener(true) || *from == listener(false) {
        return Some(0);
    }
    None
}

impl Asked {
    /// Remembers the only resolver of a socket, or the last one where answers cannot be told apart.
    #[inline(always)]
    pub fn only(&mut self, resolver: &Addr) {
        self.resolvers[0] = *resolver;
        if self.count == 0 {
            self.count = 1;
        }
    }

    /// Remembers one of several resolvers and returns its slot; with all in use the oldest but the first gives way.
    #[inline(always)]
    pub fn one_of(&mut self, resolver: &Addr) -> usize {
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
