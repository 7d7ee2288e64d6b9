//! What the plugin asks of a pod: be safe before it starts, be let go when it ends, be whole in between.
//!
//! The same steps as for any other pod, taken while the runtime waits.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{
    Entry, Reconciler,
    pass::target,
    steps::Goal,
    world::{Failure, World},
};
use crate::{
    model::{Namespace, Pod, PodUid},
    plan::{
        membership::{self, Membership, Waiting},
        pod::{Kernel, Wish, Ztunnel},
    },
};

/// Pause between two tries while the runtime waits.
const PAUSE: Duration = Duration::from_millis(100);

/// What became of a new pod.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Answer {
    /// It is in the mesh: captured, and ztunnel serves it. With the time each took.
    Enrolled {
        /// The kernel's side.
        kernel: Duration,
        /// From telling ztunnel to its acknowledgement.
        ztunnel: Duration,
    },
    /// It is not in the mesh, for this reason, and may start.
    Outside(String),
}

impl<W: World> Reconciler<W> {
    /// Enrols a pod whose first container waits for this.
    ///
    /// `sandbox` is the runtime's name for this attachment of it. May be given up at any await: what was begun is finished by the passes.
    pub async fn add(
        &self,
        pod: &Pod,
        namespace: Option<&Namespace>,
        place: W::Place,
        sandbox: &str,
        deadline: Instant,
    ) -> Result<Answer, Failure> {
        let wanted = match membership::decide(pod, namespace, &self.inner.options.settings) {
            // The namespace itself says which addresses it has.
            Membership::In(wanted) | Membership::Wait(Waiting::Address(wanted)) => wanted,
            Membership::Out(why) => return Ok(Answer::Outside(why.to_string())),
            Membership::Wait(why) => {
                return Err(Failure {
                    message: why.to_string(),
                    retry: true,
                });
            }
            Membership::Refused(why) => {
                return Err(Failure {
                    message: why.to_string(),
                    retry: false,
                });
            }
        };
        let policy = self.inner.options.policy(&wanted);
        let place = Arc::new(place);
        loop {
            let moved_from = {
                let mut entries = self.entries();
                let entry = entries
                    .entry(pod.uid.clone())
                    .or_insert_with(|| Entry::new(target(pod)));
                if entry.busy {
                    None
                } else {
                    if !self.inner.cluster.borrow().pods.contains_key(&pod.uid) {
                        entry.ahead_of_watch = Some(Instant::now());
                    }
                    entry.new = true;
                    entry.wish = Wish::In;
                    entry.policy = policy.clone();
                    entry.trouble = None;
                    let same = entry.place.as_ref().is_some_and(|p| self.same(p, &place));
                    let old = (!same)
                        .then(|| {
                            let old = entry.place.take();
                            entry.move_to(Arc::clone(&place), Some(sandbox.to_owned()));
                            old
                        })
                        .flatten();
                    // Added again before its DEL was acted upon: there is nothing to let go any more.
                    if entry.ended.take().is_some() {
                        entry.sandbox = None;
                    }
                    // A further interface of the same pod goes and comes without the pod.
                    entry.sandbox.get_or_insert_with(|| sandbox.to_owned());
                    entry.busy = true;
                    entry.journey.asked_for();
                    Some((entry.target.clone(), old))
                }
            };
            let Some((target, old)) = moved_from else {
                self.wait_for_turn(&pod.uid, deadline).await?;
                continue;
            };
            // A sandbox made anew under the same UID: the old one is dead.
            if let Some(old) = old
                && let Err(failure) = self.inner.world.forget(&target, old).await
            {
                tracing::warn!(pod = %target, %failure, "clearing away the sandbox before this one");
            }
            let (this, uid) = (self.clone(), pod.uid.clone());
            // Goes on when the plugin is killed meanwhile.
            let drive = tokio::spawn(async move { this.drive(&uid, Goal::Served).await });
            if tokio::time::timeout_at(deadline, drive).await.is_err() {
                return Err(late());
            }
            let failure = {
                let entries = self.entries();
                let Some(entry) = entries.get(&pod.uid) else {
                    return Err(Failure {
                        message: "the pod was deleted while it was being added".to_owned(),
                        retry: false,
                    });
                };
                let so = entry.observed(Instant::now());
                if (so.kernel, so.ztunnel) == (Kernel::In, Ztunnel::Acked) {
                    let [kernel, ztunnel] = entry.took;
                    return Ok(Answer::Enrolled { kernel, ztunnel });
                }
                entry.trouble.as_ref().map(|t| t.failure.clone())
            };
            match failure {
                Some(failure) if !failure.retry || Instant::now() + PAUSE >= deadline => {
                    return Err(failure);
                }
                _ => tokio::time::sleep(PAUSE).await,
            }
        }
    }

