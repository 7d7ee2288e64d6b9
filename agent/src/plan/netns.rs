//! What a pod's network namespace must hold so that marked sockets turn round, and the steps to get there.
//!
//! Order is the point: our rules stand before the local table, the local table stays at pref 0 (a rule added
//! without a pref must land behind it), and at no step is local delivery broken or a marked packet let out.

mod show;

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use culvert_ebpf::abi::mark;

/// Table with the turn-round routes.
pub const TURN_TABLE: u32 = 15001;
/// Table that swallows resets for held connections (IPv6).
pub const HOLD_TABLE: u32 = 15002;
/// The kernel's local table.
pub const LOCAL_TABLE: u32 = 255;
/// Marks rules and routes as ours (`proto` in `ip rule`); unassigned in rt_protos.
pub const PROTOCOL: u8 = 201;
/// `proto kernel`.
pub const PROTOCOL_KERNEL: u8 = 2;
/// A pod may be allowed to give itself any number of addresses; the maps that hold them are the whole node's.
pub const MAX_OWN: usize = 256;
/// Where the local table stands while rules change.
const TEMPORARY_PREF: u32 = 2;
/// Metric of the turn-round route without a source, for the moment in which the preferred one is gone.
const FALLBACK_METRIC: u32 = 50;
/// Metrics of the routes for what names its interface: this plus the interface's index.
const DEVICE_METRIC: u32 = 1000;
const IPPROTO_TCP: u8 = 6;

/// Address family.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// What a rule does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Look in this table, go on if nothing is there.
    Table(u32),
    /// Fail with EHOSTUNREACH.
    Unreachable,
}

/// A policy routing rule, as far as it concerns us.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rule {
    /// Family.
    pub family: Family,
    /// Preference.
    pub pref: u32,
    /// Value and mask.
    pub mark: Option<(u32, u32)>,
    /// Incoming interface.
    pub iif: Option<String>,
    /// Transport protocol.
    pub ip_proto: Option<u8>,
    /// What to do.
    pub action: Action,
    /// Who made it.
    pub protocol: u8,
    /// It has selectors that are not shown here, so it is somebody else's.
    pub foreign: bool,
}

/// What a route does.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum RouteKind {
    /// Deliver locally.
    Local,
    /// Drop in silence.
    Blackhole,
}

/// A route of ours.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Route {
    /// Family.
    pub family: Family,
    /// [`TURN_TABLE`], [`HOLD_TABLE`] or [`LOCAL_TABLE`].
    pub table: u32,
    /// Kind.
    pub kind: RouteKind,
    /// Destination; none = default.
    pub destination: Option<IpAddr>,
    /// Device.
    pub oif: Option<u32>,
    /// Metric.
    pub metric: u32,
    /// Preferred source.
    pub source: Option<IpAddr>,
}

/// An interface.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Link {
    /// Index.
    pub index: u32,
    /// Name.
    pub name: String,
    /// Administratively up.
    pub up: bool,
}

/// Everything read from the namespace.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Observed {
    /// Interfaces.
    pub links: Vec<Link>,
    /// Addresses with their interface, loopback range left out.
    pub addresses: Vec<(u32, IpAddr)>,
    /// Rules of both families, in the kernel's order.
    pub rules: Vec<Rule>,
    /// Routes of ours.
    pub routes: Vec<Route>,
    /// Interfaces with a default route, in any table but ours.
    pub default_routes: Vec<u32>,
    /// IPv6 is there and not switched off on `lo`.
    pub ipv6: bool,
}

impl Observed {
    /// The one interface besides `lo` that is up, if there is just one.
    #[must_use]
    pub fn single_interface(&self) -> Option<u32> {
        let mut up = self
            .links
            .iter()
            .filter(|l| l.up && l.index != culvert_ebpf::abi::LOOPBACK_IFINDEX);
        match (up.next(), up.next()) {
            (Some(only), None) => Some(only.index),
            _ => None,
        }
    }

    /// As if the namespace had no IPv6: for a pod whose IPv6 is left alone. What of ours is there stays for the connections
    /// that need it.
    #[must_use]
    pub fn ipv4_alone(mut self) -> Self {
        self.ipv6 = false;
        self
    }

    /// The pod's own addresses: the oldest of each interface, at most [`MAX_OWN`] together.
    #[must_use]
    pub fn own(&self) -> Vec<IpAddr> {
        let mut seen = BTreeSet::new();
        let mut own: Vec<IpAddr> = self.addresses.iter().map(|(_, a)| *a).collect();
        own.retain(|address| seen.insert(*address));
        own.truncate(MAX_OWN);
        own.sort_unstable();
        own
    }

