//! Reading a namespace's links, addresses, rules and our routes, and carrying out a plan's steps there.
//!
//! Translates between [`crate::plan::netns`]'s plain types and rtnetlink messages; decides nothing.

use std::net::IpAddr;

use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressMessage},
    link::{LinkAttribute, LinkFlags, LinkMessage},
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType},
    rule::{RuleAction, RuleAttribute, RuleMessage},
};

use super::{
    error::Result,
    netlink::{Change, Rtnetlink},
    netns::Guard,
    sysctl,
};
use crate::plan::netns::{
    Action, Family, HOLD_TABLE, LOCAL_TABLE, Link, Observed, PROTOCOL, Route, RouteKind, Rule,
    Step, TURN_TABLE, counts_as_own,
};

/// Reads the namespace the guard stands for.
pub(super) fn observe(guard: &Guard<'_>, netlink: &mut Rtnetlink) -> Result<Observed> {
    let ipv6 = sysctl::ipv6_enabled(guard);
    let mut observed = Observed {
        ipv6,
        ..Observed::default()
    };
    for message in netlink.dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))? {
        if let RouteNetlinkMessage::NewLink(link) = message {
            observed.links.push(from_link(&link));
        }
    }
    for message in netlink.dump(RouteNetlinkMessage::GetAddress(AddressMessage::default()))? {
        if let RouteNetlinkMessage::NewAddress(address) = message {
            observed.addresses.extend(from_address(&address));
        }
    }
    let families: &[AddressFamily] = if sysctl::ipv6_present() {
        &[AddressFamily::Inet, AddressFamily::Inet6]
    } else {
        &[AddressFamily::Inet]
    };
    for family in families {
        let mut request = RuleMessage::default();
        request.header.family = *family;
        for message in netlink.dump(RouteNetlinkMessage::GetRule(request))? {
            if let RouteNetlinkMessage::NewRule(rule) = message {
                observed.rules.extend(from_rule(&rule));
            }
        }
        let mut request = RouteMessage::default();
        request.header.address_family = *family;
        for message in netlink.dump(RouteNetlinkMessage::GetRoute(request))? {
            if let RouteNetlinkMessage::NewRoute(route) = message {
                observed.routes.extend(from_route(&route));
                observed.default_routes.extend(default_interface(&route));
            }
        }
    }
    observed.default_routes.sort_unstable();
    observed.default_routes.dedup();
    Ok(observed)
}

/// Carries out a plan.
pub(super) fn apply(_guard: &Guard<'_>, netlink: &mut Rtnetlink, steps: &[Step]) -> Result<()> {
    netlink.apply(&steps.iter().map(change).collect::<Vec<_>>())
}

fn change(step: &Step) -> Change {
    match step {
        Step::AddRule(rule) => Change::Add(RouteNetlinkMessage::NewRule(to_rule(rule))),
        Step::DelRule(rule) => Change::Delete(RouteNetlinkMessage::DelRule(to_rule(rule))),
        Step::AddRoute(route) => Change::Replace(RouteNetlinkMessage::NewRoute(to_route(route))),
        Step::DelRoute(route) => Change::Delete(RouteNetlinkMessage::DelRoute(to_route(route))),
    }
}

fn from_link(message: &LinkMessage) -> Link {
    let name = message.attributes.iter().find_map(|a| match a {
        LinkAttribute::IfName(name) => Some(name.clone()),
        _ => None,
    });
    Link {
        index: message.header.index,
        name: name.unwrap_or_default(),
        up: message.header.flags.contains(LinkFlags::Up),
    }
}

pub(super) fn from_address(message: &AddressMessage) -> Option<(u32, IpAddr)> {
    let mut local = None;
    let mut address = None;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => address = Some(*ip),
            _ => {}
        }
    }
    // On point-to-point links "address" is the peer's.
    let own = local.or(address)?;
    counts_as_own(own).then_some((message.header.index, own))
}

fn family_of(family: AddressFamily) -> Option<Family> {
    match family {
        AddressFamily::Inet => Some(Family::V4),
        AddressFamily::Inet6 => Some(Family::V6),
        _ => None,
    }
}

fn to_family(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}

