//! What a guest said, and whether it is what was to be said. Pure: lines in, a list of complaints out; no complaint is
//! the only way to pass, and silence is a complaint.

/// Begins each line that is meant for us and not for people. What follows is `up`, `setup failed: WHAT`,
/// `exit STEP STATUS` or `end`.
pub(super) const MARK: &str = "culvert-vm: ";

/// The complaint about a test binary that found nothing to run.
pub(super) const NO_TEST: &str = "no test ran";

/// What is heard so far.
#[derive(Debug, Default)]
pub(super) struct Transcript {
    up: bool,
    ended: bool,
    setup_failure: Option<String>,
    steps: Vec<Heard>,
    /// Lines since the last step's end.
    pending: Vec<String>,
}

/// A step that has ended.
#[derive(Debug)]
struct Heard {
    name: String,
    status: i32,
    lines: Vec<String>,
}

/// The numbers of a `test result:` line.
#[derive(Debug, Default, PartialEq, Eq)]
struct Totals {
    ok: bool,
    passed: u32,
    failed: u32,
    ignored: u32,
}

impl Transcript {
    /// Takes a line in. True when it is one for people.
    pub(super) fn hear(&mut self, line: &str) -> bool {
        let Some(word) = line.strip_prefix(MARK) else {
            self.pending.push(line.to_owned());
            return true;
        };
        let mut words = word.split(' ');
        match (
            words.next(),
            words.next(),
            words.next().and_then(|status| status.parse().ok()),
        ) {
            (Some("up"), None, _) => self.up = true,
            (Some("end"), None, _) => self.ended = true,
            (Some("exit"), Some(name), Some(status)) => {
                let lines = std::mem::take(&mut self.pending);
                self.steps.push(Heard {
                    name: name.to_owned(),
                    status,
                    lines,
                });
            }
            _ => self.setup_failure = Some(word.to_owned()),
        }
        false
    }

    /// True once the guest has finished booting.
    pub(super) fn is_up(&self) -> bool {
        self.up
    }

    /// What keeps this from being a whole run, whatever was run.
    pub(super) fn gaps(&self) -> Vec<String> {
        let mut gaps = Vec::new();
        if let Some(failure) = &self.setup_failure {
            gaps.push(format!("the guest could not be prepared: {failure}"));
        } else if !self.up {
            gaps.push("the guest did not come up".to_owned());
        } else if !self.ended {
            gaps.push("the guest stopped before it was done".to_owned());
        }
        gaps
    }

    /// What keeps a step from being a passed run of a Rust test binary in which every one of `required` ran.
    pub(super) fn test_complaints(&self, step: &str, required: &[&str]) -> Vec<String> {
        let Some(step) = self.steps.iter().find(|heard| heard.name == step) else {
            return vec![format!("the step {step} did not end")];
        };
        let mut complaints = Vec::new();
        if step.status != 0 {
            complaints.push(format!("the test binary ended with status {}", step.status));
        }
        match step
            .lines
            .iter()
            .filter_map(|line| totals(line))
            .collect::<Vec<_>>()
            .as_slice()
        {
            [totals] => {
                if !totals.ok || totals.failed > 0 {
                    complaints.push(format!("{} tests failed", totals.failed));
                }
                if totals.ignored > 0 {
                    complaints.push(format!("{} tests were left out", totals.ignored));
                }
                if totals.passed == 0 {
                    complaints.push(NO_TEST.to_owned());
                }
            }
            [] => complaints.push("there is no `test result:` line".to_owned()),
            _ => complaints.push("there is more than one `test result:` line".to_owned()),
        }
        let passed: Vec<_> = step
            .lines
            .iter()
            .filter_map(|line| passed_test(line))
            .collect();
        for name in required {
            if !passed.iter().any(|test| test.contains(name)) {
                complaints.push(format!("no test called {name} passed"));
            }
        }
        complaints
    }

    /// What keeps a step from being a proper refusal that names one of `reasons`: not a crash, not a missing program.
    pub(super) fn refusal_complaints(&self, step: &str, reasons: &[&str]) -> Vec<String> {
        let Some(step) = self.steps.iter().find(|heard| heard.name == step) else {
            return vec![format!("the step {step} did not end")];
        };
        let mut complaints = Vec::new();
        match step.status {
            0 => complaints.push(format!("{} succeeded and must not", step.name)),
            101 => complaints.push(format!("{} panicked", step.name)),
            126.. => complaints.push(format!("{} ended with status {}", step.name, step.status)),
            _ => {}
        }
        let said = step.lines.join("\n").to_lowercase();
        if !reasons
            .iter()
            .any(|reason| said.contains(&reason.to_lowercase()))
        {
            complaints.push(format!(
                "{} names none of: {}",
                step.name,
                reasons.join(", ")
            ));
        }
        complaints
    }

    /// What keeps a step from having simply succeeded.
    pub(super) fn success_complaints(&self, step: &str, meaning: &str) -> Vec<String> {
        match self.steps.iter().find(|heard| heard.name == step) {
            None => vec![format!("the step {step} did not end")],
            Some(heard) if heard.status == 0 => Vec::new(),
            Some(heard) => vec![format!("{meaning}: {}", heard.lines.join(" "))],
        }
    }
}

/// The kernel's own complaints among the lines of a console. Only lines with the kernel's time stamp count.
pub(super) fn kernel_complaints(console: &str) -> Vec<&str> {
    const SIGNS: [&str; 9] = [
        "Kernel panic",
        "BUG:",
        "Oops",
        "general protection fault",
        "WARNING: CPU",
        "refcount_t:",
        "possible circular locking",
        "blocked for more than",
        "unregister_netdevice: waiting",
    ];
    console
        .lines()
        .filter(|line| is_kernels(line) && SIGNS.iter().any(|sign| line.contains(sign)))
        .collect()
}

