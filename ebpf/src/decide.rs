//! The two decision tables, as pure functions.
//!
//! Facts that cost a map look-up are asked for lazily through [`ConnectFacts`] and [`SteerFacts`]: the
//! programs answer them from maps, the tests from a plain model. Nothing here depends on the name of an
//! interface, and only the pod whose facts are asked decides.

use crate::abi::{port, role};
use crate::addr::Addr;

/// What happened to one connection attempt; the index into [`Counters`](crate::abi::Counters).
#[must_use]
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// connect: turned round to ztunnel.
    Captured = 0,
    /// connect: the pod to itself or to loopback.
    Home = 1,
    /// connect: ztunnel is away and the grace is over.
    Refused = 2,
    /// connect: destination port or CIDR is excluded.
    ExcludedOutbound = 3,
    /// connect: ztunnel to the application.
    Delivery = 4,
    /// connect: ztunnel on its own way out.
    ZtunnelOut = 5,
    /// connect, listen, lookup or setsockopt: ztunnel's mark on a socket that is not ztunnel's, or one of ours asked for by
    /// a process. A datagram: what would pass for an answer of ztunnel's from a socket without its mark.
    Impostor = 6,
    /// steer: to a loopback address, left alone.
    PassLoopback = 7,
    /// steer: to 15001.
    Outbound = 8,
    /// steer: a lookup over TCP and IPv4, to 15053.
    DnsTcp4 = 9,
    /// steer: from behind a virtual interface, to 15001.
    Virtual = 10,
    /// steer: delivery or the pod to itself, left alone.
    PassHome = 11,
    /// steer: to ztunnel's 15008.
    Hbone = 12,
    /// steer: a node probe, left alone.
    PassVouched = 13,
    /// steer: inbound port is excluded, left alone.
    PassExcluded = 14,
    /// steer: inbound capture is off for this pod, left alone.
    PassBypass = 15,
    /// steer: to 15006.
    Inbound = 16,
    /// steer: the listener an outbound connection needs is missing: dropped.
    NoOutboundListener = 17,
    /// steer: the listener an inbound connection needs is missing: dropped.
    NoInboundListener = 18,
    /// steer: not turned round, to an address that is not known to be the pod's: dropped.
    UnknownDestination = 19,
    /// setsockopt: a mark or device binding that would lead round ztunnel was refused or ignored.
    OptionDenied = 20,
    /// node: a probe was vouched for.
    Vouched = 21,
    /// node: a connection from the node was not vouched for: it goes through ztunnel.
    NotVouched = 22,
    /// steer: a lookup over TCP and IPv6, to 15053.
    DnsTcp6 = 23,
    /// lookup over UDP: to ztunnel.
    DnsUdp4 = 24,
    /// The same over IPv6.
    DnsUdp6 = 25,
    /// lookup over UDP: no ztunnel listens, so the resolver itself is asked.
    DnsAway4 = 26,
    /// The same over IPv6.
    DnsAway6 = 27,
    /// lookup over UDP: this resolver is not to be replaced.
    DnsLeft4 = 28,
    /// The same over IPv6.
    DnsLeft6 = 29,
    /// lookup over UDP: ztunnel asks a resolver.
    DnsZtunnel4 = 30,
    /// The same over IPv6.
    DnsZtunnel6 = 31,
    /// steer: a lookup over TCP and IPv4 while ztunnel has no listener for lookups: to 15001 like all else.
    DnsAwayTcp4 = 32,
    /// The same over IPv6.
    DnsAwayTcp6 = 33,
    /// steer: a lookup over TCP and IPv4 whose resolver is not to be replaced: to 15001 like all else.
    DnsLeftTcp4 = 34,
    /// The same over IPv6.
    DnsLeftTcp6 = 35,
}

impl Verdict {
    /// Every verdict, in the order of its number.
    pub const ALL: [Self; 36] = [
        Self::Captured,
        Self::Home,
        Self::Refused,
        Self::ExcludedOutbound,
        Self::Delivery,
        Self::ZtunnelOut,
        Self::Impostor,
        Self::PassLoopback,
        Self::Outbound,
        Self::DnsTcp4,
        Self::Virtual,
        Self::PassHome,
        Self::Hbone,
        Self::PassVouched,
        Self::PassExcluded,
        Self::PassBypass,
        Self::Inbound,
        Self::NoOutboundListener,
        Self::NoInboundListener,
        Self::UnknownDestination,
        Self::OptionDenied,
        Self::Vouched,
        Self::NotVouched,
        Self::DnsTcp6,
        Self::DnsUdp4,
        Self::DnsUdp6,
        Self::DnsAway4,
        Self::DnsAway6,
        Self::DnsLeft4,
        Self::DnsLeft6,
        Self::DnsZtunnel4,
        Self::DnsZtunnel6,
        Self::DnsAwayTcp4,
        Self::DnsAwayTcp6,
        Self::DnsLeftTcp4,
        Self::DnsLeftTcp6,
    ];

