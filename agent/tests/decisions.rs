//! The two decision functions against a plain model of their tables, and the promises that hang on them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use culvert_ebpf::{
    abi::{INITIAL_ORDER, LISTENER_SLOTS, newest_first, role},
    addr::Addr,
    decide::{self, ConnectFacts, SteerFacts, Verdict},
};
use proptest::prelude::*;

/// Facts that cost nothing to ask: a plain record of answers.
#[derive(Clone, Copy, Debug)]
struct Answers {
    ztunnel: bool,
    source_own: bool,
    destination_own: bool,
    excluded: bool,
    refusing: bool,
    bound: bool,
    on_lo: bool,
    on_virtual: bool,
    announced: bool,
    dns: bool,
    resolver: bool,
    vouched: bool,
    bypass: bool,
}

impl ConnectFacts for Answers {
    fn is_ztunnel(&self) -> bool {
        self.ztunnel
    }
    fn destination_is_own(&self) -> bool {
        self.destination_own
    }
    fn destination_is_excluded(&self) -> bool {
        self.excluded
    }
    fn refusing(&self) -> bool {
        self.refusing
    }
    fn bound_to_device(&self) -> bool {
        self.bound
    }
}

impl SteerFacts for Answers {
    fn source_is_own(&self) -> bool {
        self.source_own
    }
    fn destination_is_own(&self) -> bool {
        self.destination_own
    }
    fn on_loopback_device(&self) -> bool {
        self.on_lo
    }
    fn on_virtual_interface(&self) -> bool {
        self.on_virtual
    }
    fn announced(&self) -> bool {
        self.announced
    }
    fn dns_is_on(&self) -> bool {
        self.dns
    }
    fn captures_dns(&self) -> bool {
        assert!(self.dns, "asked where nothing is captured");
        self.resolver
    }
    fn vouched(&self) -> bool {
        self.vouched
    }
    fn port_is_excluded(&self) -> bool {
        self.excluded
    }
    fn bypasses_inbound(&self) -> bool {
        self.bypass
    }
}

/// A row of a table: when it applies, what it says. The first that applies wins.
type Row<T> = (fn(&T) -> bool, Verdict);

struct Connect {
    loopback: bool,
    f: Answers,
}

const CONNECT: [Row<Connect>; 7] = [
    (
        |c| c.f.ztunnel && (c.loopback || c.f.destination_own),
        Verdict::Delivery,
    ),
    (|c| c.f.ztunnel, Verdict::ZtunnelOut),
    (|c| c.f.excluded, Verdict::ExcludedOutbound),
    (|c| c.loopback || c.f.destination_own, Verdict::Home),
    (|c| c.f.refusing && c.f.bound, Verdict::Captured),
    (|c| c.f.refusing, Verdict::Refused),
    (|_| true, Verdict::Captured),
];

struct Steer {
    loopback: bool,
    v4: bool,
    port: u16,
    f: Answers,
}

impl Steer {
    /// The application's own SYN: by `lo`, or by the device its socket is bound to.
    fn turned(&self) -> bool {
        self.f.on_lo || self.f.source_own && self.f.announced
    }

    /// One that asks a resolver, in a pod whose lookups are captured.
    fn asks(&self) -> bool {
        let own_side_only = self.f.source_own && !self.f.destination_own;
        self.turned() && own_side_only && self.port == 53 && self.f.dns
    }
}

const STEER: [Row<Steer>; 14] = [
    (|s| s.loopback, Verdict::PassLoopback),
    (|s| s.f.on_virtual && !s.f.destination_own, Verdict::Virtual),
    (|s| s.asks() && s.f.resolver && s.v4, Verdict::DnsTcp4),
    (|s| s.asks() && s.f.resolver, Verdict::DnsTcp6),
    (|s| s.asks() && s.v4, Verdict::DnsLeftTcp4),
    (|s| s.asks(), Verdict::DnsLeftTcp6),
    (|s| s.turned() && !s.f.destination_own, Verdict::Outbound),
    (|s| !s.f.destination_own, Verdict::UnknownDestination),
    (|s| s.f.on_lo || s.f.source_own, Verdict::PassHome),
    (|s| s.port == 15008, Verdict::Hbone),
    (|s| s.f.bypass, Verdict::PassBypass),
    (|s| s.f.excluded, Verdict::PassExcluded),
    (|s| s.f.vouched, Verdict::PassVouched),
    (|_| true, Verdict::Inbound),
];

fn model<T>(table: &[Row<T>], case: &T) -> Option<Verdict> {
    table
        .iter()
        .find(|(applies, _)| applies(case))
        .map(|(_, verdict)| *verdict)
}

prop_compose! {
    fn answers()(bits in any::<[bool; 13]>()) -> Answers {
        let [ztunnel, source_own, destination_own, excluded, refusing, bound, on_lo, on_virtual, announced, dns, resolver, vouched, bypass] = bits;
        Answers {
            ztunnel, source_own, destination_own, excluded, refusing, bound, on_lo, on_virtual, announced, dns, resolver, vouched, bypass,
        }
    }
}

