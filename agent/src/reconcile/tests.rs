//! Order, retries and repair, in a world that only remembers what was done to it.
//!
//! The kernel, ztunnel and the API server have tests of their own with the real ones; here is what those cannot make
//! happen at will.

mod enrolling;
mod leaving;
mod plugin;
mod repair;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    net::IpAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{
    Answer, Options, Reconciler,
    publish::Remembered,
    world::{Failure, Left, Notice, Target, World},
};
use crate::{
    admin::status::PodState,
    kernel::{
        pod::Policy,
        verify::{Kind, Problem},
    },
    model::{Cluster, Namespace, Phase, Pod, PodUid, Redirection, Uncaptured, keys},
    plan::membership::Settings,
};

/// Remembers; fails when told to.
#[derive(Debug, Default)]
struct Fake {
    log: Mutex<Vec<String>>,
    /// Verbs that fail next, by name.
    failures: Mutex<HashMap<&'static str, VecDeque<Failure>>>,
    /// Namespaces by pod.
    places: Mutex<HashMap<PodUid, u32>>,
    captured: Mutex<BTreeMap<u32, Policy>>,
    connections: Mutex<usize>,
    /// Conditions that were written.
    conditions: Mutex<Vec<String>>,
    /// How many pods were said to be in the mesh.
    announced: Mutex<usize>,
    /// Namespaces with processes.
    inhabited: Mutex<BTreeSet<u32>>,
}

impl Fake {
    fn say(&self, what: String) -> Result<(), Failure> {
        let verb = what.split(' ').next().unwrap_or_default().to_owned();
        let failure = self
            .failures
            .lock()
            .unwrap()
            .get_mut(verb.as_str())
            .and_then(VecDeque::pop_front);
        let end = if failure.is_some() { " failed" } else { "" };
        self.log.lock().unwrap().push(format!("{what}{end}"));
        failure.map_or(Ok(()), Err)
    }
}

impl World for Fake {
    type Place = u32;

    async fn find(
        &self,
        pods: Vec<(Target, Vec<IpAddr>)>,
    ) -> Result<HashMap<PodUid, Arc<u32>>, Failure> {
        self.say("find".into())?;
        let places = self.places.lock().unwrap();
        let found = pods
            .iter()
            .filter_map(|(t, _)| Some((t.uid.clone(), Arc::new(*places.get(&t.uid)?))));
        Ok(found.collect())
    }

    async fn recover(&self, pods: Vec<(Target, u64)>) -> HashMap<PodUid, Arc<u32>> {
        let places = self.places.lock().unwrap();
        let found = pods.iter().filter_map(|(t, cookie)| {
            let place = *places.get(&t.uid)?;
            (u64::from(place) == *cookie).then(|| (t.uid.clone(), Arc::new(place)))
        });
        found.collect()
    }

    async fn attach(&self, t: &Target, place: Arc<u32>, policy: Policy) -> Result<(), Failure> {
        self.say(format!("attach {t}"))?;
        self.captured.lock().unwrap().insert(*place, policy);
        Ok(())
    }

    async fn release(&self, t: &Target, place: Arc<u32>) -> Result<Left, Failure> {
        self.say(format!("release {t}"))?;
        assert!(self.captured.lock().unwrap().contains_key(&place));
        Ok(match *self.connections.lock().unwrap() {
            0 => Left::Nothing,
            n => Left::Connections(n),
        })
    }

    async fn detach(&self, t: &Target, place: Arc<u32>) -> Result<Left, Failure> {
        self.say(format!("detach {t}"))?;
        self.captured.lock().unwrap().remove(&place);
        Ok(match *self.connections.lock().unwrap() {
            0 => Left::Nothing,
            n => Left::Connections(n),
        })
    }

    async fn inhabited(&self, place: Arc<u32>) -> bool {
        self.inhabited.lock().unwrap().contains(&*place)
    }

    async fn forget(&self, t: &Target, place: Arc<u32>) -> Result<(), Failure> {
        self.say(format!("forget {t}"))?;
        self.captured.lock().unwrap().remove(&place);
        Ok(())
    }

    async fn tell(&self, t: &Target, _: Arc<u32>) -> Result<(), Failure> {
        self.say(format!("tell {t}"))
    }

    fn expect(&self, _: &Target) {}

    async fn untell(&self, t: &Target) -> Result<(), Failure> {
        self.say(format!("untell {t}"))
    }

    async fn annotate(&self, t: &Target, value: Option<Redirection>) -> Result<(), Failure> {
        self.say(format!(
            "annotate {t} {}",
            value.map_or("-", Redirection::as_str)
        ))
    }

    async fn condition(&self, t: &Target, to: Option<&Uncaptured>) -> Result<(), Failure> {
        let failure = {
            let mut failures = self.failures.lock().unwrap();
            failures.get_mut("condition").and_then(VecDeque::pop_front)
        };
        if let Some(failure) = failure {
            return Err(failure);
        }
        let text = to.map_or("-", |why| why.reason.as_str());
        let mut conditions = self.conditions.lock().unwrap();
        conditions.push(format!("{t} {text}"));
        Ok(())
    }

