//! Order, retries and repair, in a world that only remembers what was done to it.
//!
//! The kernel, ztunnel and the API server have tests of their own with the real ones; here is what those cannot make
//! happen at will.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
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
    kernel::pod::Policy,
    model::{Cluster, Namespace, Phase, Pod, PodUid, Redirection, keys},
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

    async fn detach(&self, t: &Target, place: Arc<u32>) -> Result<Left, Failure> {
        self.say(format!("detach {t}"))?;
        self.captured.lock().unwrap().remove(&place);
        Ok(match *self.connections.lock().unwrap() {
            0 => Left::Nothing,
            n => Left::Connections(n),
        })
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

    async fn say(&self, t: &Target, notice: Notice) {
        let what = match notice {
            Notice::Repaired(_) => "repaired",
            Notice::Refused(_) => "refused",
            Notice::Ignored(_) => "ignored",
            _ => return,
        };
        self.log.lock().unwrap().push(format!("{what} {t}"));
    }

    async fn verify(&self, places: Vec<(PodUid, Arc<u32>)>) -> Vec<(PodUid, String)> {
        let captured = self.captured.lock().unwrap();
        let missing = places
            .into_iter()
            .filter(|(_, p)| !captured.contains_key(p));
        missing
            .map(|(uid, _)| (uid, "not captured".into()))
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

#[tokio::test(start_paused = true)]
async fn a_running_pod_is_enrolled_when_its_namespace_is_labelled() {
    let stage = Stage::new();
    stage.place("a", 1);
    stage.edit("a", |_| {});
    stage.namespace("shop", None);
    assert!(stage.soon().await.is_empty());
    stage.namespace("shop", Some("ambient"));
    assert_eq!(stage.soon().await, ENROLLED);
    assert!(stage.after(Duration::from_secs(60)).await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn it_leaves_when_the_label_goes() {
    let stage = enrolled().await;
    stage.namespace("shop", None);
    assert_eq!(
        stage.soon().await,
        ["detach shop/a", "annotate shop/a -", "untell shop/a"]
    );
    assert!(stage.reconciler.report().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_failure_that_may_pass_is_tried_again() {
    let stage = Stage::new();
    stage.place("a", 1);
    stage.fail("attach", 2, true);
    stage.edit("a", |_| {});
    stage.namespace("shop", Some("ambient"));
    assert_eq!(stage.soon().await, ["attach shop/a failed"]);
    assert_eq!(stage.reconciler.report()[0].state, PodState::Failing);
    assert_eq!(
        stage.after(Duration::from_secs(2)).await,
        [
            "attach shop/a failed",
            "attach shop/a",
            "tell shop/a",
            "annotate shop/a enabled"
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn one_that_will_not_is_left_until_something_changes() {
    let stage = Stage::new();
    stage.place("a", 1);
    stage.fail("attach", 1, false);
    stage.edit("a", |_| {});
    stage.namespace("shop", Some("ambient"));
    assert_eq!(stage.soon().await, ["attach shop/a failed"]);
    assert!(stage.after(Duration::from_secs(600)).await.is_empty());
    stage.edit("a", |pod| {
        pod.addresses.insert("fd00::1".parse().unwrap());
    });
    assert_eq!(stage.soon().await, ENROLLED);
}

#[tokio::test(start_paused = true)]
async fn without_ztunnel_it_is_pending_then_enabled() {
    let stage = Stage::new();
    stage.place("a", 1);
    stage.fail("tell", 2, true);
    stage.edit("a", |_| {});
    stage.namespace("shop", Some("ambient"));
    assert_eq!(
        stage.soon().await,
        [
            "attach shop/a",
            "tell shop/a failed",
            "annotate shop/a pending"
        ]
    );
    assert_eq!(
        stage.after(Duration::from_secs(2)).await,
        [
            "tell shop/a failed",
            "tell shop/a",
            "annotate shop/a enabled"
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn an_ack_in_a_snapshot_counts() {
    let stage = Stage::new();
    stage.place("a", 1);
    stage.fail("tell", 100, true);
    stage.edit("a", |_| {});
    stage.namespace("shop", Some("ambient"));
    stage.after(Duration::from_secs(1)).await;
    stage.fail("tell", 0, true);
    stage.reconciler.acked(&"a".into());
    assert_eq!(
        stage.soon().await,
        ["tell shop/a", "annotate shop/a enabled"]
    );
    assert!(stage.after(Duration::from_secs(60)).await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn letting_go_is_tried_again_too() {
    let stage = enrolled().await;
    stage.fail("annotate", 1, true);
    stage.namespace("shop", None);
    assert_eq!(
        stage.after(Duration::from_secs(2)).await,
        [
            "detach shop/a",
            "annotate shop/a - failed",
            "untell shop/a",
            "annotate shop/a -"
        ]
    );
    assert!(stage.reconciler.report().is_empty());
}

#[tokio::test(start_paused = true)]
async fn old_connections_keep_ztunnel_in_the_pod() {
    let stage = enrolled().await;
    *stage.fake().connections.lock().unwrap() = 3;
    stage.namespace("shop", None);
    let log = stage.after(Duration::from_secs(12)).await;
    assert_eq!(log[..2], ["detach shop/a", "annotate shop/a -"]);
    assert!(log[2..].iter().all(|l| l == "detach shop/a"), "{log:?}");
    assert_eq!(stage.reconciler.report()[0].state, PodState::Draining);
    *stage.fake().connections.lock().unwrap() = 0;
    assert_eq!(
        stage.after(Duration::from_secs(6)).await,
        ["detach shop/a", "untell shop/a"]
    );
}

#[tokio::test(start_paused = true)]
async fn what_was_undone_behind_its_back_is_repaired_within_a_period() {
    let stage = enrolled().await;
    stage.fake().captured.lock().unwrap().clear();
    assert_eq!(
        stage.after(Duration::from_secs(5)).await,
        ["attach shop/a", "repaired shop/a", "tell shop/a"]
    );
}

#[tokio::test(start_paused = true)]
async fn an_annotation_that_somebody_removed_is_written_again() {
    let stage = enrolled().await;
    let write = |value: Option<&str>| {
        let value = value.map(str::to_owned);
        stage.edit("a", |pod| match value {
            Some(value) => drop(pod.annotations.insert(keys::REDIRECTION.into(), value)),
            None => drop(pod.annotations.remove(keys::REDIRECTION)),
        });
    };
    // Our own write comes back by the watch: nothing to do.
    write(Some("enabled"));
    assert!(stage.soon().await.is_empty());
    write(None);
    assert_eq!(stage.soon().await, ["annotate shop/a enabled"]);
}

#[tokio::test(start_paused = true)]
async fn a_deleted_pod_is_forgotten_without_a_word_to_the_api() {
    let stage = enrolled().await;
    stage.edit("a", |pod| pod.deleting = true);
    assert!(stage.soon().await.is_empty(), "it drains through the mesh");
    stage.cluster.send_modify(|c| c.pods.clear());
    assert_eq!(stage.soon().await, ["forget shop/a", "untell shop/a"]);
    assert!(stage.reconciler.report().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_job_that_ended_is_let_go() {
    let stage = enrolled().await;
    stage.edit("a", |pod| pod.phase = Phase::Succeeded);
    assert_eq!(stage.soon().await, ["forget shop/a", "untell shop/a"]);
}

#[tokio::test(start_paused = true)]
async fn an_annotation_changes_a_living_pod() {
    let stage = enrolled().await;
    stage.edit("a", |pod| {
        drop(
            pod.annotations
                .insert(keys::BYPASS_INBOUND.into(), "true".into()),
        )
    });
    assert_eq!(stage.soon().await, ["attach shop/a"]);
    assert!(stage.fake().captured.lock().unwrap()[&1].bypass_inbound);
}

#[tokio::test(start_paused = true)]
async fn a_namespace_deleted_before_its_pods_changes_nothing_for_them() {
    let stage = enrolled().await;
    stage.cluster.send_modify(|c| c.namespaces.clear());
    assert!(stage.soon().await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_left_while_no_agent_ran_is_let_go() {
    let world = Fake::default();
    world.captured.lock().unwrap().insert(7, Policy::default());
    let stage = Stage::with(world);
    stage.place("a", 7);
    stage.namespace("shop", None);
    stage.edit("a", |pod| {
        drop(
            pod.annotations
                .insert(keys::REDIRECTION.into(), "enabled".into()),
        )
    });
    let log = stage.after(Duration::from_secs(6)).await;
    assert!(log.contains(&"detach shop/a".to_owned()), "{log:?}");
    assert!(log.contains(&"annotate shop/a -".to_owned()), "{log:?}");
    assert!(stage.fake().captured.lock().unwrap().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_sandboxed_pod_is_refused_once() {
    let stage = Stage::new();
    stage.place("a", 1);
    stage.edit("a", |pod| pod.runtime_class = Some("gvisor".into()));
    stage.namespace("shop", Some("ambient"));
    assert_eq!(
        stage.after(Duration::from_secs(30)).await,
        ["refused shop/a"]
    );
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

#[tokio::test(start_paused = true)]
async fn the_plugin_waits_for_ztunnel_but_not_for_the_api() {
    let stage = Stage::new();
    stage.fail("tell", 3, true);
    stage.fail("annotate", 10_000, true);
    let mut new = pod("a");
    new.addresses.clear();
    let answer = stage
        .reconciler
        .add(&new, Some(&mesh()), 1, "s1", soon())
        .await;
    assert!(matches!(answer, Ok(Answer::Enrolled { .. })), "{answer:?}");
    let log: Vec<_> = stage.fake().log.lock().unwrap().drain(..).collect();
    assert_eq!(log[0], "attach shop/a");
    assert_eq!(
        log.iter().filter(|l| l.starts_with("tell")).count(),
        4,
        "{log:?}"
    );
    stage.fail("annotate", 0, true);
    assert_eq!(
        stage.after(Duration::from_secs(60)).await,
        ["annotate shop/a enabled"]
    );
}

#[tokio::test(start_paused = true)]
async fn a_pod_outside_the_mesh_starts_at_once() {
    let stage = Stage::new();
    let answer = stage
        .reconciler
        .add(&pod("a"), Some(&Namespace::default()), 1, "s1", soon())
        .await;
    assert!(matches!(answer, Ok(Answer::Outside(_))), "{answer:?}");
    assert!(stage.soon().await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_mesh_pod_that_cannot_be_served_does_not_start() {
    let stage = Stage::new();
    stage.fail("tell", 10_000, true);
    let answer = stage
        .reconciler
        .add(&pod("a"), Some(&mesh()), 1, "s1", soon())
        .await;
    assert!(answer.is_err(), "{answer:?}");
    // The runtime takes the sandbox down and nothing is left.
    assert!(stage.reconciler.del("s1"));
    stage.soon().await;
    assert!(stage.fake().captured.lock().unwrap().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_new_sandbox_under_the_same_uid_outlives_the_old_ones_del() {
    let stage = enrolled().await;
    let answer = stage
        .reconciler
        .add(&pod("a"), Some(&mesh()), 2, "s2", soon())
        .await;
    assert!(matches!(answer, Ok(Answer::Enrolled { .. })), "{answer:?}");
    assert_eq!(
        stage.soon().await,
        ["forget shop/a", "attach shop/a", "tell shop/a"]
    );
    assert!(!stage.reconciler.del("s1"));
    assert!(stage.soon().await.is_empty());
    assert!(stage.reconciler.del("s2"));
    assert_eq!(stage.soon().await, ["forget shop/a", "untell shop/a"]);
    // The pod is still in the API, labelled, and must not come back by itself.
    assert!(stage.after(Duration::from_secs(120)).await.is_empty());
    let answer = stage
        .reconciler
        .add(&pod("a"), Some(&mesh()), 3, "s3", soon())
        .await;
    assert!(matches!(answer, Ok(Answer::Enrolled { .. })), "{answer:?}");
}

#[tokio::test(start_paused = true)]
async fn an_add_right_after_a_del_is_the_last_word() {
    let stage = enrolled().await;
    let (a, mesh) = (pod("a"), mesh());
    let add = |sandbox| stage.reconciler.add(&a, Some(&mesh), 1, sandbox, soon());
    assert!(matches!(add("s1").await, Ok(Answer::Enrolled { .. })));
    assert!(stage.reconciler.del("s1"));
    // Nobody has had a turn in between: the DEL is not acted upon yet.
    assert!(matches!(add("s2").await, Ok(Answer::Enrolled { .. })));
    assert!(stage.after(Duration::from_secs(120)).await.is_empty());
    assert!(!stage.reconciler.del("s1"));
    assert!(stage.reconciler.del("s2"));
    stage.soon().await;
    assert!(stage.fake().captured.lock().unwrap().is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_add_for_a_further_interface_does_nothing() {
    let stage = enrolled().await;
    let answer = stage
        .reconciler
        .add(&pod("a"), Some(&mesh()), 1, "s1", soon())
        .await;
    assert!(matches!(answer, Ok(Answer::Enrolled { .. })), "{answer:?}");
    assert!(stage.soon().await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_pod_the_watch_never_shows_is_let_go() {
    let stage = Stage::new();
    stage
        .reconciler
        .add(&pod("a"), Some(&mesh()), 1, "s1", soon())
        .await
        .unwrap();
    stage.soon().await;
    assert!(stage.after(Duration::from_secs(50)).await.is_empty());
    assert_eq!(
        stage.after(Duration::from_secs(30)).await,
        ["forget shop/a", "untell shop/a"]
    );
}

#[tokio::test(start_paused = true)]
async fn garbage_collection_lets_go_what_the_runtime_lost() {
    let stage = Stage::new();
    for (uid, place, sandbox) in [("a", 1, "s1"), ("b", 2, "s2")] {
        stage.edit(uid, |_| {});
        stage
            .reconciler
            .add(&pod(uid), Some(&mesh()), place, sandbox, soon())
            .await
            .unwrap();
    }
    stage.namespace("shop", Some("ambient"));
    stage.soon().await;
    assert_eq!(stage.reconciler.gc(|_| true, &["s2".to_owned()].into()), 1);
    assert_eq!(stage.soon().await, ["forget shop/a", "untell shop/a"]);
}

#[tokio::test(start_paused = true)]
async fn a_delete_for_an_unknown_pod_is_no_matter() {
    let stage = Stage::new();
    assert!(!stage.reconciler.del("nobody"));
}

#[tokio::test(start_paused = true)]
async fn one_pod_that_fails_does_not_hold_up_the_rest() {
    let stage = Stage::new();
    stage.fail("attach", 1, true);
    for n in 0..50 {
        let uid = format!("p{n}");
        stage.place(&uid, n);
        stage.edit(&uid, |_| {});
    }
    stage.namespace("shop", Some("ambient"));
    let log = stage.soon().await;
    assert_eq!(log.iter().filter(|l| l.ends_with("enabled")).count(), 49);
}

#[tokio::test(start_paused = true)]
async fn while_the_api_is_away_the_pins_say_who_is_enrolled() {
    let world = Fake::default();
    let remembered = [("a", 1), ("gone", 2), ("released", 3)].map(|(uid, cookie)| Remembered {
        cookie,
        uid: uid.into(),
        static_uid: None,
        namespace: "shop".into(),
        name: uid.into(),
        service_account: "default".into(),
        sandbox: Some(format!("s-{uid}")),
        served: true,
    });
    for (uid, place) in [("a", 1), ("released", 3)] {
        world.places.lock().unwrap().insert(uid.into(), place);
    }
    world.captured.lock().unwrap().insert(1, Policy::default());
    let stage = Stage::from(world, false, remembered.into());
    assert!(stage.soon().await.is_empty());
    stage.reconciler.restore().await;
    assert_eq!(stage.soon().await, ["tell shop/a"]);
    assert!(stage.after(Duration::from_secs(600)).await.is_empty());
    // The API server is back, and has forgotten the pod.
    stage.cluster.send_modify(|c| c.listed = true);
    assert_eq!(
        stage.after(Duration::from_secs(61)).await,
        ["forget shop/a", "untell shop/a"]
    );
}

#[tokio::test(start_paused = true)]
async fn what_is_captured_stays_while_nothing_can_be_said_about_the_pod() {
    let world = Fake::default();
    world.captured.lock().unwrap().insert(7, Policy::default());
    let stage = Stage::with(world);
    stage.place("a", 7);
    // Its namespace is not known.
    stage.edit("a", |_| {});
    assert!(stage.after(Duration::from_secs(60)).await.is_empty());
    assert!(stage.fake().captured.lock().unwrap().contains_key(&7));
    stage.namespace("shop", None);
    assert_eq!(stage.soon().await, ["detach shop/a", "untell shop/a"]);
}
