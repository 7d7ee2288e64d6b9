//! Routes and policy rules of a namespace, changed over netlink, and a picture of them all to compare before with after.

use std::net::IpAddr;

use anyhow::{Context, Result};
use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::rule::{RuleAction as NlAction, RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::links::family_of;
use crate::{Family, Ns};

/// What a rule does with what it matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RuleAction {
    /// Look up this table.
    Table(u32),
    /// Fail with "unreachable".
    Unreachable,
    /// Drop in silence.
    Blackhole,
}

/// A policy rule. Without `pref` the kernel picks one, just as for `ip rule add`.
#[derive(Debug, Clone)]
pub struct Rule {
    /// The family it is for.
    pub family: Family,
    /// The mark it matches, with its mask.
    pub fwmark: Option<(u32, u32)>,
    /// The interface a packet came in by.
    pub iif: Option<String>,
    /// Source prefix.
    pub from: Option<IpNet>,
    /// Destination prefix.
    pub to: Option<IpNet>,
    /// Its place among the rules.
    pub pref: Option<u32>,
    /// What to do.
    pub action: RuleAction,
}

impl Rule {
    /// `ip rule add fwmark MARK table TABLE`, without a pref.
    pub fn fwmark(family: Family, mark: u32, table: u32) -> Self {
        let action = RuleAction::Table(table);
        Self {
            family,
            fwmark: Some((mark, u32::MAX)),
            iif: None,
            from: None,
            to: None,
            pref: None,
            action,
        }
    }
}

/// A unicast or local route.
#[derive(Debug, Clone)]
pub struct Route {
    /// The destination; a prefix of length 0 for the default route.
    pub to: IpNet,
    /// Next hop.
    pub via: Option<IpAddr>,
    /// Interface.
    pub dev: Option<String>,
    /// Table; 254 is the main one.
    pub table: u32,
    /// Whether the next hop is to be believed to be on the link.
    pub onlink: bool,
    /// Whether what it matches is delivered locally.
    pub local: bool,
    /// Metric.
    pub metric: Option<u32>,
}

impl Route {
    /// A route through an interface.
    pub fn dev(to: IpNet, dev: &str) -> Self {
        Self {
            to,
            via: None,
            dev: Some(dev.to_owned()),
            table: 254,
            onlink: false,
            local: false,
            metric: None,
        }
    }

    /// A route through a next hop.
    pub fn via(to: IpNet, via: IpAddr) -> Self {
        Self {
            to,
            via: Some(via),
            dev: None,
            table: 254,
            onlink: false,
            local: false,
            metric: None,
        }
    }

    /// The default route through a next hop.
    pub fn default_via(via: IpAddr) -> Self {
        Self::via(default_net(Family::of(via)), via)
    }
}

/// `0.0.0.0/0` or `::/0`.
pub(crate) fn default_net(family: Family) -> IpNet {
    match family {
        Family::V4 => IpNet::V4(ipnet::Ipv4Net::default()),
        Family::V6 => IpNet::V6(ipnet::Ipv6Net::default()),
    }
}

impl Ns {
    /// Adds a route.
    pub fn add_route(&self, route: &Route) -> Result<()> {
        let request = RouteNetlinkMessage::NewRoute(self.route_message(route)?);
        self.netlink()
            .request(request, NLM_F_CREATE | NLM_F_EXCL)
            .with_context(|| format!("adding {route:?} in {}", self.name()))
    }

    /// Removes a route.
    pub fn del_route(&self, route: &Route) -> Result<()> {
        let mut message = self.route_message(route)?;
        // Whoever made it.
        message.header.protocol = RouteProtocol::Unspec;
        let request = RouteNetlinkMessage::DelRoute(message);
        self.netlink()
            .request(request, 0)
            .with_context(|| format!("removing {route:?} in {}", self.name()))
    }

    fn route_message(&self, route: &Route) -> Result<RouteMessage> {
        let mut message = RouteMessage::default();
        message.header.address_family = family_of(route.to.addr());
        message.header.destination_prefix_length = route.to.prefix_len();
        message.header.protocol = RouteProtocol::Boot;
        message.header.kind = if route.local {
            RouteType::Local
        } else {
            RouteType::Unicast
        };
        message.header.scope = match (route.local, route.via) {
            (true, _) => RouteScope::Host,
            (false, Some(_)) => RouteScope::Universe,
            (false, None) => RouteScope::Link,
        };
        message.attributes.push(RouteAttribute::Table(route.table));
        if route.to.prefix_len() > 0 {
            message
                .attributes
                .push(RouteAttribute::Destination(RouteAddress::from(
                    route.to.network(),
                )));
        }
        if let Some(via) = route.via {
            message
                .attributes
                .push(RouteAttribute::Gateway(RouteAddress::from(via)));
        }
        if let Some(dev) = &route.dev {
            message
                .attributes
                .push(RouteAttribute::Oif(self.ifindex(dev)?));
        }
        if let Some(metric) = route.metric {
            message.attributes.push(RouteAttribute::Priority(metric));
        }
        if route.onlink {
            message.header.flags |= RouteFlags::Onlink;
        }
        Ok(message)
    }

