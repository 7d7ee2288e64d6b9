//! What the agent remembers of one pod between two looks at it.
//!
//! Nothing here is truth: all of it may be lost and is found again from the cluster, the kernel and ztunnel.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{
    condition::Condition,
    world::{Failure, Notice, Target},
};
use crate::{
    kernel::{pod::Policy, verify},
    model::Redirection,
    plan::pod::{Kernel, Observed, Wish, Ztunnel},
    traces::Journey,
};

/// First pause after a failure.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// Longest pause between two tries.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// From the plugin's answer to a sandbox's first process, on a busy machine.
const START: Duration = Duration::from_secs(60);

/// One pod.
#[derive(Debug)]
pub(super) struct Entry<P> {
    pub(super) target: Target,
    pub(super) wish: Wish,
    /// How it is to be captured while the wish is to be in.
    pub(super) policy: Policy,
    pub(super) place: Option<Arc<P>>,
    /// The plugin's name for the sandbox whose namespace `place` is.
    pub(super) sandbox: Option<String>,
    /// As what the kernel captures it now; none = it does not.
    pub(super) captured: Option<Captured>,
    /// Something of this kind is missing on the kernel's side.
    pub(super) broken: Option<verify::Kind>,
    pub(super) draining: usize,
    /// New connections go direct, but the kernel still delivers what comes by ztunnel.
    pub(super) released: bool,
    pub(super) ztunnel: Ztunnel,
    /// It was said that the pod is in the mesh: not again each time that a ztunnel is followed by another.
    pub(super) announced: bool,
    pub(super) annotation: Option<Redirection>,
    /// What the watch showed last: it may lag behind what we wrote.
    pub(super) shown_annotation: Option<Redirection>,
    /// `status.podIPs`: with these the namespace is confirmed, and a change of them is a reason to look again.
    pub(super) addresses: BTreeSet<IpAddr>,
    /// Its addresses changed: it may be in another namespace by now, to be looked for from then on.
    pub(super) look_again: Option<Instant>,
    pub(super) trouble: Option<Trouble>,
    /// The annotation could not be written.
    pub(super) mute: Option<Trouble>,
    /// Somebody is at it.
    pub(super) busy: bool,
    /// What the cluster says of it has not been looked at since it came.
    pub(super) new: bool,
    /// When the plugin brought it, as long as the watch has not shown it.
    pub(super) ahead_of_watch: Option<Instant>,
    /// The runtime has taken down the sandbox that has this cookie: there is nothing to capture until there is another,
    /// which the plugin brings, or which is looked for in case that nobody asked the plugin.
    pub(super) ended: Option<u64>,
    /// Since when the cluster does not know it.
    pub(super) absent: Option<Instant>,
    /// It is of a kind that cannot be served.
    pub(super) refused: bool,
    /// Why it is not in the mesh, in words.
    pub(super) reason: String,
    pub(super) warnings: Vec<String>,
    /// How long the kernel's side and ztunnel's took last.
    pub(super) took: [Duration; 2],
    /// What was said last, so that it is not said again.
    pub(super) said: Option<String>,
    pub(super) condition: Condition,
    /// What is being done for it, for whoever collects traces.
    pub(super) journey: Journey,
}

/// As what a pod is captured.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Captured {
    /// As this says.
    As(Policy),
    /// By an earlier agent: as what is not known, and an attach sets it right.
    Somehow,
}

/// A failure and what follows from it.
#[derive(Clone, Debug)]
pub(super) struct Trouble {
    pub(super) failure: Failure,
    pub(super) tries: u32,
    /// None: nothing is tried until something changes.
    pub(super) again: Option<Instant>,
}

impl<P> Entry<P> {
    pub(super) fn new(target: Target) -> Self {
        Self {
            target,
            // A pod about which nothing can be said yet is not let go: that would be plaintext.
            wish: Wish::Keep,
            policy: Policy::default(),
            place: None,
            sandbox: None,
            captured: None,
            broken: None,
            draining: 0,
            released: false,
            ztunnel: Ztunnel::Untold,
            announced: false,
            annotation: None,
            shown_annotation: None,
            addresses: BTreeSet::new(),
            look_again: None,
            trouble: None,
            mute: None,
            busy: false,
            new: true,
            ahead_of_watch: None,
            ended: None,
            absent: None,
            refused: false,
            reason: String::new(),
            warnings: Vec::new(),
            took: [Duration::ZERO; 2],
            said: None,
            condition: Condition::default(),
            journey: Journey::default(),
        }
    }