fn is_kernels(line: &str) -> bool {
    let stamp = line.strip_prefix('[').and_then(|rest| rest.split_once(']'));
    stamp.is_some_and(|(stamp, _)| stamp.trim_start().parse::<f64>().is_ok())
}

/// The name in `test NAME ... ok`.
fn passed_test(line: &str) -> Option<&str> {
    line.strip_prefix("test ")?.strip_suffix(" ... ok")
}

fn totals(line: &str) -> Option<Totals> {
    let (verdict, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let mut totals = Totals {
        ok: verdict == "ok",
        ..Totals::default()
    };
    for count in counts.split("; ") {
        let (number, what) = count.split_once(' ')?;
        let place = match what {
            "passed" => &mut totals.passed,
            "failed" => &mut totals.failed,
            "ignored" => &mut totals.ignored,
            _ => continue,
        };
        *place = number.parse().ok()?;
    }
    Some(totals)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RESULT: &str = "test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.02s";

    fn heard(lines: &[&str]) -> Transcript {
        let mut transcript = Transcript::default();
        for line in lines {
            transcript.hear(line);
        }
        transcript
    }

    fn ran(lines: &[&str], status: &str) -> Transcript {
        let exit = format!("culvert-vm: exit tests {status}");
        let mut all = vec!["culvert-vm: up"];
        all.extend(lines);
        all.extend([exit.as_str(), "culvert-vm: end"]);
        heard(&all)
    }

    #[test]
    fn a_passed_run_has_no_complaint() {
        let run = ran(
            &["test load ... ok", "test outbound_v4 ... ok", RESULT],
            "0",
        );
        assert!(run.gaps().is_empty());
        assert!(
            run.test_complaints("tests", &["load", "outbound"])
                .is_empty()
        );
    }

    #[test]
    fn marks_are_not_for_people_and_all_else_is() {
        let mut transcript = Transcript::default();
        assert!(!transcript.hear("culvert-vm: up"));
        assert!(transcript.is_up());
        assert!(transcript.hear(RESULT));
        assert!(transcript.hear(""));
    }

    #[test]
    fn silence_is_a_complaint() {
        let nothing = Transcript::default();
        assert_eq!(nothing.gaps(), ["the guest did not come up"]);
        assert_eq!(
            nothing.test_complaints("tests", &[]),
            ["the step tests did not end"]
        );
        assert_eq!(
            nothing.refusal_complaints("load", &["x"]),
            ["the step load did not end"]
        );
        assert_eq!(
            nothing.success_complaints("clean", "left"),
            ["the step clean did not end"]
        );
    }

    #[test]
    fn a_guest_that_stops_half_way_has_a_gap() {
        let run = heard(&["culvert-vm: up", "test load ... ok"]);
        assert_eq!(run.gaps(), ["the guest stopped before it was done"]);
    }

    #[test]
    fn a_failed_mount_is_named() {
        let run = heard(&["culvert-vm: setup failed: mount -t bpf bpf /sys/fs/bpf"]);
        assert!(run.gaps()[0].contains("mount -t bpf"), "{:?}", run.gaps());
    }

    #[test]
    fn each_kind_of_bad_result_is_seen() {
        let result = |counts: &str, verdict: &str| {
            ran(
                &[&format!(
                    "test result: {verdict}. {counts}; finished in 0.1s"
                )],
                "0",
            )
            .test_complaints("tests", &[])
        };
        assert_eq!(
            result("1 passed; 2 failed; 0 ignored", "FAILED"),
            ["2 tests failed"]
        );
        assert_eq!(
            result("1 passed; 0 failed; 3 ignored", "ok"),
            ["3 tests were left out"]
        );
        assert_eq!(
            result("0 passed; 0 failed; 0 ignored", "ok"),
            ["no test ran"]
        );
        assert_eq!(
            ran(&[], "0").test_complaints("tests", &[]),
            ["there is no `test result:` line"]
        );
        assert_eq!(
            ran(&[RESULT, RESULT], "0").test_complaints("tests", &[]),
            ["there is more than one `test result:` line"]
        );
        assert_eq!(
            ran(&[RESULT], "101").test_complaints("tests", &[]),
            ["the test binary ended with status 101"]
        );
        assert_eq!(
            ran(&[RESULT], "0").test_complaints("tests", &["inbound"]),
            ["no test called inbound passed"]
        );
    }

    #[test]
    fn a_refusal_needs_a_reason_and_a_clean_exit() {
        let run = |said: &str, status: &str| {
            ran(&[said], status).refusal_complaints("tests", &["netns cookie", "ingress_ifindex"])
        };
        assert!(run("error: no Netns Cookie in sock_ops", "1").is_empty());
        assert_eq!(
            run("no netns cookie", "0"),
            ["tests succeeded and must not"]
        );
        assert_eq!(run("no netns cookie", "101"), ["tests panicked"]);
        assert_eq!(
            run("no netns cookie", "127"),
            ["tests ended with status 127"]
        );
        assert_eq!(
            run("too old", "1"),
            ["tests names none of: netns cookie, ingress_ifindex"]
        );
    }

    #[test]
    fn the_kernels_complaints_are_told_from_the_programs() {
        let console = "[    1.000000] WARNING: CPU: 1 PID: 77 at net/core/dev.c:1\n\
                       BUG: a program's own word\n\
                       [   12.345678] systemd: fine\n\
                       [   99.000001] Kernel panic - not syncing: Attempted to kill init!\n";
        let complaints = kernel_complaints(console);
        assert_eq!(complaints.len(), 2);
        assert!(complaints[0].contains("dev.c"));
        assert!(complaints[1].contains("panic"));
    }
}