    /// Adds a policy rule.
    pub fn add_rule(&self, rule: &Rule) -> Result<()> {
        let request = RouteNetlinkMessage::NewRule(rule_message(rule));
        self.netlink()
            .request(request, NLM_F_CREATE | NLM_F_EXCL)
            .with_context(|| format!("adding {rule:?} in {}", self.name()))
    }

    /// Removes a policy rule.
    pub fn del_rule(&self, rule: &Rule) -> Result<()> {
        let request = RouteNetlinkMessage::DelRule(rule_message(rule));
        self.netlink()
            .request(request, 0)
            .with_context(|| format!("removing {rule:?} in {}", self.name()))
    }

    /// All policy rules, in the kernel's order, one line each.
    pub fn rules(&self, family: Family) -> Result<Vec<String>> {
        let mut question = RuleMessage::default();
        question.header.family = nl_family(family);
        self.netlink()
            .dump(
                RouteNetlinkMessage::GetRule(question),
                |answer| match answer {
                    RouteNetlinkMessage::NewRule(message) => Some(format!("{message:?}")),
                    _ => None,
                },
            )
            .with_context(|| format!("listing {family} rules of {}", self.name()))
    }

    /// All routes of all tables, sorted, one line each, without what changes by itself (ages, counters).
    pub fn routes(&self, family: Family) -> Result<Vec<String>> {
        let mut question = RouteMessage::default();
        question.header.address_family = nl_family(family);
        let mut routes = self
            .netlink()
            .dump(RouteNetlinkMessage::GetRoute(question), |answer| {
                let RouteNetlinkMessage::NewRoute(mut message) = answer else {
                    return None;
                };
                message
                    .attributes
                    .retain(|attribute| !matches!(attribute, RouteAttribute::CacheInfo(_)));
                Some(format!("{message:?}"))
            })
            .with_context(|| format!("listing {family} routes of {}", self.name()))?;
        routes.sort();
        Ok(routes)
    }

    /// Addresses, rules and routes of both families and the given sysctls: equal before and after means that nothing of
    /// anybody was left.
    pub fn picture(&self, sysctls: &[&str]) -> Result<Vec<String>> {
        let mut lines: Vec<String> = self
            .addrs()?
            .iter()
            .map(|(index, addr)| format!("addr {index} {addr}"))
            .collect();
        for family in Family::BOTH {
            lines.extend(
                self.rules(family)?
                    .into_iter()
                    .map(|rule| format!("{family} rule {rule}")),
            );
            lines.extend(
                self.routes(family)?
                    .into_iter()
                    .map(|route| format!("{family} route {route}")),
            );
        }
        for key in sysctls {
            lines.push(format!("sysctl {key} = {}", self.sysctl(key)?));
        }
        Ok(lines)
    }
}

fn nl_family(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}

fn rule_message(rule: &Rule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = nl_family(rule.family);
    message.header.action = match rule.action {
        RuleAction::Table(_) => NlAction::ToTable,
        RuleAction::Unreachable => NlAction::Unreachable,
        RuleAction::Blackhole => NlAction::Blackhole,
    };
    if let RuleAction::Table(table) = rule.action {
        message.attributes.push(RuleAttribute::Table(table));
    }
    if let Some((mark, mask)) = rule.fwmark {
        message.attributes.push(RuleAttribute::FwMark(mark));
        message.attributes.push(RuleAttribute::FwMask(mask));
    }
    if let Some(iif) = &rule.iif {
        message.attributes.push(RuleAttribute::Iifname(iif.clone()));
    }
    if let Some(from) = rule.from {
        message.header.src_len = from.prefix_len();
        message
            .attributes
            .push(RuleAttribute::Source(from.network()));
    }
    if let Some(to) = rule.to {
        message.header.dst_len = to.prefix_len();
        message
            .attributes
            .push(RuleAttribute::Destination(to.network()));
    }
    if let Some(pref) = rule.pref {
        message.attributes.push(RuleAttribute::Priority(pref));
    }
    message
}
