//! Kubernetes events on pods and nodes: written beside the work, merged when they repeat, and never a flood.
//!
//! A pod that fails every second makes one event whose count rises, at ever longer intervals. What is too much even so
//! is dropped and counted.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher as _},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use k8s_openapi::{
    api::{
        core::v1::{ObjectReference, Pod},
        events::v1::{Event, EventSeries},
    },
    apimachinery::pkg::apis::meta::v1::MicroTime,
    jiff::Timestamp,
};
use kube::{
    Api, Client,
    api::{ObjectMeta, Patch, PatchParams, PostParams},
};
use serde_json::json;
use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};

use super::{error::Error, stats::Stats};
use crate::model::PodRef;

/// Waiting to be written.
const QUEUE: usize = 256;
/// New events at once, and how often there may be one more.
const BURST: u32 = 50;
const REFILL: Duration = Duration::from_secs(1);
/// A repeated event's count is written at first after this, then after twice as long, and so on.
const FIRST_GAP: Duration = Duration::from_secs(10);
const LONGEST_GAP: Duration = Duration::from_secs(600);
/// The same reason with another text makes an event of its own after this.
const NEW_TEXT: Duration = Duration::from_secs(60);
/// After this without a repetition, it is a new event.
const FORGET: Duration = Duration::from_secs(1200);
/// A request.
const ATTEMPT: Duration = Duration::from_secs(5);
/// Longest text the API takes, in bytes.
const NOTE: usize = 1024;
/// Who reports, in events.
const CONTROLLER: &str = "culvert.dev/agent";

/// What an event is about.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum About {
    /// A pod.
    Pod(PodRef),
    /// The agent's node.
    Node,
}

/// How it is meant.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Kind {
    /// For information.
    Normal,
    /// Somebody should look.
    Warning,
}

/// One event.
#[derive(Clone, Debug)]
pub struct Notice {
    /// What about.
    pub about: About,
    /// How meant.
    pub kind: Kind,
    /// Why, as one word in camel case: `EnrolFailed`.
    pub reason: &'static str,
    /// What was being done, likewise: `Enrol`.
    pub action: &'static str,
    /// The sentence for people.
    pub note: String,
}

/// Notices on their way.
#[derive(Debug)]
pub(super) struct Queue {
    sender: mpsc::Sender<Notice>,
    receiver: Mutex<Option<mpsc::Receiver<Notice>>>,
    stats: Arc<Stats>,
}

impl Queue {
    pub(super) fn new(stats: Arc<Stats>) -> Self {
        let (sender, receiver) = mpsc::channel(QUEUE);
        Self {
            sender,
            receiver: Mutex::new(Some(receiver)),
            stats,
        }
    }

    pub(super) fn push(&self, notice: Notice) {
        if self.sender.try_send(notice).is_err() {
            self.stats.events_suppressed.add();
        }
    }

    /// Writes what comes, for ever.
    pub(super) async fn write(&self, client: &Client, node: &str, instance: &str) {
        let receiver = self
            .receiver
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Some(mut receiver) = receiver else {
            return;
        };
        let mut told = Told::new(Instant::now());
        while let Some(notice) = receiver.recv().await {
            let namespace = match &notice.about {
                About::Pod(pod) => &pod.namespace,
                About::Node => "default",
            };
            let api = Api::<Event>::namespaced(client.clone(), namespace);
            match told.step(&notice, Instant::now()) {
                Step::Drop => self.stats.events_suppressed.add(),
                Step::Merge => {}
                Step::New => {
                    let event = event(&notice, node, instance);
                    let params = PostParams::default();
                    let name = event.metadata.name.clone().unwrap_or_default();
                    if self.sent(api.create(&params, &event)).await {
                        told.wrote(&notice, name, Instant::now());
                    }
                }
                Step::Count { name, count } => {
                    let series = EventSeries {
                        count,
                        last_observed_time: MicroTime(Timestamp::now()),
                    };
                    let patch = Patch::Merge(json!({ "series": series }));
                    if !self
                        .sent(api.patch(&name, &PatchParams::default(), &patch))
                        .await
                    {
                        // It may have expired.
                        told.forget(&notice);
                    }
                }
            }
        }
    }

