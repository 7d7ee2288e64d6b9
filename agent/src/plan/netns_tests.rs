//! Golden plans, and properties that hold for every order of events.

use super::*;

fn fresh() -> Observed {
    let kernel = |family, pref, table| Rule {
        pref,
        ..local_rule(family, table)
    };
    Observed {
        links: vec![
            Link {
                index: 1,
                name: "lo".into(),
                up: true,
            },
            Link {
                index: 2,
                name: "eth0".into(),
                up: true,
            },
            Link {
                index: 3,
                name: "tunl0".into(),
                up: false,
            },
        ],
        addresses: vec![
            (2, "10.0.0.5".parse().unwrap()),
            (2, "fd00::5".parse().unwrap()),
        ],
        rules: [Family::V4, Family::V6]
            .into_iter()
            .flat_map(|f| [kernel(f, 0, LOCAL_TABLE), kernel(f, 32766, 254)])
            .collect(),
        routes: vec![],
        default_routes: vec![2],
        ipv6: true,
    }
}

fn local_rule(family: Family, table: u32) -> Rule {
    Rule {
        action: Action::Table(table),
        ..local(family, 0)
    }
}

/// The kernel, as far as rules and routes go; panics where it would refuse.
fn apply(observed: &mut Observed, step: &Step) {
    match step {
        Step::AddRule(rule) => {
            assert!(!observed.rules.contains(rule), "added twice: {rule}");
            let at = observed
                .rules
                .iter()
                .rposition(|r| r.family == rule.family && r.pref <= rule.pref)
                .map_or_else(
                    || {
                        observed
                            .rules
                            .iter()
                            .position(|r| r.family == rule.family)
                            .unwrap_or(0)
                    },
                    |p| p + 1,
                );
            observed.rules.insert(at, rule.clone());
        }
        Step::DelRule(rule) => {
            let at = observed
                .rules
                .iter()
                .position(|r| r == rule)
                .expect("deleted a rule that is not there");
            observed.rules.remove(at);
        }
        Step::AddRoute(route) => {
            observed.routes.retain(|r| {
                (r.family, r.table, r.destination, r.metric)
                    != (route.family, route.table, route.destination, route.metric)
            });
            observed.routes.push(route.clone());
        }
        Step::DelRoute(route) => observed.routes.retain(|r| r != route),
    }
}

/// Local delivery works, and a marked packet does not reach a table that leads out.
fn check_safe(observed: &Observed, enrolled_before: bool) {
    for family in [Family::V4, Family::V6] {
        let rules: Vec<&Rule> = observed
            .rules
            .iter()
            .filter(|r| r.family == family)
            .collect();
        assert!(
            rules.iter().any(|r| r.action == Action::Table(LOCAL_TABLE)),
            "local delivery is cut"
        );
        if enrolled_before {
            let main = rules
                .iter()
                .position(|r| r.action == Action::Table(254))
                .unwrap();
            let stop = rules.iter().position(|r| {
                r.mark.is_some()
                    && (r.action == Action::Unreachable || r.action == Action::Table(TURN_TABLE))
            });
            assert!(
                stop.is_some_and(|s| s < main),
                "a marked packet would get out: {rules:?}"
            );
        }
    }
}

fn print(steps: &[Step]) -> String {
    steps.iter().map(|s| format!("{s}\n")).collect()
}

