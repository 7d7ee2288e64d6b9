//! What is said when all suites have run: which ran, what came of it, how long it took, where to look. It runs nothing.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use super::record::Tally;

/// What came of one suite.
pub(super) struct Outcome {
    pub(super) name: &'static str,
    pub(super) verdict: Verdict,
    pub(super) took: Duration,
    pub(super) tally: Tally,
    /// Where its logs are.
    pub(super) logs: PathBuf,
    /// What its failed tests have left to be looked at.
    pub(super) kept: Vec<PathBuf>,
}

/// How a suite ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Passed,
    Failed,
    /// The filter fits none of its tests.
    NoMatch,
}

/// All of it, as text.
pub(super) fn text(outcomes: &[Outcome]) -> String {
    let mut text = String::from("== Summary\n");
    for outcome in outcomes {
        let verdict = match outcome.verdict {
            Verdict::Passed => "passed",
            Verdict::Failed => "FAILED",
            Verdict::NoMatch => "no test of that name",
        };
        let line = match outcome.verdict {
            Verdict::NoMatch => format!("{:<8} {verdict}", outcome.name),
            _ => format!(
                "{:<8} {verdict}  {:>11}  {:<34}  {}",
                outcome.name,
                minutes(outcome.took),
                counts(&outcome.tally),
                outcome.logs.display()
            ),
        };
        // Writing into a string does not fail.
        let _always = writeln!(text, "{}", line.trim_end());
        for name in &outcome.tally.names {
            let _always = writeln!(text, "           failed: {name}");
        }
        for dir in &outcome.kept {
            let _always = writeln!(text, "           kept: {}", dir.display());
        }
    }
    let took = outcomes.iter().map(|outcome| outcome.took).sum();
    let _always = writeln!(text, "in all   {:>19}", minutes(took));
    text
}

fn counts(tally: &Tally) -> String {
    let mut text = String::new();
    for (count, what) in [
        (tally.passed, "passed"),
        (tally.failed, "failed"),
        (tally.ignored, "ignored"),
    ] {
        if count > 0 {
            let _always = write!(
                text,
                "{}{count} {what}",
                if text.is_empty() { "" } else { ", " }
            );
        }
    }
    text
}

fn minutes(took: Duration) -> String {
    let seconds = took.as_secs();
    format!("{} min {:02} s", seconds / 60, seconds % 60)
}

/// Directories below one that have been made since, by name.
pub(super) fn made_since(dir: &Path, since: SystemTime) -> Vec<PathBuf> {
    let mut found: Vec<_> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| {
            let made = entry.metadata().and_then(|data| data.modified());
            made.is_ok_and(|made| made >= since)
        })
        .map(|entry| entry.path())
        .collect();
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_summary_says_what_ran_how_long_and_where_to_look() {
        let outcomes = [
            Outcome {
                name: "unit",
                verdict: Verdict::Passed,
                took: Duration::from_secs(61),
                tally: Tally {
                    passed: 12,
                    ignored: 1,
                    ..Tally::default()
                },
                logs: "target/test/unit.log".into(),
                kept: Vec::new(),
            },
            Outcome {
                name: "cluster",
                verdict: Verdict::Failed,
                took: Duration::from_secs(600),
                tally: Tally {
                    passed: 3,
                    failed: 1,
                    names: BTreeSet::from(["probes::pass".to_owned()]),
                    ..Tally::default()
                },
                logs: "target/test/cluster.log".into(),
                kept: vec!["target/cluster/failed/probes".into()],
            },
        ];
        assert_eq!(
            text(&outcomes),
            "== Summary
unit     passed   1 min 01 s  12 passed, 1 ignored                target/test/unit.log
cluster  FAILED  10 min 00 s  3 passed, 1 failed                  target/test/cluster.log
           failed: probes::pass
           kept: target/cluster/failed/probes
in all           11 min 01 s
"
        );
    }

    #[test]
    fn what_was_there_before_is_not_listed() {
        let dir = std::env::temp_dir().join(format!("culvert-kept-{}", std::process::id()));
        fs::create_dir_all(dir.join("one")).unwrap();
        let later = SystemTime::now() + Duration::from_secs(3600);
        assert!(made_since(&dir, later).is_empty());
        assert_eq!(made_since(&dir, SystemTime::UNIX_EPOCH), [dir.join("one")]);
        fs::remove_dir_all(&dir).unwrap();
        assert!(made_since(&dir, SystemTime::UNIX_EPOCH).is_empty());
    }
}