    async fn sent<T>(&self, request: impl Future<Output = kube::Result<T>>) -> bool {
        let error = match timeout(ATTEMPT, request).await {
            Ok(Ok(_)) => return true,
            Ok(Err(e)) => Error::kube("write", "an event", &e),
            Err(_) => Error::slow("write", "an event"),
        };
        self.stats.events_failed.add();
        tracing::debug!(%error, "event lost");
        false
    }
}

/// Writes one event at once, about the agent's own pod, before the agent ends.
pub async fn tell_of_end(
    client: &Client,
    namespace: &str,
    pod: &str,
    note: String,
) -> Result<(), Error> {
    let pods = Api::<Pod>::namespaced(client.clone(), namespace);
    // `kubectl describe` looks for events by the pod's UID.
    let found = pods.get_metadata(pod).await;
    let found = found.map_err(|e| Error::kube("read pod", format!("{namespace}/{pod}"), &e))?;
    let notice = Notice {
        about: About::Pod(PodRef {
            namespace: namespace.to_owned(),
            name: pod.to_owned(),
            uid: found.metadata.uid.as_deref().unwrap_or_default().into(),
        }),
        kind: Kind::Warning,
        reason: "CulvertAgentFailed",
        action: "Start",
        note,
    };
    let events = Api::<Event>::namespaced(client.clone(), namespace);
    let event = event(&notice, "", pod);
    let written = events.create(&PostParams::default(), &event).await;
    written.map_err(|e| Error::kube("write", "an event", &e))?;
    Ok(())
}

/// What to do with a notice.
#[derive(PartialEq, Eq, Debug)]
enum Step {
    New,
    Count { name: String, count: i32 },
    Merge,
    Drop,
}

/// What was told lately.
struct Told {
    tokens: u32,
    refilled: Instant,
    entries: HashMap<(About, &'static str), Entry>,
}

struct Entry {
    name: String,
    text: u64,
    count: i32,
    written: Instant,
    seen: Instant,
    gap: Duration,
}

impl Told {
    fn new(now: Instant) -> Self {
        Self {
            tokens: BURST,
            refilled: now,
            entries: HashMap::new(),
        }
    }

    fn step(&mut self, notice: &Notice, now: Instant) -> Step {
        self.entries.retain(|_, e| now - e.seen < FORGET);
        let text = text(notice);
        let key = (notice.about.clone(), notice.reason);
        if let Some(entry) = self.entries.get_mut(&key)
            && (entry.text == text || now - entry.written < NEW_TEXT)
        {
            entry.count = entry.count.saturating_add(1);
            entry.seen = now;
            if now - entry.written < entry.gap {
                return Step::Merge;
            }
            entry.written = now;
            entry.gap = (entry.gap * 2).min(LONGEST_GAP);
            return Step::Count {
                name: entry.name.clone(),
                count: entry.count,
            };
        }
        while self.tokens < BURST && now - self.refilled >= REFILL {
            self.tokens += 1;
            self.refilled += REFILL;
        }
        if self.tokens == 0 {
            return Step::Drop;
        }
        if self.tokens == BURST {
            self.refilled = now;
        }
        self.tokens -= 1;
        Step::New
    }

    fn wrote(&mut self, notice: &Notice, name: String, now: Instant) {
        let entry = Entry {
            name,
            text: text(notice),
            count: 1,
            written: now,
            seen: now,
            gap: FIRST_GAP,
        };
        self.entries
            .insert((notice.about.clone(), notice.reason), entry);
    }

