//! Unit tests of the decision on lookups and of what a socket remembers.

use core::net::IpAddr;
use std::{string::ToString as _, vec, vec::Vec};

use super::*;
use crate::abi::{MAX_ANSWERING, MAX_VIRTUAL};

extern crate std;

#[derive(Clone, Copy, Default)]
struct Answers {
    ztunnel: bool,
    serves: bool,
    deaf: bool,
    peer: bool,
    link: bool,
    own: bool,
    excluded: bool,
    off: bool,
    away: bool,
}

impl LookupFacts for Answers {
    fn is_ztunnel(&self) -> bool {
        self.ztunnel
    }
    fn serves(&self) -> bool {
        self.serves
    }
    fn hears_nothing(&self) -> bool {
        self.deaf
    }
    fn has_another_peer(&self) -> bool {
        self.peer
    }
    fn loses_its_link(&self) -> bool {
        self.link
    }
    fn resolver_is_own(&self) -> bool {
        self.own
    }
    fn resolver_is_excluded(&self) -> bool {
        self.excluded
    }
    fn captures(&self) -> bool {
        !self.off
    }
    fn ztunnel_listens(&self) -> bool {
        !self.away
    }
}

fn addr(text: &str) -> Addr {
    text.parse::<IpAddr>().unwrap().into()
}

/// Every combination of facts.
fn all() -> Vec<Answers> {
    (0..=511_u16)
        .map(|n| Answers {
            ztunnel: n & 1 != 0,
            serves: n & 2 != 0,
            own: n & 4 != 0,
            excluded: n & 8 != 0,
            off: n & 16 != 0,
            away: n & 32 != 0,
            deaf: n & 64 != 0,
            peer: n & 128 != 0,
            link: n & 256 != 0,
        })
        .collect()
}

#[test]
fn the_table_in_all_its_cases() {
    for f in all() {
        for (resolver, near) in [
            ("10.96.0.10", false),
            ("fd00::a", false),
            ("fe80::1", false),
            ("127.0.0.1", true),
            ("127.0.0.53", true),
            ("::1", true),
            ("::ffff:127.0.0.1", true),
            ("0.0.0.0", true),
            ("::", true),
            ("224.0.0.251", true),
            ("239.255.255.255", true),
            ("255.255.255.255", true),
            ("ff02::fb", true),
            ("223.255.255.255", false),
            ("240.0.0.1", false),
        ] {
            let left =
                near || f.serves || f.deaf || f.peer || f.link || f.own || f.excluded || f.off;
            let wanted = match (f.ztunnel, left, f.away) {
                (true, _, _) => Lookup::Ztunnel,
                (false, true, _) => Lookup::Left,
                (false, false, true) => Lookup::Away,
                (false, false, false) => Lookup::Captured,
            };
            assert_eq!(lookup(&addr(resolver), &f), wanted, "{resolver}");
        }
    }
}

#[test]
fn each_verdict_has_a_number_of_its_own() {
    let all = [
        Lookup::Captured,
        Lookup::Away,
        Lookup::Left,
        Lookup::Ztunnel,
    ];
    let mut numbers: Vec<u32> = all
        .iter()
        .flat_map(|l| [l.verdict(true) as u32, l.verdict(false) as u32])
        .collect();
    numbers.sort_unstable();
    numbers.dedup();
    assert_eq!(numbers.len(), 8);
}

/// A pod's addresses, as many as it may have.
fn own() -> [Addr; MAX_ANSWERED_AT] {
    let mut own = [Addr::UNSPECIFIED; MAX_ANSWERED_AT];
    for (n, place) in own.iter_mut().enumerate() {
        *place = addr(&std::format!(
            "{}{n}",
            if n % 2 == 0 { "10.0.0." } else { "fd00::" }
        ));
    }
    own
}

