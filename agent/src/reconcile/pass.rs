//! One look at everything: what each pod should be, what is in the way, who is worked on next.
//!
//! Decides through [`crate::plan`]; the work itself is in [`super::steps`].

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::time::Instant;

use super::{
    Entry, Reconciler,
    condition::Writing,
    entry::Captured,
    steps::{Goal, Turn},
    world::{Failure, Notice, Target, World},
};
use crate::{
    model::{Cluster, Phase, Pod, PodUid, Redirection, keys},
    plan::{
        membership::{self, Membership, Reason, Waiting},
        network_policy,
        pod::{Step, Wish, Ztunnel, next},
    },
};

/// How long a pod that the plugin brought may be missing from the watch.
const WATCH_LAG: Duration = Duration::from_secs(60);

/// A pod that starts has no process for a moment; one that was not found so often is worth a word.
const UNFOUND: u32 = 5;
/// Pause between two looks for a pod whose addresses changed.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// Pause between two looks for another sandbox of a pod whose own was taken down. The runtime brings the next one to the
/// plugin; one that starts while something else has our entry out of the CNI configuration it brings to nobody.
const LOOK_FOR_NEXT: Duration = Duration::from_secs(10);

/// What a pass found to do.
struct Todo {
    notices: Vec<(Target, Notice)>,
    drive: Vec<PodUid>,
    find: Vec<(Target, Vec<IpAddr>)>,
    conditions: Vec<Writing>,
}

impl<W: World> Reconciler<W> {
    /// Compares and sets to work; before the cluster is listed, only on what was restored. With `full` the kernel is asked
    /// whether it is still as it was left.
    /// Without `changed` the cluster is as it was at the last pass.
    pub(super) async fn pass(&self, full: bool, changed: bool) {
        let listed = self.inner.cluster.borrow().listed;
        let first = listed && !self.inner.adopted.swap(listed, Ordering::Relaxed);
        if full || first {
            self.verify().await;
        }
        if listed && (full || first) {
            self.adopt().await;
        }
        let todo = self.look(full, changed);
        for (target, notice) in todo.notices {
            let this = self.clone();
            tokio::spawn(async move { this.inner.world.say(&target, notice).await });
        }
        for uid in todo.drive {
            let this = self.clone();
            tokio::spawn(async move { this.drive(&uid, Goal::Rest).await });
        }
        for writing in todo.conditions {
            let this = self.clone();
            tokio::spawn(async move { this.write_condition(writing).await });
        }
        if !todo.find.is_empty() {
            let this = self.clone();
            tokio::spawn(async move { this.find(todo.find).await });
        }
    }

    /// Asks the kernel about the pods it is believed to capture.
    async fn verify(&self) {
        let places: Vec<_> = {
            let entries = self.entries();
            let captured = entries
                .iter()
                .filter(|(_, e)| e.captured.is_some() && !e.busy);
            captured
                .filter_map(|(uid, e)| Some((uid.clone(), Arc::clone(e.place.as_ref()?))))
                .collect()
        };
        for (uid, problem) in self.inner.world.verify(places).await {
            if let Some(entry) = self.entries().get_mut(&uid)
                && !entry.busy
            {
                tracing::warn!(pod = %entry.target, problem = problem.what, "not as it was left");
                entry.broken = Some(problem.kind);
                entry.reason = problem.what;
            }
        }
    }

    /// Lays claim to what an earlier agent, or a person, had the kernel capture.
    async fn adopt(&self) {
        let known: Vec<_> = {
            let entries = self.entries();
            let held = entries
                .values()
                .filter(|e| e.captured.is_some() || e.draining > 0 || e.busy);
            held.filter_map(|e| e.place.clone()).collect()
        };
        let mut strays = self.inner.world.strays(&known);
        if strays > 0 {
            // Those whose namespace is gone nobody will ever claim.
            self.inner.world.collect().await;
            strays = self.inner.world.strays(&known);
        }
        let seen = |now: usize| {
            let mut unclaimed = self
                .inner
                .unclaimed
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            std::mem::replace(&mut *unclaimed, now)
        };
        if strays == 0 || strays == seen(strays) {
            seen(strays);
            return;
        }
        let candidates: Vec<(Target, Vec<IpAddr>)> = {
            let (cluster, entries) = (self.inner.cluster.borrow(), self.entries());
            let pods = cluster.pods.values().filter(|p| !p.host_network);
            pods.filter(|p| entries.get(&p.uid).is_none_or(|e| e.place.is_none()))
                .map(|p| (target(p), p.addresses.iter().copied().collect()))
                .collect()
        };
        let found = match self.inner.world.find(candidates.clone()).await {
            Ok(found) => found,
            Err(failure) => {
                tracing::warn!(%failure, "looking for the pods of captured namespaces");
                seen(0);
                return;
            }
        };
        for (target, _) in candidates {
            let Some(place) = found.get(&target.uid) else {
                self.keep_for_later(target);
                continue;
            };
            if !self.inner.world.captured(place) {
                continue;
            }
            let mut entries = self.entries();
            let entry = entries
                .entry(target.uid.clone())
                .or_insert_with(|| Entry::new(target));
            if !entry.busy && entry.place.is_none() {
                let sandbox = self.remembered_sandbox(place);
                entry.move_to(Arc::clone(place), sandbox);
                entry.captured = Some(Captured::Somehow);
                // Should it have to leave: ztunnel still carries its connections, and lets go of whom no snapshot names.
                entry.ztunnel = Ztunnel::Waiting;
                self.inner.world.expect(&entry.target);
            }
        }
    }