    fn forget(&mut self, notice: &Notice) {
        self.entries.remove(&(notice.about.clone(), notice.reason));
    }
}

fn text(notice: &Notice) -> u64 {
    let mut hash = DefaultHasher::new();
    notice.note.hash(&mut hash);
    hash.finish()
}

fn event(notice: &Notice, node: &str, instance: &str) -> Event {
    let regarding = match &notice.about {
        About::Pod(pod) => ObjectReference {
            api_version: Some("v1".into()),
            kind: Some("Pod".into()),
            namespace: Some(pod.namespace.clone()),
            name: Some(pod.name.clone()),
            uid: Some(pod.uid.as_str().into()),
            ..ObjectReference::default()
        },
        // As the kubelet does it, and as `kubectl describe node` looks for it.
        About::Node => ObjectReference {
            api_version: Some("v1".into()),
            kind: Some("Node".into()),
            name: Some(node.into()),
            uid: Some(node.into()),
            ..ObjectReference::default()
        },
    };
    let now = Timestamp::now();
    let mut note = notice.note.clone();
    note.truncate(note.floor_char_boundary(NOTE));
    let name = regarding.name.as_deref().unwrap_or_default();
    Event {
        metadata: ObjectMeta {
            // Unlike the pod's name, an event's may not be longer than 253 with what is added.
            name: Some(format!("{:.200}.{:x}", name, now.as_nanosecond())),
            namespace: Some(regarding.namespace.clone().unwrap_or("default".into())),
            ..ObjectMeta::default()
        },
        action: Some(notice.action.into()),
        reason: Some(notice.reason.into()),
        note: Some(note),
        type_: Some(
            match notice.kind {
                Kind::Normal => "Normal",
                Kind::Warning => "Warning",
            }
            .into(),
        ),
        event_time: Some(MicroTime(now)),
        reporting_controller: Some(CONTROLLER.into()),
        reporting_instance: Some(instance.into()),
        regarding: Some(regarding),
        ..Event::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notice(name: &str, note: &str) -> Notice {
        Notice {
            about: About::Pod(PodRef {
                uid: name.into(),
                namespace: "ns".into(),
                name: name.into(),
            }),
            kind: Kind::Warning,
            reason: "EnrolFailed",
            action: "Enrol",
            note: note.into(),
        }
    }

    #[test]
    fn a_failing_pod_makes_one_event_that_is_counted_ever_more_rarely() {
        let start = Instant::now();
        let mut told = Told::new(start);
        let mut requests = 0;
        let mut last = 0;
        for second in 0..3600 {
            let now = start + Duration::from_secs(second);
            let text = format!("attempt failed after {} ms", second % 7);
            match told.step(&notice("a", &text), now) {
                Step::New => {
                    requests += 1;
                    told.wrote(&notice("a", &text), "e".into(), now);
                }
                Step::Count { count, .. } => {
                    requests += 1;
                    last = count;
                }
                Step::Merge => {}
                Step::Drop => panic!("one pod is not too much"),
            }
        }
        assert!(requests < 130 && requests > 5, "{requests}");
        assert!(last > 1);
    }

    #[test]
    fn many_pods_at_once_are_cut_at_the_burst() {
        let start = Instant::now();
        let mut told = Told::new(start);
        let steps = |told: &mut Told, range: std::ops::Range<u32>, now| {
            range
                .filter(|i| told.step(&notice(&i.to_string(), "x"), now) == Step::New)
                .count()
        };
        assert_eq!(steps(&mut told, 0..500, start), BURST as usize);
        let later = start + 3 * REFILL;
        assert_eq!(steps(&mut told, 500..1000, later), 3);
        let rested = later + 1000 * REFILL;
        assert_eq!(steps(&mut told, 1000..2000, rested), BURST as usize);
    }

    #[test]
    fn an_event_fits_the_api() {
        let mut long = notice(&"p".repeat(250), &"ü".repeat(1000));
        let made = event(&long, "node", "agent");
        assert!(made.note.unwrap().len() <= NOTE);
        assert!(made.metadata.name.unwrap().len() <= 253);
        long.about = About::Node;
        let made = event(&long, "node", "agent");
        assert_eq!(made.metadata.namespace.as_deref(), Some("default"));
    }
}
