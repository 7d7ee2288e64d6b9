//! Taking one pod from step to step until it rests, fails or has come as far as was asked.
//!
//! The order comes from [`crate::plan::pod`]. One task at a time has a pod (its `busy` flag); every outcome is noted
//! before the next step is chosen.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::time::Instant;

use super::{
    Reconciler,
    entry::Captured,
    world::{Failure, Left, Notice, Target, World},
};
use crate::{
    kernel::{pod::Policy, verify::Repair},
    model::PodUid,
    plan::pod::{Step, Wish, Ztunnel, next},
};

/// How far to go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Goal {
    /// Until there is nothing left to do.
    Rest,
    /// Until ztunnel serves the pod; what only others have to learn is left to the next pass.
    Served,
}

/// One step with all it needs.
struct Job<P> {
    step: Step,
    /// How often ztunnels had come or gone.
    ztunnels: u64,
    target: Target,
    place: Option<Arc<P>>,
    policy: Policy,
    released: bool,
    repair: Option<Repair>,
    unsure: bool,
    may_be_starting: bool,
}

/// What a step led to.
enum Outcome {
    Done,
    Left(Left),
    /// Its processes have not ended: nothing was done.
    Lingers,
}

/// The right to work on pods that are marked busy: given back however the work ends, also by a panic.
pub(super) struct Turn<'a, W: World> {
    reconciler: &'a Reconciler<W>,
    uids: Vec<PodUid>,
}

impl<'a, W: World> Turn<'a, W> {
    pub(super) fn new(reconciler: &'a Reconciler<W>, uids: Vec<PodUid>) -> Self {
        Self { reconciler, uids }
    }
}

impl<W: World> Drop for Turn<'_, W> {
    fn drop(&mut self) {
        let mut entries = self.reconciler.entries();
        for uid in &self.uids {
            if let Some(entry) = entries.get_mut(uid) {
                entry.busy = false;
            }
        }
        drop(entries);
        self.reconciler.inner.progress.notify_waiters();
        self.reconciler.wake();
    }
}

impl<W: World> Reconciler<W> {
    /// Drives a pod that the caller has marked busy.
    pub(super) async fn drive(&self, uid: &PodUid, goal: Goal) {
        let _turn = Turn::new(self, vec![uid.clone()]);
        while let Some(job) = self.next_job(uid, goal) {
            let started = Instant::now();
            let outcome = self.perform(&job).await;
            if !self.note(uid, &job, outcome, started.elapsed()).await {
                break;
            }
        }
    }

    fn next_job(&self, uid: &PodUid, goal: Goal) -> Option<Job<W::Place>> {
        let entries = self.entries();
        let entry = entries.get(uid)?;
        let now = Instant::now();
        let mut so = entry.observed(now);
        so.mute |= goal == Goal::Served;
        let step = next(entry.wish, so);
        let rest = match step {
            Step::Done | Step::Find => true,
            Step::Annotate(_) => false,
            _ => !entry.due(now),
        };
        (!rest).then(|| Job {
            step,
            ztunnels: self.inner.ztunnels.load(Ordering::Relaxed),
            target: entry.target.clone(),
            place: entry.place.clone(),
            policy: entry.policy.clone(),
            released: entry.released,
            repair: match entry.broken {
                Some(kind) if entry.wish == Wish::In => Some(Repair {
                    kind,
                    what: entry.reason.clone(),
                }),
                _ => None,
            },
            unsure: entry.unsure(),
            may_be_starting: entry.may_be_starting(now),
        })
    }

    async fn perform(&self, job: &Job<W::Place>) -> Result<Outcome, Failure> {
        let world = &self.inner.world;
        let target = &job.target;
        let place = || {
            job.place.clone().ok_or_else(|| Failure {
                message: "the pod's network namespace is not known".to_owned(),
                retry: true,
            })
        };
        // Waiting for ztunnel takes nobody's turn.
        let _turn = match job.step {
            Step::Tell | Step::Untell => None,
            _ => self.inner.work.acquire().await.ok(),
        };
        match job.step {
            Step::Attach => {
                world.attach(target, place()?, job.policy.clone()).await?;
            }
            Step::Tell => world.tell(target, place()?).await?,
            Step::Annotate(value) => world.annotate(target, value).await?,
            Step::Release => return world.release(target, place()?).await.map(Outcome::Left),
            Step::Wait if job.released => {
                return world.release(target, place()?).await.map(Outcome::Left);
            }
            Step::Detach | Step::Wait => {
                return world.detach(target, place()?).await.map(Outcome::Left);
            }
            Step::Untell => world.untell(target).await?,
            Step::Forget
                if job.unsure && (job.may_be_starting || world.inhabited(place()?).await) =>
            {
                return Ok(Outcome::Lingers);
            }
            Step::Forget => world.forget(target, place()?).await?,
            Step::Find | Step::Done => {}
        }
        Ok(Outcome::Done)
    }