#[test]
fn a_slot_is_found_again_from_the_address_that_stands_for_it() {
    let own = own();
    let bound = own.into_iter().map(|ip| (ip.is_v4(), ip));
    let any = [(true, addr("0.0.0.0")), (false, addr("::"))];
    for (v4, bound) in bound.chain(any) {
        assert_eq!(slot_of(&listener(v4)), Some(0));
        assert_eq!(stands_for(&listener(v4)), None);
        let reach = Reach::of(&bound, &own).unwrap();
        for slot in 1..ASKED_SLOTS {
            let stand_in = stand_in(v4, reach, slot);
            assert_eq!(stand_in.is_v4(), v4);
            assert_eq!(stands_for(&stand_in), Some((reach, slot)));
            assert_eq!(slot_of(&stand_in), Some(slot));
            let near = delivered_to(&stand_in, reach, Some(&own)).unwrap();
            if bound.is_unspecified() {
                // An address that is local by itself.
                assert!(near.is_loopback());
            } else {
                assert_eq!(near, bound);
            }
        }
    }
    let text = |bound| {
        let reach = Reach::of(&addr(bound), &own).unwrap();
        IpAddr::from(stand_in(true, reach, 3)).to_string()
    };
    assert_eq!(text("0.0.0.0"), "127.53.0.3");
    assert_eq!(text("10.0.0.0"), "127.53.16.3");
    assert_eq!(text("10.0.0.14"), "127.53.30.3");
    for other in [
        "10.0.0.1",
        "127.0.0.2",
        "127.53.1.1",
        "127.53.32.1",
        "127.54.0.1",
        "::2",
        "fd00::7f35:1",
    ] {
        assert_eq!(slot_of(&addr(other)), None, "{other}");
    }
}

#[test]
fn answers_reach_sockets_bound_to_nothing_or_to_an_address_of_the_pods() {
    let own = own();
    for any in ["::", "0.0.0.0"] {
        assert_eq!(Reach::of(&addr(any), &own), Some(Reach::Any));
    }
    assert_eq!(Reach::of(&addr("10.0.0.99"), &own), None);
    let few = core::array::from_fn(|n| if n == 0 { own[0] } else { Addr::UNSPECIFIED });
    for (place, v4, wanted) in [
        (0, true, Some(own[0])),
        // Of the other family; not there.
        (0, false, None),
        (1, true, None),
    ] {
        let to = stand_in(v4, Reach::Own(place), 1);
        let (reach, _) = stands_for(&to).unwrap();
        assert_eq!(delivered_to(&to, reach, Some(&few)), wanted, "{place}");
        assert_eq!(delivered_to(&to, reach, None), None);
    }
}

#[test]
fn own_addresses_as_far_as_the_list_tells() {
    let own = own();
    assert_eq!(listed(&own, &own[15]), Some(true));
    // It is full.
    assert_eq!(listed(&own, &addr("10.0.0.99")), None);
    let few = core::array::from_fn(|n| if n < 2 { own[n] } else { Addr::UNSPECIFIED });
    assert_eq!(listed(&few, &own[1]), Some(true));
    assert_eq!(listed(&few, &own[2]), Some(false));
    assert_eq!(listed(&few, &addr("fe80::1")), None);
    assert_eq!(listed(&few, &addr("febf::1")), None);
    assert_eq!(listed(&few, &addr("fec0::1")), Some(false));
}

#[test]
fn what_only_ztunnel_may_send_from_its_port() {
    for (source, to, wanted) in [
        ("127.0.0.1", "10.0.0.5", true),
        ("127.53.0.3", "10.0.0.255", true),
        ("127.53.16.3", "10.0.0.5", true),
        ("::1", "fd00::5", true),
        ("::127.53.0.3", "fd00::5", true),
        // The routes would take 127.0.0.1, or ::1; for multicast it may have been chosen before.
        ("::", "127.0.0.1", true),
        ("::", "127.9.9.9", true),
        ("::", "0.0.0.0", true),
        ("::", "::1", true),
        ("::", "239.1.1.1", true),
        ("::", "ff02::1", true),
        ("::", "10.0.0.5", false),
        ("::", "fd00::5", false),
        ("127.0.0.2", "127.0.0.1", false),
        ("10.0.0.5", "127.0.0.1", false),
        ("fd00::5", "::1", false),
    ] {
        let forged = passes_for_an_answer(&addr(source), &addr(to));
        assert_eq!(forged, wanted, "{source} to {to}");
    }
}