    /// The pod's state in the plan's terms.
    pub(super) fn observed(&self, now: Instant) -> Observed {
        let kernel = match &self.captured {
            _ if self.draining > 0 => Kernel::Draining,
            Some(_) if self.released => Kernel::Released,
            Some(Captured::As(policy)) if *policy == self.policy && self.broken.is_none() => {
                Kernel::In
            }
            Some(_) => Kernel::Stale,
            None => Kernel::Out,
        };
        Observed {
            placed: self.place.is_some(),
            kernel,
            ztunnel: self.ztunnel,
            annotation: self.annotation,
            mute: !is_due(self.mute.as_ref(), now),
        }
    }

    /// Force-deleted, a pod is gone from the API server before it has ended: only its processes, or the runtime when it
    /// takes the sandbox down, can say that it has.
    pub(super) fn unsure(&self) -> bool {
        self.absent.is_some() && self.ended.is_none()
    }

    /// Its processes may yet be started: the runtime asks the plugin before it starts the first.
    pub(super) fn may_be_starting(&self, now: Instant) -> bool {
        self.sandbox.is_some() && self.absent.is_some_and(|since| now - since < START)
    }

    /// May it be tried now?
    pub(super) fn due(&self, now: Instant) -> bool {
        is_due(self.trouble.as_ref(), now)
    }

    /// When something that failed may be tried again.
    pub(super) fn again(&self) -> Option<Instant> {
        [&self.trouble, &self.mute]
            .into_iter()
            .filter_map(|t| t.as_ref()?.again)
            .chain(self.look_again.filter(|_| self.looked_for()))
            .chain(self.condition.again())
            .min()
    }

    /// Is there a reason to look for the pod in another namespace?
    pub(super) fn looked_for(&self) -> bool {
        self.wish == Wish::In || self.ended.is_some()
    }

    /// Notes a failure and when to try again.
    pub(super) fn failed(&mut self, failure: Failure, now: Instant) {
        self.trouble = Some(Trouble::after(self.trouble.as_ref(), failure, now));
    }

    /// What is to be said of a failure: nothing that was said last.
    pub(super) fn worth_saying(&mut self, failure: &Failure) -> Option<Notice> {
        let new = self.said.as_ref() != Some(&failure.message);
        new.then(|| {
            self.said = Some(failure.message.clone());
            Notice::Failed(failure.clone())
        })
    }

    /// Notes that the annotation could not be written, which holds up nothing else.
    pub(super) fn muted(&mut self, failure: Failure, now: Instant) {
        self.mute = Some(Trouble::after(self.mute.as_ref(), failure, now));
    }

    /// The pod is in another namespace than was known: nothing is known of that one.
    pub(super) fn move_to(&mut self, place: Arc<P>, sandbox: Option<String>) {
        self.place = Some(place);
        self.sandbox = sandbox;
        self.captured = None;
        self.broken = None;
        self.draining = 0;
        self.released = false;
        self.ztunnel = Ztunnel::Untold;
        self.announced = false;
        self.look_again = None;
        self.trouble = None;
        self.ended = None;
    }
}

impl Trouble {
    /// Twice the pause each time, up to a cap.
    pub(super) fn after(before: Option<&Self>, failure: Failure, now: Instant) -> Self {
        let tries = before.map_or(0, |t| t.tries) + 1;
        let pause = FIRST_PAUSE
            .saturating_mul(1 << (tries - 1).min(10))
            .min(LONGEST_PAUSE);
        let again = failure.retry.then(|| now + pause);
        Self {
            failure,
            tries,
            again,
        }
    }
}

pub(super) fn is_due(trouble: Option<&Trouble>, now: Instant) -> bool {
    trouble.is_none_or(|t| t.again.is_some_and(|again| again <= now))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> Entry<()> {
        Entry::new(Target {
            uid: "u".into(),
            static_uid: None,
            namespace: "n".into(),
            name: "p".into(),
            service_account: "s".into(),
        })
    }

    #[test]
    fn pauses_double_up_to_a_cap_and_never_end() {
        let mut entry = entry();
        let now = Instant::now();
        let mut pauses = Vec::new();
        for _ in 0..40 {
            entry.failed(
                Failure {
                    message: "no".into(),
                    retry: true,
                },
                now,
            );
            let again = entry.trouble.as_ref().and_then(|t| t.again).unwrap();
            pauses.push((again - now).as_millis());
        }
        assert_eq!(pauses[..4], [500, 1000, 2000, 4000]);
        assert_eq!(pauses[39], 60_000);
    }

    #[test]
    fn what_no_retry_helps_waits_for_a_change() {
        let mut entry = entry();
        let now = Instant::now();
        entry.failed(
            Failure {
                message: "never".into(),
                retry: false,
            },
            now,
        );
        assert!(!entry.due(now + Duration::from_secs(86_400)));
    }
}