    /// Some namespaces are captured that no pod can be found for. One of them may be that of a pod whose address is not
    /// shown yet, because the plugin brought it just before the agent before this one ended: it runs, and ztunnel, which
    /// may serve it, must not let it go.
    fn keep_for_later(&self, target: Target) {
        let waits = {
            let cluster = self.inner.cluster.borrow();
            cluster.pods.get(&target.uid).is_some_and(|pod| {
                let namespace = cluster.namespaces.get(&pod.namespace);
                let settings = &self.inner.options.settings;
                let membership = membership::decide(pod, namespace, settings);
                matches!(membership, Membership::Wait(Waiting::Address(_)))
            })
        };
        let mut entries = self.entries();
        if waits && !entries.contains_key(&target.uid) {
            let mut entry = Entry::new(target);
            entry.ztunnel = Ztunnel::Waiting;
            self.inner.world.expect(&entry.target);
            entries.insert(entry.target.uid.clone(), entry);
        }
    }

    /// Brings every entry's wish up to date and picks those with something to do.
    fn look(&self, full: bool, changed: bool) -> Todo {
        let cluster = self.inner.cluster.borrow();
        let mut entries = self.entries();
        let now = Instant::now();
        let mut notices = Vec::new();
        if full || changed {
            for pod in cluster.pods.values() {
                self.wish(&mut entries, &cluster, pod, &mut notices);
            }
        } else {
            // A pass follows whatever happens to one pod, while a new one waits: the others' labels say what they said.
            let new = entries.values().filter(|e| e.new);
            let new: Vec<&Pod> = new
                .filter_map(|e| cluster.pods.get(&e.target.uid))
                .collect();
            for pod in new {
                self.wish(&mut entries, &cluster, pod, &mut notices);
            }
        }
        for (uid, entry) in entries.iter_mut() {
            let absent = cluster.listed && !cluster.pods.contains_key(uid);
            entry.absent = absent.then(|| entry.absent.unwrap_or(now));
            if absent {
                let lag = entry
                    .ahead_of_watch
                    .is_some_and(|since| now - since < WATCH_LAG);
                if !lag {
                    entry.wish = Wish::Gone;
                }
            }
        }
        let mut todo = Todo {
            notices,
            drive: Vec::new(),
            find: Vec::new(),
            conditions: Self::conditions(&mut entries, now),
        };
        let mut done = Vec::new();
        for (uid, entry) in entries.iter_mut().filter(|(_, e)| !e.busy) {
            if entry.looked_for() && entry.look_again.is_some_and(|at| at <= now) {
                entry.busy = true;
                todo.find.push((
                    entry.target.clone(),
                    entry.addresses.iter().copied().collect(),
                ));
                continue;
            }
            match next(entry.wish, entry.observed(now)) {
                Step::Done => {
                    entry.trouble = None;
                    entry.journey.rests();
                    let unwritten =
                        matches!(entry.wish, Wish::Out | Wish::Ended) && entry.annotation.is_some();
                    let unwritten = unwritten || entry.condition.stands();
                    let remembered =
                        entry.ended.is_some() || !entry.warnings.is_empty() || unwritten;
                    let needed = remembered && cluster.pods.contains_key(uid);
                    let leaves = matches!(entry.wish, Wish::Out | Wish::Ended | Wish::Gone);
                    if leaves && !needed {
                        done.push(uid.clone());
                    }
                }
                Step::Wait if !full && entry.trouble.is_none() => {}
                Step::Find if entry.due(now) => {
                    entry.busy = true;
                    self.inner.world.expect(&entry.target);
                    // Should it never be found, it is to be taken back.
                    entry.ztunnel = Ztunnel::Waiting;
                    todo.find.push((
                        entry.target.clone(),
                        entry.addresses.iter().copied().collect(),
                    ));
                }
                Step::Find => {}
                step if matches!(step, Step::Annotate(_)) || entry.due(now) => {
                    entry.busy = true;
                    todo.drive.push(uid.clone());
                }
                _ => {}
            }
        }
        for uid in done {
            entries.remove(&uid);
        }
        let unplaced =
            |e: &Entry<W::Place>| e.wish == Wish::In && e.place.is_none() && e.trouble.is_none();
        if cluster.listed && !entries.values().any(unplaced) {
            self.inner
                .settled
                .send_if_modified(|settled| !std::mem::replace(settled, true));
        }
        todo
    }