    fn same(&self, one: &W::Place, other: &W::Place) -> bool {
        self.inner.world.cookie(one) == self.inner.world.cookie(other)
    }

    /// Waits until nobody is at a pod.
    async fn wait_for_turn(&self, uid: &PodUid, deadline: Instant) -> Result<(), Failure> {
        loop {
            let progress = self.inner.progress.notified();
            tokio::pin!(progress);
            progress.as_mut().enable();
            if self.entries().get(uid).is_none_or(|e| !e.busy) {
                return Ok(());
            }
            if tokio::time::timeout_at(deadline, progress).await.is_err() {
                return Err(late());
            }
        }
    }

    /// The runtime takes an attachment down. True if a pod had it in use: one that came after it under the same UID
    /// stays.
    pub fn del(&self, sandbox: &str) -> bool {
        let mut entries = self.entries();
        let Some(entry) = entries
            .values_mut()
            .find(|e| e.sandbox.as_deref() == Some(sandbox))
        else {
            return false;
        };
        entry.ahead_of_watch = None;
        entry.wish = Wish::Gone;
        let cookie = entry.place.as_ref().map(|p| self.inner.world.cookie(p));
        entry.ended = Some(cookie.unwrap_or_default());
        entry.look_again = None;
        entry.trouble = None;
        drop(entries);
        self.wake();
        true
    }

    /// Of the attachments that `ours` selects only `living` are left; others are let go. Returns how many.
    pub fn gc(&self, ours: impl Fn(&str) -> bool, living: &BTreeSet<String>) -> usize {
        let known: Vec<String> = {
            let entries = self.entries();
            entries.values().filter_map(|e| e.sandbox.clone()).collect()
        };
        let dead = known.iter().filter(|s| ours(s) && !living.contains(*s));
        dead.filter(|s| self.del(s)).count()
    }

    /// Is this pod, in this namespace, as the plugin was told it is? The reason if not; none, while that is not known.
    pub async fn check(&self, uid: &PodUid, place: &W::Place) -> Option<Result<Answer, Failure>> {
        let known = self
            .entries()
            .iter()
            .any(|(key, e)| is_called(key, e, uid) && e.wish != Wish::Keep);
        if !known && !*self.inner.settled.borrow() {
            return None;
        }
        Some(self.checked(uid, place).await)
    }

    async fn checked(&self, uid: &PodUid, place: &W::Place) -> Result<Answer, Failure> {
        let failed = |message: String| Failure {
            message,
            retry: true,
        };
        let known = {
            let entries = self.entries();
            let Some((_, entry)) = entries.iter().find(|(key, e)| is_called(key, e, uid)) else {
                return Ok(Answer::Outside("not in the mesh".to_owned()));
            };
            if entry.wish != Wish::In {
                return Ok(Answer::Outside(entry.reason.clone()));
            }
            let Some(known) = entry.place.clone() else {
                return Err(failed("it was not added, or was let go".to_owned()));
            };
            if !self.same(&known, place) {
                return Err(failed(
                    "it was added in another network namespace than this one".to_owned(),
                ));
            }
            let so = entry.observed(Instant::now());
            match (so.kernel, so.ztunnel) {
                (Kernel::In, Ztunnel::Acked) => {}
                (Kernel::In, _) => {
                    return Err(failed(
                        "captured, but ztunnel does not serve it yet".to_owned(),
                    ));
                }
                _ if entry.broken.is_some() => return Err(failed(entry.reason.clone())),
                _ => {
                    return Err(failed(
                        "not captured, or not as its annotations ask for".to_owned(),
                    ));
                }
            }
            known
        };
        match self.inner.world.examine(known).await? {
            Some(problem) => {
                self.wake();
                Err(failed(problem))
            }
            None => Ok(Answer::Enrolled {
                kernel: Duration::ZERO,
                ztunnel: Duration::ZERO,
            }),
        }
    }
}

/// On the node, a static pod goes by its configuration's hash.
fn is_called<P>(key: &PodUid, entry: &Entry<P>, uid: &PodUid) -> bool {
    key == uid || entry.target.static_uid.as_ref() == Some(uid)
}

fn late() -> Failure {
    Failure {
        message: "the time the runtime gives for adding a pod is over; the pod will be tried again"
            .to_owned(),
        retry: true,
    }
}