    /// The name used in counters, events and metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Captured => "captured",
            Self::Home => "home",
            Self::Refused => "refused",
            Self::ExcludedOutbound => "excluded_outbound",
            Self::Delivery => "delivery",
            Self::ZtunnelOut => "ztunnel_out",
            Self::Impostor => "impostor",
            Self::PassLoopback => "pass_loopback",
            Self::Outbound => "to_outbound",
            Self::DnsTcp4 => "to_dns_tcp4",
            Self::Virtual => "to_outbound_virtual",
            Self::PassHome => "pass_home",
            Self::Hbone => "to_hbone",
            Self::PassVouched => "pass_vouched",
            Self::PassExcluded => "pass_excluded_inbound",
            Self::PassBypass => "pass_bypass_inbound",
            Self::Inbound => "to_inbound",
            Self::NoOutboundListener => "no_outbound_listener",
            Self::NoInboundListener => "no_inbound_listener",
            Self::UnknownDestination => "unknown_destination",
            Self::OptionDenied => "option_denied",
            Self::Vouched => "vouched",
            Self::NotVouched => "not_vouched",
            Self::DnsTcp6 => "to_dns_tcp6",
            Self::DnsUdp4 => "to_dns_udp4",
            Self::DnsUdp6 => "to_dns_udp6",
            Self::DnsAway4 => "dns_away_udp4",
            Self::DnsAway6 => "dns_away_udp6",
            Self::DnsLeft4 => "dns_left_udp4",
            Self::DnsLeft6 => "dns_left_udp6",
            Self::DnsZtunnel4 => "dns_ztunnel_udp4",
            Self::DnsZtunnel6 => "dns_ztunnel_udp6",
            Self::DnsAwayTcp4 => "dns_away_tcp4",
            Self::DnsAwayTcp6 => "dns_away_tcp6",
            Self::DnsLeftTcp4 => "dns_left_tcp4",
            Self::DnsLeftTcp6 => "dns_left_tcp6",
        }
    }

    /// Which of ztunnel's listeners takes the SYN, where one is to (`role::*`).
    #[inline(always)]
    #[must_use]
    pub const fn listener(self) -> Option<u32> {
        match self {
            Self::Outbound
            | Self::Virtual
            | Self::DnsAwayTcp4
            | Self::DnsAwayTcp6
            | Self::DnsLeftTcp4
            | Self::DnsLeftTcp6 => Some(role::OUTBOUND),
            Self::DnsTcp4 => Some(role::DNS4),
            Self::DnsTcp6 => Some(role::DNS6),
            Self::Inbound => Some(role::INBOUND),
            Self::Hbone => Some(role::HBONE),
            _ => None,
        }
    }

    /// What becomes of such a SYN when that listener is missing. Never past ztunnel; but a ztunnel may serve its pods and
    /// have no proxy for lookups, and one over TCP is a connection like others then.
    #[inline(always)]
    pub const fn unheard(self) -> Self {
        match self {
            Self::DnsTcp4 => Self::DnsAwayTcp4,
            Self::DnsTcp6 => Self::DnsAwayTcp6,
            Self::Inbound | Self::Hbone => Self::NoInboundListener,
            _ => Self::NoOutboundListener,
        }
    }

    /// The SYN is dropped.
    #[inline(always)]
    #[must_use]
    pub const fn drops(self) -> bool {
        matches!(
            self,
            Self::NoOutboundListener | Self::NoInboundListener | Self::UnknownDestination
        )
    }

    /// Which of the pod's directions it concerns.
    #[must_use]
    pub const fn direction(self) -> &'static str {
        match self {
            Self::Captured
            | Self::Refused
            | Self::ExcludedOutbound
            | Self::ZtunnelOut
            | Self::Outbound
            | Self::DnsTcp4
            | Self::Virtual
            | Self::NoOutboundListener
            | Self::DnsTcp6
            | Self::DnsUdp4
            | Self::DnsUdp6
            | Self::DnsAway4
            | Self::DnsAway6
            | Self::DnsLeft4
            | Self::DnsLeft6
            | Self::DnsZtunnel4
            | Self::DnsZtunnel6
            | Self::DnsAwayTcp4
            | Self::DnsAwayTcp6
            | Self::DnsLeftTcp4
            | Self::DnsLeftTcp6 => "outbound",
            Self::Delivery
            | Self::Hbone
            | Self::PassVouched
            | Self::PassExcluded
            | Self::PassBypass
            | Self::Inbound
            | Self::NoInboundListener
            | Self::UnknownDestination
            | Self::Vouched
            | Self::NotVouched => "inbound",
            Self::Home
            | Self::PassLoopback
            | Self::PassHome
            | Self::Impostor
            | Self::OptionDenied => "local",
        }
    }
}