fn from_rule(message: &RuleMessage) -> Option<Rule> {
    let mut rule = Rule {
        family: family_of(message.header.family)?,
        pref: 0,
        mark: None,
        iif: None,
        ip_proto: None,
        action: Action::Table(u32::from(message.header.table)),
        protocol: 0,
        foreign: message.header.src_len != 0
            || message.header.dst_len != 0
            || message.header.tos != 0,
    };
    let mut mark = None;
    let mut mask = u32::MAX;
    let mut table = u32::from(message.header.table);
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(pref) => rule.pref = *pref,
            RuleAttribute::FwMark(value) => mark = Some(*value),
            RuleAttribute::FwMask(value) => mask = *value,
            RuleAttribute::Iifname(name) => rule.iif = Some(name.clone()),
            RuleAttribute::IpProtocol(proto) => {
                rule.ip_proto = Some(i32::from(*proto).try_into().ok()?)
            }
            RuleAttribute::Table(value) => table = *value,
            RuleAttribute::Protocol(value) => rule.protocol = u8::from(*value),
            RuleAttribute::SuppressPrefixLen(u32::MAX) => {}
            _ => rule.foreign = true,
        }
    }
    rule.mark = mark.map(|value| (value, mask));
    rule.action = match message.header.action {
        RuleAction::ToTable => Action::Table(table),
        RuleAction::Unreachable => Action::Unreachable,
        _ => {
            rule.foreign = true;
            Action::Unreachable
        }
    };
    Some(rule)
}

fn to_rule(rule: &Rule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = to_family(rule.family);
    message.attributes = vec![
        RuleAttribute::Priority(rule.pref),
        RuleAttribute::Protocol(RouteProtocol::from(rule.protocol)),
    ];
    match rule.action {
        Action::Table(table) => {
            message.header.action = RuleAction::ToTable;
            message.header.table = u8::try_from(table).unwrap_or(0);
            message.attributes.push(RuleAttribute::Table(table));
        }
        Action::Unreachable => message.header.action = RuleAction::Unreachable,
    }
    if let Some((value, mask)) = rule.mark {
        message
            .attributes
            .extend([RuleAttribute::FwMark(value), RuleAttribute::FwMask(mask)]);
    }
    if let Some(name) = &rule.iif {
        message
            .attributes
            .push(RuleAttribute::Iifname(name.clone()));
    }
    if let Some(proto) = rule.ip_proto {
        message
            .attributes
            .push(RuleAttribute::IpProtocol(i32::from(proto).into()));
    }
    message
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some(IpAddr::V4(*v4)),
        RouteAddress::Inet6(v6) => Some(IpAddr::V6(*v6)),
        _ => None,
    }
}

fn route_address(ip: IpAddr) -> RouteAddress {
    match ip {
        IpAddr::V4(v4) => RouteAddress::Inet(v4),
        IpAddr::V6(v6) => RouteAddress::Inet6(v6),
    }
}

fn from_route(message: &RouteMessage) -> Option<Route> {
    let mut route = Route {
        family: family_of(message.header.address_family)?,
        table: u32::from(message.header.table),
        kind: match message.header.kind {
            RouteType::Local => RouteKind::Local,
            RouteType::BlackHole => RouteKind::Blackhole,
            _ => return None,
        },
        destination: None,
        oif: None,
        metric: 0,
        source: None,
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(table) => route.table = *table,
            RouteAttribute::Destination(to) => route.destination = ip(to),
            RouteAttribute::Oif(index) if route.kind == RouteKind::Local => {
                route.oif = Some(*index)
            }
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::PrefSource(source) => route.source = ip(source),
            _ => {}
        }
    }
    let ours = matches!(route.table, TURN_TABLE | HOLD_TABLE | LOCAL_TABLE)
        && u8::from(message.header.protocol) == PROTOCOL;
    ours.then_some(route)
}

/// The interface of a default route that leads somewhere.
fn default_interface(message: &RouteMessage) -> Option<u32> {
    if message.header.kind != RouteType::Unicast || message.header.destination_prefix_length != 0 {
        return None;
    }
    message.attributes.iter().find_map(|a| match a {
        RouteAttribute::Oif(index) => Some(*index),
        _ => None,
    })
}

fn to_route(route: &Route) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = to_family(route.family);
    message.header.protocol = RouteProtocol::from(PROTOCOL);
    (message.header.kind, message.header.scope) = match route.kind {
        RouteKind::Local => (RouteType::Local, RouteScope::Host),
        RouteKind::Blackhole => (RouteType::BlackHole, RouteScope::Universe),
    };
    message.attributes = vec![
        RouteAttribute::Table(route.table),
        RouteAttribute::Priority(route.metric),
    ];
    if let Some(to) = route.destination {
        message.header.destination_prefix_length = if to.is_ipv4() { 32 } else { 128 };
        message
            .attributes
            .push(RouteAttribute::Destination(route_address(to)));
    }
    if let Some(index) = route.oif {
        message.attributes.push(RouteAttribute::Oif(index));
    }
    if let Some(source) = route.source {
        message
            .attributes
            .push(RouteAttribute::PrefSource(route_address(source)));
    }
    message
}