    fn families(&self) -> Vec<Family> {
        if self.ipv6 {
            vec![Family::V4, Family::V6]
        } else {
            vec![Family::V4]
        }
    }
}

/// One step.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Step {
    /// Add a rule behind those of its pref.
    AddRule(Rule),
    /// Delete a rule.
    DelRule(Rule),
    /// Add a route or replace the one of the same destination and metric.
    AddRoute(Route),
    /// Delete a route.
    DelRoute(Route),
}

fn ours(family: Family, action: Action) -> Rule {
    Rule {
        family,
        pref: 0,
        mark: None,
        iif: None,
        ip_proto: None,
        action,
        protocol: PROTOCOL,
        foreign: false,
    }
}

fn local(family: Family, pref: u32) -> Rule {
    Rule {
        pref,
        protocol: PROTOCOL_KERNEL,
        ..ours(family, Action::Table(LOCAL_TABLE))
    }
}

fn is_local(rule: &Rule, family: Family, pref: u32) -> bool {
    let plain =
        !rule.foreign && rule.mark.is_none() && rule.iif.is_none() && rule.ip_proto.is_none();
    plain && rule.family == family && rule.pref == pref && rule.action == Action::Table(LOCAL_TABLE)
}

/// The rules of one family at pref 0, in order: ours, and the local table among them.
#[must_use]
pub fn desired_rules(family: Family, virtual_interfaces: &[String]) -> Vec<Rule> {
    let marked = |value, mask, action| Rule {
        mark: Some((value, mask)),
        ..ours(family, action)
    };
    let mut rules = Vec::new();
    if family == Family::V6 {
        rules.push(marked(mark::HELD, mark::MASK, Action::Table(HOLD_TABLE)));
    }
    rules.push(marked(
        mark::OUT,
        mark::TURN_MASK,
        Action::Table(TURN_TABLE),
    ));
    rules.push(marked(mark::FAMILY, mark::FAMILY_MASK, Action::Unreachable));
    rules.extend(virtual_interfaces.iter().map(|name| Rule {
        iif: Some(name.clone()),
        ip_proto: Some(IPPROTO_TCP),
        ..ours(family, Action::Table(TURN_TABLE))
    }));
    rules.push(local(family, 0));
    rules.push(marked(mark::ANSWER, mark::MASK, Action::Table(TURN_TABLE)));
    rules
}

/// Our routes, given what the namespace has.
#[must_use]
pub fn desired_routes(observed: &Observed) -> Vec<Route> {
    const LO: u32 = culvert_ebpf::abi::LOOPBACK_IFINDEX;
    let mut routes = Vec::new();
    let turn = |family, oif, metric, source| Route {
        family,
        table: TURN_TABLE,
        kind: RouteKind::Local,
        destination: None,
        oif: Some(oif),
        metric,
        source,
    };
    let v4_of = |index: Option<u32>| {
        let mine = |(on, addr): &&(u32, IpAddr)| addr.is_ipv4() && index.is_none_or(|i| i == *on);
        observed.addresses.iter().find(mine).map(|(_, addr)| *addr)
    };
    for family in observed.families() {
        if observed.links.iter().any(|l| l.index == LO && l.up) {
            // A socket that connects again carries its mark from the first time, and this route then chooses
            // its source: without one IPv4 would take the destination itself.
            let source = v4_of(None).filter(|_| family == Family::V4);
            if source.is_some() {
                routes.push(turn(family, LO, FALLBACK_METRIC - 1, source));
            }
            routes.push(turn(family, LO, FALLBACK_METRIC, None));
        }
        for link in observed.links.iter().filter(|l| l.up && l.index != LO) {
            let source = v4_of(Some(link.index)).filter(|_| family == Family::V4);
            let metric = DEVICE_METRIC + link.index;
            routes.push(turn(family, link.index, metric, source));
            routes.push(to_ztunnel(family, link.index, metric));
        }
    }
    if observed.ipv6 {
        routes.extend(
            observed
                .own()
                .into_iter()
                .filter(IpAddr::is_ipv6)
                .map(|own| Route {
                    family: Family::V6,
                    table: HOLD_TABLE,
                    kind: RouteKind::Blackhole,
                    destination: Some(own),
                    oif: None,
                    metric: 1024,
                    source: None,
                }),
        );
    }
    routes
}