/// What the decision at `connect()` may ask.
pub trait ConnectFacts {
    /// The socket is ztunnel's, by more than its mark where that is known.
    fn is_ztunnel(&self) -> bool;
    /// The destination is one of the pod's own addresses.
    fn destination_is_own(&self) -> bool;
    /// The destination's port or network is excluded.
    fn destination_is_excluded(&self) -> bool;
    /// ztunnel is away and the grace is over.
    fn refusing(&self) -> bool;
    /// The socket is bound to a device.
    fn bound_to_device(&self) -> bool;
}

/// The table of `TCP_CONNECT_CB`, for a socket of an enrolled pod.
#[inline(always)]
pub fn connect(dst: &Addr, facts: &impl ConnectFacts) -> Verdict {
    if facts.is_ztunnel() {
        return if dst.is_loopback() || facts.destination_is_own() {
            Verdict::Delivery
        } else {
            Verdict::ZtunnelOut
        };
    }
    if facts.destination_is_excluded() {
        return Verdict::ExcludedOutbound;
    }
    // Both verdicts keep the socket in the namespace, so an address table that is behind makes no hole.
    if dst.is_loopback() || facts.destination_is_own() {
        return Verdict::Home;
    }
    // With a device, IPv4 takes the failed look-up of a refusing rule for "on link" and lets it out: such
    // sockets turn round and find no listener instead.
    if facts.refusing() && !facts.bound_to_device() {
        return Verdict::Refused;
    }
    Verdict::Captured
}

/// What the decision about a SYN may ask.
pub trait SteerFacts {
    /// The source is one of the pod's own addresses.
    fn source_is_own(&self) -> bool;
    /// The destination is one of the pod's own addresses.
    fn destination_is_own(&self) -> bool;
    /// It is reported on the loopback device.
    fn on_loopback_device(&self) -> bool;
    /// A socket bound to this device said at `connect()` that it would come.
    fn announced(&self) -> bool;
    /// It came in by one of the pod's virtual interfaces.
    fn on_virtual_interface(&self) -> bool;
    /// DNS capture is on.
    fn dns_is_on(&self) -> bool;
    /// It is for this destination, too.
    fn captures_dns(&self) -> bool;
    /// The node vouched for this connection.
    fn vouched(&self) -> bool;
    /// The inbound port is excluded.
    fn port_is_excluded(&self) -> bool;
    /// Inbound capture is off.
    fn bypasses_inbound(&self) -> bool;
}

/// The table of `sk_lookup`: by addresses first, interface second. Ports in host byte order.
#[inline(always)]
pub fn steer(dst: &Addr, dst_port: u16, facts: &impl SteerFacts) -> Verdict {
    if dst.is_loopback() {
        return Verdict::PassLoopback;
    }
    if !facts.destination_is_own() {
        if facts.on_virtual_interface() {
            return Verdict::Virtual;
        }
        // What the application sends has been turned round: it comes by `lo`, or, from a socket bound to a
        // device, by that device as announced at connect(). Everything else here is for an address that the
        // tracker has not seen yet: from outside, or from ztunnel. Passing it would skip ztunnel's policy,
        // steering it would go round in circles: wait.
        let turned = facts.on_loopback_device() || facts.source_is_own() && facts.announced();
        if !turned {
            return Verdict::UnknownDestination;
        }
        if dst_port != port::DOMAIN || !facts.dns_is_on() || !facts.source_is_own() {
            return Verdict::Outbound;
        }
        return match (facts.captures_dns(), dst.is_v4()) {
            (true, true) => Verdict::DnsTcp4,
            (true, false) => Verdict::DnsTcp6,
            (false, true) => Verdict::DnsLeftTcp4,
            (false, false) => Verdict::DnsLeftTcp6,
        };
    }
    if facts.on_loopback_device() || facts.source_is_own() {
        return Verdict::PassHome;
    }
    if dst_port == port::HBONE {
        return Verdict::Hbone;
    }
    if facts.bypasses_inbound() {
        return Verdict::PassBypass;
    }
    if facts.port_is_excluded() {
        return Verdict::PassExcluded;
    }
    if facts.vouched() {
        return Verdict::PassVouched;
    }
    Verdict::Inbound
}