    /// Writes down what came of a step; false when the pod is to be left alone for now.
    async fn note(
        &self,
        uid: &PodUid,
        job: &Job<W::Place>,
        outcome: Result<Outcome, Failure>,
        took: Duration,
    ) -> bool {
        let mut notice = None;
        let go_on = {
            let mut entries = self.entries();
            let Some(entry) = entries.get_mut(uid) else {
                return false;
            };
            let moved = match (&entry.place, &job.place) {
                (Some(now), Some(then)) => !Arc::ptr_eq(now, then),
                _ => false,
            };
            let repair = job.repair.is_some();
            let failure = outcome.as_ref().err();
            let cookie = |place: &W::Place| self.inner.world.cookie(place);
            // Who was served before is not on a way into the mesh.
            let again = job.step == Step::Tell && entry.announced && failure.is_none();
            if !again || entry.journey.is("repair") {
                entry.trace_step(job.step, repair, took, failure, cookie);
            }
            match outcome {
                // It is in another namespace by now: this says nothing about that one.
                _ if moved => true,
                Ok(outcome) => {
                    if matches!(job.step, Step::Annotate(_)) {
                        entry.mute = None;
                    } else {
                        entry.trouble = None;
                    }
                    match (job.step, outcome) {
                        (Step::Attach, _) => {
                            entry.captured = Some(Captured::As(job.policy.clone()));
                            entry.took[0] = took;
                            entry.broken = None;
                            entry.draining = 0;
                            entry.released = false;
                            entry.reason.clear();
                            notice = job.repair.clone().map(Notice::Repaired);
                            if job.repair.is_some() && entry.ztunnel == Ztunnel::Acked {
                                // Whoever took the rest away took ztunnel's listeners from the maps as well.
                                entry.ztunnel = Ztunnel::Waiting;
                            }
                        }
                        (Step::Tell, _) => {
                            let now = self.inner.ztunnels.load(Ordering::Relaxed);
                            entry.ztunnel = if job.ztunnels == now {
                                Ztunnel::Acked
                            } else {
                                // Whoever acknowledged it may be gone, or no longer the one that counts.
                                Ztunnel::Waiting
                            };
                            entry.said = None;
                            if !std::mem::replace(&mut entry.announced, true) {
                                entry.took[1] = took;
                                notice = Some(Notice::Enrolled(entry.took.iter().sum()));
                            }
                        }
                        (Step::Annotate(value), _) => entry.annotation = value,
                        (Step::Untell, _) => entry.ztunnel = Ztunnel::Untold,
                        // Captured until its last process has ended, or the runtime says that it takes it down.
                        (_, Outcome::Lingers) => entry.failed(lingers(), Instant::now()),
                        (Step::Forget, _) => {
                            notice = entry.captured.take().map(|_| Notice::Ended);
                            entry.draining = 0;
                            entry.released = false;
                            entry.announced = false;
                            entry.place = None;
                        }
                        (Step::Release | Step::Detach | Step::Wait, Outcome::Left(left)) => {
                            let released =
                                job.step == Step::Release || job.step == Step::Wait && job.released;
                            if released && !entry.released {
                                notice = Some(Notice::Unenrolled);
                            }
                            entry.released = released;
                            entry.announced = false;
                            if !released {
                                entry.captured = None;
                            }
                            entry.broken = None;
                            entry.draining = match left {
                                Left::Nothing => 0,
                                Left::Connections(n) => n.max(1),
                            };
                        }
                        _ => {}
                    }
                    job.step != Step::Wait || entry.draining == 0
                }
                Err(failure) => {
                    notice = entry.worth_saying(&failure);
                    match job.step {
                        Step::Annotate(_) => entry.muted(failure, Instant::now()),
                        step => {
                            if step == Step::Tell {
                                entry.ztunnel = Ztunnel::Waiting;
                            }
                            entry.failed(failure, Instant::now());
                        }
                    }
                    true
                }
            }
        };
        if let Some(notice) = notice {
            self.inner.world.say(&job.target, notice).await;
        }
        go_on
    }
}

/// Why a pod that is gone is still captured.
fn lingers() -> Failure {
    Failure {
        message: "deleted, but its processes have not ended: it stays captured until they have"
            .to_owned(),
        retry: true,
    }
}