#[test]
fn enrolling_a_fresh_pod() {
    let golden = "\
add route -4 local default dev #1 src 10.0.0.5 metric 49 table 15001
add route -4 local default dev #1 metric 50 table 15001
add route -4 local default dev #2 src 10.0.0.5 metric 1002 table 15001
add route -4 local 127.0.0.1 dev #2 metric 1002 table local
add route -6 local default dev #1 metric 50 table 15001
add route -6 local default dev #2 metric 1002 table 15001
add route -6 local ::1 dev #2 metric 1002 table local
add route -6 blackhole fd00::5 metric 1024 table 15002
add rule -4 pref 2 lookup local
add rule -4 pref 0 fwmark 0x111/0xff5 lookup 15001
add rule -4 pref 0 fwmark 0x110/0xff4 unreachable
del rule -4 pref 0 lookup local
add rule -4 pref 0 lookup local
add rule -4 pref 0 fwmark 0x115/0xfff lookup 15001
del rule -4 pref 2 lookup local
add rule -6 pref 2 lookup local
add rule -6 pref 0 fwmark 0x119/0xfff lookup 15002
add rule -6 pref 0 fwmark 0x111/0xff5 lookup 15001
add rule -6 pref 0 fwmark 0x110/0xff4 unreachable
del rule -6 pref 0 lookup local
add rule -6 pref 0 lookup local
add rule -6 pref 0 fwmark 0x115/0xfff lookup 15001
del rule -6 pref 2 lookup local
";
    assert_eq!(print(&enrol(&fresh(), &[])), golden);
}

#[test]
fn every_step_is_safe_and_a_second_pass_has_nothing_to_do() {
    let mut state = fresh();
    let before = state.clone();
    for step in enrol(&state.clone(), &["vm0".into()]) {
        apply(&mut state, &step);
        check_safe(&state, false);
    }
    assert_eq!(enrol(&state, &["vm0".into()]), vec![]);
    for step in unenrol(&state.clone()) {
        apply(&mut state, &step);
        check_safe(&state, false);
    }
    assert_eq!(state, before, "un-enrolling leaves what was there before");
}

#[test]
fn a_plan_cut_off_at_any_step_is_completed_or_undone() {
    let whole = enrol(&fresh(), &[]);
    for cut in 0..=whole.len() {
        let mut state = fresh();
        whole[..cut].iter().for_each(|s| apply(&mut state, s));
        let mut undone = state.clone();
        for step in unenrol(&undone.clone()) {
            apply(&mut undone, &step);
            check_safe(&undone, false);
        }
        assert_eq!(undone, fresh(), "undone after {cut} steps");
        for step in enrol(&state.clone(), &[]) {
            apply(&mut state, &step);
            check_safe(&state, false);
        }
        assert_eq!(enrol(&state, &[]), vec![], "completed after {cut} steps");
    }
}

#[test]
fn a_rule_that_went_missing_comes_back_without_a_gap() {
    let mut whole = fresh();
    for step in enrol(&whole.clone(), &[]) {
        apply(&mut whole, &step);
    }
    for lost in whole
        .rules
        .iter()
        .filter(|r| r.protocol == PROTOCOL && r.action != Action::Unreachable)
    {
        let mut state = whole.clone();
        state.rules.retain(|r| r != lost);
        for step in enrol(&state.clone(), &[]) {
            apply(&mut state, &step);
            check_safe(&state, true);
        }
        assert_eq!(enrol(&state, &[]), vec![], "after losing {lost}");
    }
}

#[test]
fn a_local_table_that_was_moved_in_front_goes_behind_again() {
    let mut state = fresh();
    for step in enrol(&state.clone(), &[]) {
        apply(&mut state, &step);
    }
    let at = state
        .rules
        .iter()
        .position(|r| is_local(r, Family::V4, 0))
        .unwrap();
    let rule = state.rules.remove(at);
    state.rules.insert(0, rule);
    assert_ne!(enrol(&state, &[]), vec![]);
    for step in enrol(&state.clone(), &[]) {
        apply(&mut state, &step);
        check_safe(&state, true);
    }
    assert_eq!(enrol(&state, &[]), vec![]);
}

#[test]
fn without_ipv6_only_ipv4_is_touched() {
    let observed = Observed {
        ipv6: false,
        ..fresh()
    };
    assert!(!print(&enrol(&observed, &[])).contains("-6"));
}

#[test]
fn a_pod_with_thousands_of_addresses_takes_no_room_from_others() {
    let mut observed = fresh();
    let before = observed.own();
    let more = (0..5000_u32).map(|n| (2, IpAddr::V4(Ipv4Addr::from_bits(0x0b00_0000 + n))));
    observed.addresses.extend(more);
    let own = observed.own();
    assert_eq!(own.len(), MAX_OWN);
    assert!(before.iter().all(|address| own.contains(address)));
}