    /// What this pod should be.
    fn wish(
        &self,
        entries: &mut BTreeMap<PodUid, Entry<W::Place>>,
        cluster: &Cluster,
        pod: &Pod,
        notices: &mut Vec<(Target, Notice)>,
    ) {
        let membership = membership::decide(
            pod,
            cluster.namespaces.get(&pod.namespace),
            &self.inner.options.settings,
        );
        let annotation = redirection(pod);
        let refused = matches!(membership, Membership::Refused(_));
        let mut cut_off = Vec::new();
        let (wish, policy, reason, mut warnings) = match membership {
            Membership::In(wanted) => {
                if let Some(policies) = cluster.policies.get(&pod.namespace) {
                    let policies = policies.iter().map(|(name, p)| (name.as_str(), p));
                    cut_off = network_policy::in_the_way(&pod.labels, policies);
                }
                let policy = self.inner.options.policy(&wanted);
                let reason = String::new();
                (Some(Wish::In), Some(policy), reason, wanted.warnings)
            }
            Membership::Wait(why) => (None, None, why.to_string(), Vec::new()),
            Membership::Refused(why) => (
                Some(Wish::Out),
                None,
                why.to_string(),
                vec![why.to_string()],
            ),
            Membership::Out(why @ Reason::Ended) => {
                (Some(Wish::Ended), None, why.to_string(), Vec::new())
            }
            Membership::Out(why) => (Some(Wish::Out), None, why.to_string(), Vec::new()),
        };
        let member = wish == Some(Wish::In) || !warnings.is_empty();
        // Pods outside the mesh, most of them maybe, cost nothing.
        let marked = annotation.is_some() || pod.uncaptured.is_some();
        if !entries.contains_key(&pod.uid) && !member && !marked {
            return;
        }
        let entry = entries
            .entry(pod.uid.clone())
            .or_insert_with(|| Entry::new(target(pod)));
        entry.ahead_of_watch = None;
        entry.new = false;
        entry.condition.show(pod.uncaptured.as_ref());
        if entry.shown_annotation != annotation {
            if annotation.is_none() && entry.annotation.is_some() && wish == Some(Wish::In) {
                notices.push((entry.target.clone(), Notice::Reannotated));
            }
            entry.shown_annotation = annotation;
            entry.annotation = annotation;
        }
        let wish = match wish {
            // Of most pods that are deleted this is the last that is shown. Nobody reaches them any more, and the
            // annotation goes with the object: a request for each would be a roll-out's every second.
            Some(Wish::Ended) if pod.deleting => Wish::Gone,
            // The runtime takes down the sandbox of a Job's pod, too.
            Some(Wish::Ended) => Wish::Ended,
            _ if entry.ended.is_some() => {
                let lives = !pod.deleting && matches!(pod.phase, Phase::Pending | Phase::Running);
                if wish == Some(Wish::In) && lives {
                    let soon = Instant::now() + LOOK_FOR_NEXT;
                    entry.look_again.get_or_insert(soon);
                } else {
                    entry.look_again = None;
                }
                Wish::Gone
            }
            Some(wish) => wish,
            None => entry.wish,
        };
        let policy = policy.unwrap_or_else(|| entry.policy.clone());
        if entry.addresses != pod.addresses && !entry.addresses.is_empty() && entry.place.is_some()
        {
            entry.look_again = Some(Instant::now());
        }
        if entry.wish != wish || entry.policy != policy || entry.addresses != pod.addresses {
            entry.trouble = None;
            entry.mute = None;
            entry.addresses.clone_from(&pod.addresses);
        }
        let ignored = warnings.len();
        warnings.append(&mut cut_off);
        for (i, warning) in warnings
            .iter()
            .enumerate()
            .filter(|(_, w)| !entry.warnings.contains(w))
        {
            let notice = if refused {
                Notice::Refused(warning.clone())
            } else if i >= ignored {
                Notice::CutOff(warning.clone())
            } else {
                Notice::Ignored(warning.clone())
            };
            notices.push((entry.target.clone(), notice));
        }
        (entry.wish, entry.policy, entry.warnings) = (wish, policy, warnings);
        entry.refused = refused;
        if entry.broken.is_none() {
            entry.reason = reason;
        }
    }

