//! The decision file in all its states, as the plugin finds it while the agent is away.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    time::{Duration, SystemTime},
};

use culvert_cni::decisions::{Alone, Decisions, Rules, Standing, Unreadable, decide_alone};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::common::{POD, Place, config};

/// Whether a pod of a namespace that is not of the mesh starts, and what is said if not.
fn starts(place: &Place, max_age: u64) -> Result<(), String> {
    let mut config = config("1.0.0");
    config["budgetSeconds"] = 1.into();
    config["decisionMaxAgeSeconds"] = max_age.into();
    let pod = POD.replace("shop", "plain");
    let outcome = place
        .call("ADD")
        .config(&config)
        .set("CNI_ARGS", &pod)
        .run();
    if outcome.code == Some(0) {
        return Ok(());
    }
    assert_eq!(outcome.error_code(), 11);
    Err(outcome.error()["msg"].as_str().unwrap().to_owned())
}

#[test]
fn only_one_that_is_whole_young_and_ours_counts() {
    let place = Place::new("decisions");
    let said = |what: &str, max_age: u64| {
        let said = starts(&place, max_age).unwrap_err();
        assert!(said.contains(what), "{what}: {said}");
    };
    said("cannot be read", 3600);
    place.decisions(3500, |_| {});
    assert_eq!(starts(&place, 3600), Ok(()));
    said("s old", 600);
    place.decisions(0, |file| file["written_at"] = json!(9_999_999_999_u64));
    said("future", 3600);
    place.decisions(0, |file| file["custom_selectors"] = true.into());
    said("selectors", 3600);
    place.decisions(0, |file| file["version"] = 2.into());
    said("version 2", 3600);
    place.decisions(0, |file| {
        *file = json!({"version": 7, "all": "different"});
    });
    said("version 7", 3600);
    place.decisions(0, |file| {
        file.as_object_mut().unwrap().remove("namespaces");
    });
    said("broken", 3600);
    place.decisions(0, |file| file["namespaces"]["plain"] = "unheard-of".into());
    said("broken", 3600);
    for content in ["", "{", "[]", "null"] {
        fs::write(place.path("decisions.json"), content).unwrap();
        said("broken", 3600);
    }
    place.decisions(0, |_| {});
    let file = place.path("decisions.json");
    let whole = fs::read(&file).unwrap();
    fs::write(&file, whole.get(..whole.len() - 1).unwrap()).unwrap();
    said("broken", 3600);
    place.decisions(0, |_| {});
    fs::set_permissions(&file, fs::Permissions::from_mode(0o666)).unwrap();
    said("other than root", 3600);
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    assert_eq!(starts(&place, 3600), Ok(()));
    fs::remove_file(&file).unwrap();
    fs::create_dir(&file).unwrap();
    said("of no use", 3600);
}

#[test]
fn excluded_namespaces_start_whatever_the_selectors() {
    let place = Place::new("decisions-excluded");
    place.decisions(0, |file| {
        file["custom_selectors"] = true.into();
        file["excluded"] = json!(["plain"]);
        file["namespaces"]["plain"] = "mesh".into();
    });
    assert_eq!(starts(&place, 3600), Ok(()));
}

#[test]
fn a_published_file_is_private_whole_and_alone() {
    let place = Place::new("publish");
    let path = place.path("decisions.json");
    let first = Decisions::new(false, BTreeSet::new(), BTreeMap::new());
    first.publish(&path).unwrap();
    let inode = fs::metadata(&path).unwrap().ino();
    let second = Decisions::new(
        true,
        BTreeSet::from(["kube-system".to_owned()]),
        BTreeMap::from([("shop".to_owned(), Standing::OptedIn)]),
    );
    second.publish(&path).unwrap();
    assert_eq!(Decisions::read(&path).unwrap(), second);
    let data = fs::metadata(&path).unwrap();
    assert_ne!(data.ino(), inode, "replaced, not written over");
    assert_eq!(data.mode() & 0o777, 0o600);
    let files = fs::read_dir(place.path("")).unwrap().count();
    assert_eq!(files, 1, "no temporary file stays");
    // What cannot be put in place leaves nothing behind either.
    let blocked = place.path("blocked");
    fs::create_dir(&blocked).unwrap();
    fs::write(blocked.join("x"), "").unwrap();
    assert!(second.publish(&blocked).is_err());
    assert_eq!(fs::read_dir(place.path("")).unwrap().count(), 2);
    assert!(matches!(Decisions::read(&blocked), Err(Unreadable::Io(_))));
}

fn namespace() -> impl Strategy<Value = String> {
    "[a-e]"
}

prop_compose! {
    fn decisions()(
        custom_selectors in any::<bool>(),
        excluded in prop::collection::btree_set(namespace(), 0..3),
        namespaces in prop::collection::btree_map(
            namespace(),
            prop_oneof![Just(Standing::Mesh), Just(Standing::OptedIn), Just(Standing::Outside)],
            0..5,
        ),
        written_at in 900_u64..1200,
    ) -> Decisions {
        Decisions { version: 1, written_at, custom_selectors, excluded, namespaces }
    }
}

proptest! {
    #[test]
    fn nobody_starts_alone_who_may_be_of_the_mesh(
        file in prop::option::of(decisions()),
        excluded in prop::collection::btree_set(namespace(), 0..2),
        strict in any::<bool>(),
        max_age in 0_u64..200,
        namespace in namespace(),
    ) {
        let missing = Unreadable::NotOurs;
        let rules = Rules { excluded: excluded.clone(), strict, max_age: Duration::from_secs(max_age) };
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        let verdict = decide_alone(file.as_ref().ok_or(&missing), &rules, &namespace, now);
        let known = file.as_ref().is_some_and(|file| {
            !strict
                && file.written_at <= 1300
                && file.written_at + max_age >= 1000
                && (file.excluded.contains(&namespace)
                    || !file.custom_selectors && file.namespaces.get(&namespace) == Some(&Standing::Outside))
        });
        let may_start = excluded.contains(&namespace) || known;
        prop_assert_eq!(matches!(verdict, Alone::Start(_)), may_start, "{:?}", verdict);
    }

    #[test]
    fn what_is_written_is_read(file in decisions()) {
        let content = serde_json::to_vec(&file).unwrap();
        prop_assert_eq!(Decisions::parse(&content).unwrap(), file);
        for cut in 0..content.len() {
            prop_assert!(Decisions::parse(content.get(..cut).unwrap()).is_err());
        }
        let shape: Value = serde_json::from_slice(&content).unwrap();
        prop_assert_eq!(shape.as_object().unwrap().len(), 5);
    }

    #[test]
    fn no_content_makes_it_panic(content in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(Decisions::parse(&content).is_err());
    }
}