#[test]
fn a_device_hears_what_is_for_its_own_address() {
    let pod = |single_ifindex, answering: &[u32]| {
        let mut pod = Pod {
            flags: 0,
            single_ifindex,
            hold: 0,
            virtual_ifindexes: [0; MAX_VIRTUAL],
            answering_ifindexes: [0; MAX_ANSWERING],
            lookup_sources: [addr("10.0.0.5"), addr("::")],
            answered_at: [Addr::UNSPECIFIED; MAX_ANSWERED_AT],
        };
        pod.answering_ifindexes[..answering.len()].copy_from_slice(answering);
        pod
    };
    let one = pod(2, &[]);
    let any = addr("0.0.0.0");
    let own = addr("10.0.0.5");
    for (device, bound, connects_with_port, wanted) in [
        (2, any, false, true),
        (2, own, false, true),
        (2, own, true, true),
        // It will have 127.0.0.1.
        (2, any, true, false),
        // An address that may be another interface's.
        (2, addr("10.0.0.6"), false, false),
        (3, any, false, false),
        (3, own, false, false),
    ] {
        assert_eq!(
            heard_by(device, &one, &bound, true, connects_with_port),
            wanted,
            "{device} {connects_with_port}"
        );
    }
    // A family of which the pod has no address.
    assert!(!heard_by(2, &one, &addr("::"), false, false));
    // Of several interfaces the one with the only default route.
    for (pod, interface) in [
        (pod(2, &[2]), 2),
        (pod(0, &[3]), 3),
        (pod(0, &[2, 3]), 0),
        (pod(0, &[]), 0),
    ] {
        assert_eq!(pod.lookup_ifindex(), interface);
        for device in 1..5 {
            assert_eq!(
                heard_by(device, &pod, &any, true, false),
                device == interface
            );
        }
    }
}

fn nothing() -> Asked {
    Asked {
        resolvers: [addr("::"); ASKED_SLOTS],
        count: 0,
        replaced: 0,
    }
}

fn resolver(n: u32) -> Addr {
    Addr::v4(n.to_be())
}

#[test]
fn resolvers_keep_their_slots_and_the_oldest_but_the_first_gives_way() {
    let mut asked = nothing();
    assert_eq!(asked.resolver(0), None);
    for round in 0..2 {
        for n in 0..ASKED_SLOTS {
            assert_eq!(
                asked.one_of(&resolver(0), &resolver(n as u32)),
                n,
                "round {round}"
            );
        }
    }
    let slots: Vec<usize> = (100..109)
        .map(|n| asked.one_of(&resolver(0), &resolver(n)))
        .collect();
    assert_eq!(slots, vec![1, 2, 3, 4, 5, 6, 7, 1, 2]);
    assert_eq!(asked.resolver(0), Some(resolver(0)));
    assert_eq!(asked.resolver(1), Some(resolver(107)));
    assert_eq!(asked.resolver(3), Some(resolver(102)));
    assert_eq!(asked.resolver(ASKED_SLOTS), None);
}

#[test]
fn where_answers_cannot_be_told_apart_the_last_resolver_counts() {
    let mut asked = nothing();
    asked.only(&resolver(1));
    asked.only(&resolver(2));
    assert_eq!((asked.resolver(0), asked.count), (Some(resolver(2)), 1));
    assert_eq!(asked.one_of(&resolver(9), &resolver(3)), 1);
    asked.only(&resolver(4));
    assert_eq!(
        (asked.resolver(0), asked.resolver(1)),
        (Some(resolver(4)), Some(resolver(3)))
    );
}

#[test]
fn a_socket_that_remembered_nothing_may_have_asked_the_usual_resolver() {
    let mut asked = nothing();
    assert_eq!(asked.one_of(&resolver(1), &resolver(2)), 1);
    assert_eq!(asked.one_of(&resolver(1), &resolver(1)), 0);
    asked.alone(&resolver(3));
    assert_eq!(
        (asked.resolver(0), asked.resolver(1)),
        (Some(resolver(3)), None)
    );
}