    /// Looks for the namespaces of several pods in one go.
    async fn find(&self, pods: Vec<(Target, Vec<IpAddr>)>) {
        let turn = Turn::new(self, pods.iter().map(|(t, _)| t.uid.clone()).collect());
        let result = self.inner.world.find(pods.clone()).await;
        let now = Instant::now();
        let (mut left, mut said) = (Vec::new(), Vec::new());
        {
            let mut entries = self.entries();
            for (target, _) in pods {
                let Some(entry) = entries.get_mut(&target.uid) else {
                    continue;
                };
                match &result {
                    _ if entry.ended.is_some() => {
                        let place = result.as_ref().ok().and_then(|f| f.get(&target.uid));
                        self.begin_anew(entry, place);
                    }
                    Ok(found) if entry.look_again.is_some() && entry.place.is_some() => {
                        match found.get(&target.uid) {
                            Some(place) => left.extend(self.follow(entry, place)),
                            // What is known is kept until something better is.
                            None => entry.look_again = Some(now + LOOK_AGAIN),
                        }
                    }
                    Err(_) if entry.look_again.is_some() && entry.place.is_some() => {
                        entry.look_again = Some(now + LOOK_AGAIN);
                    }
                    // The plugin may have been faster.
                    _ if entry.place.is_some() => {}
                    Ok(found) => match found.get(&target.uid) {
                        Some(place) => {
                            let sandbox = self.remembered_sandbox(place);
                            entry.move_to(Arc::clone(place), sandbox);
                        }
                        None => entry.failed(
                            Failure {
                                message: "no running process of the pod was found: it is starting, or its cgroup path does \
                                          not hold its UID"
                                    .to_owned(),
                                retry: true,
                            },
                            now,
                        ),
                    },
                    Err(failure) => entry.failed(failure.clone(), now),
                }
                if let Some(trouble) = entry.trouble.clone()
                    && trouble.tries >= UNFOUND
                {
                    said.extend(
                        entry
                            .worth_saying(&trouble.failure)
                            .map(|notice| (target, notice)),
                    );
                }
            }
        }
        drop(turn);
        for (target, notice) in said {
            self.inner.world.say(&target, notice).await;
        }
        for (target, place) in left {
            if let Err(failure) = self.inner.world.forget(&target, place).await {
                tracing::warn!(pod = %target, %failure, "clearing away the namespace the pod was in before");
            }
        }
    }

    /// Takes a pod up again whose sandbox was taken down, if it has another one by now.
    fn begin_anew(&self, entry: &mut Entry<W::Place>, place: Option<&Arc<W::Place>>) {
        // Its last processes may still be there when the runtime says that it takes the sandbox down.
        let another = place.filter(|p| entry.ended != Some(self.inner.world.cookie(p)));
        let Some(place) = another else {
            entry.look_again = Some(Instant::now() + LOOK_FOR_NEXT);
            return;
        };
        tracing::warn!(pod = %entry.target, "its sandbox was made anew and nobody asked the plugin");
        let sandbox = self.remembered_sandbox(place);
        entry.move_to(Arc::clone(place), sandbox);
        entry.new = true;
    }

    /// Goes with a pod whose addresses changed; what it left behind, if it is in another namespace now.
    fn follow(
        &self,
        entry: &mut Entry<W::Place>,
        place: &Arc<W::Place>,
    ) -> Option<(Target, Arc<W::Place>)> {
        entry.look_again = None;
        let cookie = |p: &W::Place| self.inner.world.cookie(p);
        let before = entry
            .place
            .take_if(|before| cookie(before) != cookie(place))?;
        let sandbox = self.remembered_sandbox(place);
        entry.move_to(Arc::clone(place), sandbox);
        Some((entry.target.clone(), before))
    }
}

pub(super) fn target(pod: &Pod) -> Target {
    Target {
        uid: pod.uid.clone(),
        static_uid: pod.static_uid.clone(),
        namespace: pod.namespace.clone(),
        name: pod.name.clone(),
        service_account: pod.service_account.clone(),
    }
}

fn redirection(pod: &Pod) -> Option<Redirection> {
    match pod.annotations.get(keys::REDIRECTION)?.as_str() {
        "enabled" => Some(Redirection::Enabled),
        // Whatever else stands there is not ours, and is replaced or removed like it.
        _ => Some(Redirection::Pending),
    }
}