fn address() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        any::<u32>().prop_map(|n| IpAddr::V4(Ipv4Addr::from(n))),
        (0_u32..1 << 24).prop_map(|n| IpAddr::V4(Ipv4Addr::from(127 << 24 | n))),
        any::<u128>().prop_map(|n| IpAddr::V6(Ipv6Addr::from(n))),
        Just(IpAddr::V6(Ipv6Addr::LOCALHOST)),
        any::<u32>().prop_map(|n| IpAddr::V6(Ipv4Addr::from(n).to_ipv6_mapped())),
    ]
}

fn port() -> impl Strategy<Value = u16> {
    prop_oneof![
        any::<u16>(),
        Just(53),
        Just(15001),
        Just(15006),
        Just(15008),
        Just(15053)
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    #[test]
    fn connect_says_what_its_table_says(dst in address(), f in answers()) {
        let loopback = dst.to_canonical().is_loopback();
        prop_assert_eq!(Some(decide::connect(&Addr::from(dst), &f)), model(&CONNECT, &Connect { loopback, f }));
    }

    #[test]
    fn steer_says_what_its_table_says(dst in address(), port in port(), f in answers()) {
        let loopback = dst.to_canonical().is_loopback();
        let v4 = dst.to_canonical().is_ipv4();
        prop_assert_eq!(Some(decide::steer(&Addr::from(dst), port, &f)), model(&STEER, &Steer { loopback, v4, port, f }));
    }

    #[test]
    fn nothing_of_the_pods_leaves_unmarked_unless_excluded(dst in address(), f in answers()) {
        let f = Answers { ztunnel: false, excluded: false, ..f };
        let verdict = decide::connect(&Addr::from(dst), &f);
        prop_assert!(matches!(verdict, Verdict::Captured | Verdict::Home | Verdict::Refused), "{:?}", verdict);
    }

    #[test]
    fn outside_traffic_reaches_the_app_past_ztunnel_only_by_name(dst in address(), port in port(), f in answers()) {
        let f = Answers { source_own: false, on_lo: false, bypass: false, excluded: false, vouched: false, ..f };
        let verdict = decide::steer(&Addr::from(dst), port, &f);
        // The kernel drops loopback destinations that come in by another device.
        let to_loopback = dst.to_canonical().is_loopback() && verdict == Verdict::PassLoopback;
        prop_assert!(
            to_loopback || matches!(verdict, Verdict::Inbound | Verdict::Hbone | Verdict::Virtual | Verdict::UnknownDestination),
            "{:?}", verdict
        );
    }

    #[test]
    fn a_syn_ends_at_a_listener_that_is_there_or_is_dropped(
        dst in address(), port in port(), f in answers(), there in any::<[bool; role::COUNT as usize]>()
    ) {
        let first = decide::steer(&Addr::from(dst), port, &f);
        let mut verdict = first;
        let mut tried = Vec::new();
        while let Some(role) = verdict.listener() && !there[role as usize] {
            tried.push(role);
            verdict = verdict.unheard();
        }
        // As often as the program tries.
        prop_assert!(tried.len() <= 2, "{tried:?}");
        prop_assert_eq!(tried.is_empty(), verdict == first);
        // What was to be ztunnel's is never passed on without it.
        let by_ztunnel = verdict.listener().is_some();
        prop_assert!(first.listener().is_none() || by_ztunnel || verdict.drops(), "{:?} became {:?}", first, verdict);
        // A lookup goes like any other connection where ztunnel answers none.
        let lookup = matches!(first, Verdict::DnsTcp4 | Verdict::DnsTcp6);
        prop_assert!(!lookup || by_ztunnel == (tried.is_empty() || there[role::OUTBOUND as usize]));
    }

    #[test]
    fn an_address_is_one_form_however_it_is_written(ip in address()) {
        let addr = Addr::from(ip);
        prop_assert_eq!(addr, Addr::from(ip.to_canonical()));
        prop_assert_eq!(IpAddr::from(addr), ip.to_canonical());
        prop_assert_eq!(addr.is_v4(), ip.to_canonical().is_ipv4());
        prop_assert_eq!(addr.is_loopback(), ip.to_canonical().is_loopback());
        prop_assert_eq!(Addr::from_octets(addr.octets()), addr);
        if let IpAddr::V4(v4) = ip.to_canonical() {
            prop_assert_eq!(addr, Addr::v4(u32::from_ne_bytes(v4.octets())));
        }
    }

    #[test]
    fn slots_stay_a_permutation_with_the_newest_first(slots in prop::collection::vec(0..LISTENER_SLOTS, 0..20)) {
        let mut order = INITIAL_ORDER;
        let mut plain: Vec<u32> = (0..LISTENER_SLOTS).collect();
        for slot in slots {
            order = newest_first(order, slot);
            plain.retain(|s| *s != slot);
            plain.insert(0, slot);
            let unpacked: Vec<u32> = (0..LISTENER_SLOTS).map(|i| order >> (2 * i) & 3).collect();
            prop_assert_eq!(&unpacked, &plain);
        }
    }
}

#[test]
fn verdicts_are_numbered_in_order_and_fit_the_counters() {
    assert!(Verdict::ALL.len() <= culvert_ebpf::abi::COUNTER_SLOTS);
    for (number, verdict) in Verdict::ALL.into_iter().enumerate() {
        assert_eq!(verdict as usize, number);
    }
    let mut names: Vec<&str> = Verdict::ALL.into_iter().map(Verdict::name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), Verdict::ALL.len());
}