    async fn say(&self, t: &Target, notice: Notice) {
        let what = match notice {
            Notice::Repaired(_) => "repaired",
            Notice::PutBack(_) => "put back",
            Notice::Reannotated => "reannotated",
            Notice::Refused(_) => "refused",
            Notice::Ignored(_) => "ignored",
            Notice::Enrolled(_) => {
                *self.announced.lock().unwrap() += 1;
                return;
            }
            _ => return,
        };
        self.log.lock().unwrap().push(format!("{what} {t}"));
    }

    async fn verify(&self, places: Vec<(PodUid, Arc<u32>)>) -> Vec<(PodUid, Problem)> {
        let captured = self.captured.lock().unwrap();
        let missing = places
            .into_iter()
            .filter(|(_, p)| !captured.contains_key(p));
        missing
            .map(|(uid, _)| {
                let problem = Problem {
                    cookie: None,
                    kind: Kind::Entry,
                    what: "not captured".into(),
                };
                (uid, problem)
            })
            .collect()
    }

    async fn examine(&self, place: Arc<u32>) -> Result<Option<String>, Failure> {
        Ok((!self.captured(&place)).then(|| "not captured".into()))
    }

    fn captured(&self, place: &u32) -> bool {
        self.captured.lock().unwrap().contains_key(place)
    }

    async fn collect(&self) {}

    fn strays(&self, known: &[Arc<u32>]) -> usize {
        let captured = self.captured.lock().unwrap();
        captured
            .keys()
            .filter(|c| !known.iter().any(|k| **k == **c))
            .count()
    }

    fn cookie(&self, place: &u32) -> u64 {
        (*place).into()
    }
}

/// A cluster to edit and a reconciler at work on it.
struct Stage {
    cluster: watch::Sender<Cluster>,
    reconciler: Reconciler<Fake>,
    end: CancellationToken,
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.end.cancel();
    }
}

impl Stage {
    fn with(world: Fake) -> Self {
        Self::from(world, true, Vec::new())
    }

    fn from(world: Fake, listed: bool, remembered: Vec<Remembered>) -> Self {
        let cluster = watch::Sender::new(Cluster {
            listed,
            ..Cluster::default()
        });
        let options = Options {
            settings: Settings::default(),
            grace: None,
            polite_dns: false,
            named_ztunnel: false,
            period: Duration::from_secs(5),
            concurrency: 4,
            remembered,
            memory: None,
        };
        let reconciler = Reconciler::new(world, options, cluster.subscribe());
        let end = CancellationToken::new();
        tokio::spawn({
            let (reconciler, end) = (reconciler.clone(), end.clone());
            async move { reconciler.run(end).await }
        });
        Self {
            cluster,
            reconciler,
            end,
        }
    }

    fn new() -> Self {
        Self::with(Fake::default())
    }

    fn namespace(&self, name: &str, mode: Option<&str>) {
        let labels = mode.map(|m| (keys::DATAPLANE_MODE.to_owned(), m.to_owned()));
        let namespace = Namespace {
            labels: labels.into_iter().collect(),
            ..Namespace::default()
        };
        self.cluster
            .send_modify(|c| drop(c.namespaces.insert(name.into(), namespace)));
    }

    fn edit(&self, uid: &str, edit: impl FnOnce(&mut Pod)) {
        self.cluster.send_modify(|c| {
            let pod = c.pods.entry(uid.into()).or_insert_with(|| pod(uid));
            edit(pod);
        });
    }

    fn place(&self, uid: &str, place: u32) {
        self.fake().places.lock().unwrap().insert(uid.into(), place);
    }

    fn fake(&self) -> &Fake {
        self.reconciler.world()
    }

    /// Conditions written since the last call.
    fn conditions(&self) -> Vec<String> {
        self.fake().conditions.lock().unwrap().drain(..).collect()
    }

    fn fail(&self, verb: &'static str, times: usize, retry: bool) {
        let failure = Failure {
            message: format!("{verb} does not work"),
            retry,
        };
        let failures = std::iter::repeat_n(failure, times).collect();
        self.fake().failures.lock().unwrap().insert(verb, failures);
    }

    /// What was done since the last call, after so much time.
    async fn after(&self, time: Duration) -> Vec<String> {
        tokio::time::sleep(time).await;
        let mut log = self.fake().log.lock().unwrap();
        log.drain(..).filter(|l| !l.starts_with("find")).collect()
    }

    async fn soon(&self) -> Vec<String> {
        self.after(Duration::from_millis(50)).await
    }
}

fn pod(uid: &str) -> Pod {
    Pod {
        uid: uid.into(),
        static_uid: None,
        namespace: "shop".into(),
        name: uid.into(),
        service_account: "default".into(),
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        host_network: false,
        runtime_class: None,
        phase: Phase::Running,
        deleting: false,
        addresses: ["10.0.0.1".parse().unwrap()].into(),
        nameservers: [].into(),
        uncaptured: None,
    }
}

const ENROLLED: [&str; 3] = ["attach shop/a", "tell shop/a", "annotate shop/a enabled"];

async fn enrolled() -> Stage {
    let stage = Stage::new();
    stage.place("a", 1);
    stage.edit("a", |_| {});
    stage.namespace("shop", Some("ambient"));
    assert_eq!(stage.soon().await, ENROLLED);
    stage
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(25)
}

fn mesh() -> Namespace {
    Namespace {
        labels: [(keys::DATAPLANE_MODE.to_owned(), keys::AMBIENT.to_owned())].into(),
        ..Namespace::default()
    }
}