/// A lookup may name the interface it leaves by, in the message or by a socket option, and no program sees that. Once its
/// destination is ztunnel's address on loopback it would leave by that interface all the same, in plaintext and to nobody.
fn to_ztunnel(family: Family, interface: u32, metric: u32) -> Route {
    Route {
        family,
        table: LOCAL_TABLE,
        kind: RouteKind::Local,
        destination: Some(match family {
            Family::V4 => Ipv4Addr::LOCALHOST.into(),
            Family::V6 => Ipv6Addr::LOCALHOST.into(),
        }),
        oif: Some(interface),
        metric,
        source: None,
    }
}

/// Steps that make the namespace whole. Empty when it is.
#[must_use]
pub fn enrol(observed: &Observed, virtual_interfaces: &[String]) -> Vec<Step> {
    let mut steps = Vec::new();
    // Routes first: a mark rule whose table is empty would refuse what it should turn round.
    let desired = desired_routes(observed);
    let families = observed.families();
    steps.extend(
        observed
            .routes
            .iter()
            .filter(|r| families.contains(&r.family) && !desired.contains(r))
            .cloned()
            .map(Step::DelRoute),
    );
    steps.extend(
        desired
            .into_iter()
            .filter(|r| !observed.routes.contains(r))
            .map(Step::AddRoute),
    );
    for family in families {
        steps.extend(rule_steps(
            observed,
            family,
            &desired_rules(family, virtual_interfaces),
        ));
    }
    steps
}

fn rule_steps(observed: &Observed, family: Family, wanted: &[Rule]) -> Vec<Step> {
    let mine = |r: &&Rule| r.family == family && r.protocol == PROTOCOL && !r.foreign;
    let extra = observed
        .rules
        .iter()
        .filter(mine)
        .filter(|r| !wanted.contains(r));
    let mut steps: Vec<Step> = extra.cloned().map(Step::DelRule).collect();

    let is_local_rule = |r: &Rule| is_local(r, family, 0);
    let same = |a: &Rule, b: &Rule| a == b || is_local_rule(a) && is_local_rule(b);
    let present: Vec<&Rule> = observed
        .rules
        .iter()
        .filter(|r| wanted.iter().any(|w| same(w, r)))
        .collect();
    let in_place = wanted
        .iter()
        .zip(&present)
        .take_while(|(want, have)| same(want, have))
        .count();
    let tail = &wanted[in_place..];

    let has_temporary = observed
        .rules
        .iter()
        .any(|r| is_local(r, family, TEMPORARY_PREF));
    let moves_local = tail.iter().any(is_local_rule);
    if moves_local && !has_temporary {
        steps.push(Step::AddRule(local(family, TEMPORARY_PREF)));
    }
    // From the first that is missing or out of order, each goes to the end in turn. The refusing rule is
    // behind the turning ones, so between two steps a marked packet is refused, never let out.
    for rule in tail {
        if present.iter().any(|have| same(rule, have)) {
            steps.push(Step::DelRule(rule.clone()));
        }
        steps.push(Step::AddRule(rule.clone()));
    }
    if moves_local || has_temporary {
        steps.push(Step::DelRule(local(family, TEMPORARY_PREF)));
    }
    steps
}

/// Steps that take everything of ours away.
#[must_use]
pub fn unenrol(observed: &Observed) -> Vec<Step> {
    let mut steps = Vec::new();
    for family in [Family::V4, Family::V6] {
        let has_local = observed.rules.iter().any(|r| is_local(r, family, 0));
        let temporary = observed
            .rules
            .iter()
            .any(|r| is_local(r, family, TEMPORARY_PREF));
        if !has_local && temporary {
            steps.push(Step::AddRule(local(family, 0)));
        }
        // The rule that turns goes before the one that refuses.
        let mine = observed
            .rules
            .iter()
            .filter(|r| r.family == family && r.protocol == PROTOCOL && !r.foreign);
        steps.extend(mine.cloned().map(Step::DelRule));
        if temporary {
            steps.push(Step::DelRule(local(family, TEMPORARY_PREF)));
        }
    }
    steps.extend(observed.routes.iter().cloned().map(Step::DelRoute));
    steps
}

/// Is this address one that may be a pod's own? The loopback range is everybody's.
#[must_use]
pub fn counts_as_own(addr: IpAddr) -> bool {
    match addr {
        IpAddr::V4(v4) => !v4.is_loopback() && v4 != Ipv4Addr::UNSPECIFIED,
        IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unspecified(),
    }
}

#[cfg(test)]
#[path = "netns_tests.rs"]
mod tests;
