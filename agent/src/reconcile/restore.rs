//! From one agent to the next: what is captured is written down, and taken up again where the cluster cannot be asked.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use tokio::time::Instant;

use super::{
    Entry, Reconciler,
    entry::Captured,
    publish::{self, Remembered},
    world::{Target, World},
};
use crate::{
    model::PodUid,
    plan::pod::{Wish, Ztunnel},
};

/// Changes closer together than this are written down as one, but for the first.
const GATHER: Duration = Duration::from_millis(250);

/// What was written down of the captured pods, and when that is done again.
#[derive(Debug, Default)]
pub(super) struct Memory {
    written: Vec<Remembered>,
    not_before: Option<Instant>,
    next: Option<Instant>,
}

impl Memory {
    /// There may be something to write.
    pub(super) fn outdated(&mut self) {
        let now = Instant::now();
        let at = self.not_before.map_or(now, |at| at.max(now));
        self.next.get_or_insert(at);
    }

    /// When it is to be written; never while it is not outdated.
    pub(super) async fn due(&self) {
        match self.next {
            Some(at) => tokio::time::sleep_until(at).await,
            None => std::future::pending().await,
        }
    }
}

impl<W: World> Reconciler<W> {
    /// Takes up the pods of an earlier agent that the kernel still captures. For when nobody says which pods there are:
    /// ztunnel, should it have restarted too, would serve none otherwise.
    pub async fn restore(&self) {
        let remembered: BTreeMap<PodUid, &Remembered> = self
            .inner
            .options
            .remembered
            .iter()
            .map(|r| (r.uid.as_str().into(), r))
            .collect();
        let wanted = remembered.values().map(|r| (target(r), r.cookie)).collect();
        let found: HashMap<_, _> = self.inner.world.recover(wanted).await;
        let mut restored = 0;
        {
            let mut entries = self.entries();
            for (uid, place) in found {
                let Some(remembered) = remembered.get(&uid) else {
                    continue;
                };
                if entries.contains_key(&uid) || !self.inner.world.captured(&place) {
                    continue;
                }
                let mut entry = Entry::new(target(remembered));
                entry.move_to(place, remembered.sandbox.clone());
                entry.wish = Wish::In;
                // As it was captured it stays until the cluster says otherwise.
                entry.captured = Some(match &remembered.policy {
                    Some(policy) => {
                        entry.policy = policy.clone();
                        Captured::Somehow
                    }
                    None => Captured::As(entry.policy.clone()),
                });
                entry.annotation = remembered
                    .served
                    .then_some(crate::model::Redirection::Enabled);
                entry.ahead_of_watch = Some(Instant::now());
                self.inner.world.expect(&entry.target);
                entries.insert(uid, entry);
                restored += 1;
            }
        }
        tracing::warn!(
            restored,
            "nobody says which pods there are: those captured before stay captured"
        );
        self.wake();
    }

    /// The runtime's name for a namespace that an earlier agent got from the plugin.
    pub(super) fn remembered_sandbox(&self, place: &W::Place) -> Option<String> {
        let cookie = self.inner.world.cookie(place);
        let mut remembered = self.inner.options.remembered.iter();
        remembered.find(|r| r.cookie == cookie)?.sandbox.clone()
    }

    /// Writes down what is captured, if that changed.
    pub(super) async fn write_down(&self, memory: &mut Memory) {
        memory.next = None;
        let Some(path) = &self.inner.options.memory else {
            return;
        };
        let now: Vec<Remembered> = {
            let entries = self.entries();
            let captured = entries.values().filter(|e| e.captured.is_some());
            captured
                .filter_map(|e| {
                    Some(Remembered {
                        cookie: self.inner.world.cookie(e.place.as_ref()?),
                        uid: e.target.uid.to_string(),
                        static_uid: e.target.static_uid.as_ref().map(ToString::to_string),
                        namespace: e.target.namespace.clone(),
                        name: e.target.name.clone(),
                        service_account: e.target.service_account.clone(),
                        sandbox: e.sandbox.clone(),
                        served: matches!(e.ztunnel, Ztunnel::Acked | Ztunnel::Away),
                        policy: match &e.captured {
                            Some(Captured::As(policy)) if !e.released => Some(policy.clone()),
                            _ => None,
                        },
                    })
                })
                .collect()
        };
        if memory.written == now {
            return;
        }
        let file = path.clone();
        // It waits for a disk, and the plugin must not wait with it.
        let done =
            tokio::task::spawn_blocking(move || publish::remember(&file, &now).map(|()| now));
        match done.await.unwrap_or_else(|error| Err(error.into())) {
            Ok(now) => {
                memory.written = now;
                memory.not_before = Some(Instant::now() + GATHER);
            }
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "writing down which pods are captured")
            }
        }
    }
}

fn target(remembered: &Remembered) -> Target {
    Target {
        uid: remembered.uid.as_str().into(),
        static_uid: remembered.static_uid.as_deref().map(PodUid::from),
        namespace: remembered.namespace.clone(),
        name: remembered.name.clone(),
        service_account: remembered.service_account.clone(),
    }
}
