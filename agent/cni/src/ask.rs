//! Asking the agent for a verdict, again and again while it is away, and deciding alone when that is allowed.
//!
//! Whatever goes wrong here, a pod that may be of the mesh is not let go: the only ways out are the agent's word, the
//! rule of [`decisions`](crate::decisions), and an error.

use std::{
    thread,
    time::{Duration, Instant, SystemTime},
};

use serde::{Serialize, de::DeserializeOwned};

use crate::{
    api::{PodRef, Refusal},
    client::{self, Failure},
    config::Entry,
    decisions::Alone,
};

/// First pause between two attempts; doubled until [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(25);

/// An agent that is back should not be waited for.
const LONGEST_PAUSE: Duration = Duration::from_millis(400);

/// With less time than this another attempt cannot end well.
const TOO_LITTLE: Duration = Duration::from_millis(300);

/// How long a pod of an excluded namespace waits for an agent that listens but does not answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// What came of it.
#[derive(Debug)]
pub enum Verdict<T> {
    /// The agent has answered.
    Told(T),
    /// It has not, and is not needed: the pod is not of the mesh. With the reason, and what was wrong with the agent.
    Alone {
        /// Why the pod may go on.
        reason: String,
        /// Why the agent did not say so itself.
        failure: String,
    },
}

/// What was asked, and how often.
#[derive(Debug)]
pub struct Asked<T> {
    /// What came of it.
    pub verdict: Result<Verdict<T>, Refusal>,
    /// How many attempts it took.
    pub attempts: u32,
    /// The last attempt that failed, failed for want of an agent.
    pub away: bool,
}

/// Asks about a pod. `request` makes the body for the time that is left.
pub fn ask<B: Serialize, T: DeserializeOwned>(
    entry: &Entry,
    pod: &PodRef,
    path: &str,
    request: impl Fn(Duration) -> B,
) -> Asked<T> {
    let excluded = entry.excluded_namespaces.contains(&pod.namespace);
    let budget = if excluded {
        entry.budget().min(PATIENCE)
    } else {
        entry.budget()
    };
    let deadline = Instant::now() + budget;
    // Read once: an agent that publishes another one is there, and asked.
    let mut alone: Option<Alone> = None;
    let mut pause = FIRST_PAUSE;
    let (mut attempts, mut away) = (0, false);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        attempts += 1;
        let failure = match client::post(&entry.socket, path, &request(left), deadline) {
            Ok(reply) => {
                return Asked {
                    verdict: Ok(Verdict::Told(reply)),
                    attempts,
                    away,
                };
            }
            Err(failure) => failure,
        };
        away = matches!(failure, Failure::Away { .. });
        let spare = deadline
            .saturating_duration_since(Instant::now())
            .saturating_sub(TOO_LITTLE);
        let over = spare.is_zero();
        let undecided = matches!(&failure, Failure::Refused(refusal) if refusal.undecided);
        let verdict = match failure {
            Failure::Refused(refusal) if !refusal.retry || (over && !excluded && !undecided) => {
                Some(Err(refusal))
            }
            // One that is there but slow, or dying, may know better than its file, so it has the whole budget.
            failure if away || undecided || over || excluded => {
                match alone
                    .get_or_insert_with(|| entry.decide_alone(&pod.namespace, SystemTime::now()))
                {
                    Alone::Start(reason) => Some(Ok(Verdict::Alone {
                        reason: reason.clone(),
                        failure: failure.to_string(),
                    })),
                    Alone::Wait(reason) if over => {
                        Some(Err(waited_for_nothing(entry, pod, &failure, reason)))
                    }
                    Alone::Wait(_) => None,
                }
            }
            _ => None,
        };
        if let Some(verdict) = verdict {
            return Asked {
                verdict,
                attempts,
                away,
            };
        }
        thread::sleep(pause.min(spare));
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// The runtime comes again, and a person reads this in the pod's events.
fn waited_for_nothing(entry: &Entry, pod: &PodRef, failure: &Failure, reason: &str) -> Refusal {
    Refusal::later(
        format!(
            "pod {pod} has to wait for culvert's agent ({} s were not enough): {failure}; without it: {reason}",
            entry.budget_seconds
        ),
        format!(
            "look at culvert's agent pod on this node and its log, and at {}; the pod starts by itself once the agent answers",
            entry.log_file.display()
        ),
    )
}
