//! The decision file: nobody starts on the word of a file that does not say so.

use std::{
    collections::BTreeSet,
    time::{Duration, SystemTime},
};

use culvert_cni::decisions::{Alone, Decisions, Rules, Standing, VERSION, decide_alone};

/// A file's content, and pods of some namespaces.
pub fn decisions(data: &[u8]) {
    let read = Decisions::parse(data);
    let rules = Rules {
        excluded: BTreeSet::new(),
        strict: false,
        max_age: Duration::from_secs(3600),
    };
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
    for namespace in ["a", "shop", "kube-system", ""] {
        let verdict = decide_alone(read.as_ref(), &rules, namespace, now);
        let may_start = read.as_ref().is_ok_and(|file| {
            let fresh = file.age(now).is_some_and(|age| age <= rules.max_age);
            let excluded = file.excluded.contains(namespace);
            let outside = file.namespaces.get(namespace) == Some(&Standing::Outside);
            file.version == VERSION && fresh && (excluded || outside && !file.custom_selectors)
        });
        assert_eq!(matches!(verdict, Alone::Start(_)), may_start, "{verdict:?}");
    }
    if let Ok(file) = &read {
        let written = serde_json::to_vec(file).unwrap_or_default();
        assert!(Decisions::parse(&written).is_ok_and(|again| again == *file));
    }
}
