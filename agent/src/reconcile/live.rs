//! The verbs for real: kernel, ztunnel, and whoever the pods come from.
//!
//! Decides nothing. Kernel calls block and change their thread's namespace, so they run on threads of their own.

mod saying;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use super::world::{Failure, Left, Notice, Target, World};
use crate::{
    admin::{
        Installation, Metrics,
        installation::Part,
        labels::{By, Outcome, RepairKind, Stage},
    },
    kernel::{
        self, Netns, Node, discover, listeners,
        pod::{self, Detached, Policy},
        track, verify,
    },
    model::{PodRef, PodUid, Redirection, Uncaptured, keys},
    watch::{self, Kind, Source},
    zds,
};

/// The world as it is.
#[derive(Debug)]
pub struct Live {
    /// The kernel's side.
    pub node: Arc<Node>,
    /// Keeps captured pods in step with their namespaces.
    pub tracker: Arc<track::Tracker>,
    /// ztunnel's side.
    pub zds: zds::Server,
    /// Where pods come from and annotations go.
    pub source: Arc<Source>,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// What of it is broken beyond our mending.
    pub installation: Installation,
    /// ztunnel's listeners are fetched from its process when they are not registered.
    pub fetch: bool,
}

impl From<kernel::Error> for Failure {
    fn from(error: kernel::Error) -> Self {
        Self {
            message: error.to_string(),
            retry: error.retryable,
        }
    }
}

/// Runs a kernel call on a thread that may block and enter namespaces.
async fn blocking<T: Send + 'static>(
    call: impl FnOnce() -> kernel::Result<T> + Send + 'static,
) -> Result<T, Failure> {
    match tokio::task::spawn_blocking(call).await {
        Ok(result) => result.map_err(Failure::from),
        Err(error) => Err(Failure {
            message: format!("a kernel call did not end well: {error}"),
            retry: true,
        }),
    }
}

impl Live {
    fn repaired(&self, kind: impl Into<RepairKind>) {
        let repairs = &self.metrics.repairs;
        repairs.get_or_create(&By(kind.into())).inc();
    }

    /// The node's own programs are not as they were left: nothing is captured that they take part in. With `vital`, one
    /// is gone that every pod needs.
    async fn mend(&self, problems: &[String], vital: bool) {
        let node = Arc::clone(&self.node);
        let (kind, note) = match blocking(move || node.mend()).await {
            Ok(mended) => {
                self.installation.whole(Part::Programs);
                self.repaired(verify::Kind::Program);
                let note = format!(
                    "the node's programs were repaired ({}): {}",
                    mended.join(", "),
                    problems.join("; ")
                );
                ("CulvertRepaired", note)
            }
            Err(failure) => {
                let note = format!("{}: {failure}", problems.join("; "));
                if vital {
                    self.installation.broken(Part::Programs, note.clone());
                }
                ("CulvertProgramsMissing", note)
            }
        };
        tracing::warn!("{note}");
        self.source.event(watch::Notice {
            about: watch::About::Node,
            kind: Kind::Warning,
            reason: kind,
            action: "Repair",
            note,
        });
    }

    fn wrote(&self, outcome: Outcome) {
        let writes = &self.metrics.annotation_writes;
        writes.get_or_create(&By(outcome)).inc();
    }
}

impl World for Live {
    type Place = Netns;

    async fn find(
        &self,
        pods: Vec<(Target, Vec<IpAddr>)>,
    ) -> Result<HashMap<PodUid, Arc<Netns>>, Failure> {
        // On the node, a static pod goes by its configuration's hash.
        let wanted: BTreeMap<String, (PodUid, BTreeSet<IpAddr>)> = pods
            .into_iter()
            .map(|(target, addresses)| {
                let name = target
                    .static_uid
                    .as_ref()
                    .unwrap_or(&target.uid)
                    .to_string();
                (name, (target.uid, addresses.into_iter().collect()))
            })
            .collect();
        // Where a manifest names the namespace there is no need to look.
        let named: HashMap<PodUid, PathBuf> = match &*self.source {
            Source::Manifests(_) => {
                let cluster = self.source.subscribe();
                let cluster = cluster.borrow();
                let path = |uid| cluster.pods.get(uid)?.annotations.get(keys::NETNS);
                let uids = wanted.values().map(|(uid, _)| uid);
                uids.filter_map(|uid| Some((uid.clone(), path(uid)?.into())))
                    .collect()
            }
            // Nobody who writes pods into the API says where on the node they are.
            Source::Api(_) => HashMap::new(),
        };
        blocking(move || {
            let mut found = HashMap::new();
            for (uid, path) in named {
                match Netns::open(&path) {
                    Ok(netns) => drop(found.insert(uid, Arc::new(netns))),
                    Err(error) => {
                        tracing::warn!(%error, "a manifest names a namespace that cannot be opened")
                    }
                }
            }
            let by_uid: BTreeMap<&str, &BTreeSet<IpAddr>> = wanted
                .iter()
                .filter(|(_, (uid, _))| !found.contains_key(uid))
                .map(|(name, (_, addresses))| (name.as_str(), addresses))
                .collect();
            if by_uid.is_empty() {
                return Ok(found);
            }
            let mut discovered = discover::discover(Path::new("/proc"), &by_uid)?;
            for (uid, looked_at) in &discovered.unconfirmed {
                tracing::warn!(
                    uid,
                    looked_at,
                    "the pod's processes are in no namespace that owns one of its addresses"
                );
            }
            let denied = discovered.denied.take();
            for (name, (uid, _)) in &wanted {
                if let Some(netns) = discovered.found.remove(name) {
                    found.insert(uid.clone(), netns);
                }
            }
            match denied {
                Some(error) if found.is_empty() => Err(error),
                _ => Ok(found),
            }
        })
        .await
    }

    async fn recover(&self, pods: Vec<(Target, u64)>) -> HashMap<PodUid, Arc<Netns>> {
        let found = blocking(move || {
            let by_name: BTreeMap<String, (PodUid, u64)> = pods
                .into_iter()
                .map(|(t, cookie)| {
                    (
                        t.static_uid.as_ref().unwrap_or(&t.uid).to_string(),
                        (t.uid, cookie),
                    )
                })
                .collect();
            let names = by_name.keys().map(String::as_str).collect();
            let scan = discover::scan(Path::new("/proc"), &names)?;
            let found = scan.candidates.into_iter().filter_map(|(name, places)| {
                let (uid, cookie) = by_name.get(&name)?;
                let place = places.into_iter().find(|p| p.cookie().0 == *cookie)?;
                Some((uid.clone(), place))
            });
            Ok(found.collect())
        });
        found.await.unwrap_or_else(|failure| {
            tracing::warn!(%failure, "looking for the pods of an earlier agent");
            HashMap::new()
        })
    }

    async fn attach(&self, _: &Target, place: Arc<Netns>, policy: Policy) -> Result<(), Failure> {
        let started = Instant::now();
        let node = Arc::clone(&self.node);
        let netns = Arc::clone(&place);
        let (_, ears) = blocking(move || pod::attach_and_listen(&node, &netns, &policy)).await?;
        self.tracker.take_over(place, ears);
        Metrics::observe(
            &self.metrics.enrol_duration,
            &By(Stage::Kernel),
            started.elapsed(),
        );
        Ok(())
    }

    async fn release(&self, _: &Target, place: Arc<Netns>) -> Result<Left, Failure> {
        let node = Arc::clone(&self.node);
        let left = blocking(move || pod::release(&node, &place)).await?;
        Ok(match left {
            0 => Left::Nothing,
            n => Left::Connections(n),
        })
    }

    async fn detach(&self, _: &Target, place: Arc<Netns>) -> Result<Left, Failure> {
        self.tracker.forget(place.cookie());
        let node = Arc::clone(&self.node);
        Ok(match blocking(move || pod::detach(&node, &place)).await? {
            Detached::Gone | Detached::NotEnrolled => Left::Nothing,
            Detached::Draining(n) => Left::Connections(n),
        })
    }

    async fn inhabited(&self, place: Arc<Netns>) -> bool {
        // Whoever takes a manifest away says that the pod is gone.
        matches!(*self.source, Source::Api(_))
            && blocking(move || Ok(kernel::netns::inhabited(&place)))
                .await
                .unwrap_or(true)
    }

    async fn forget(&self, _: &Target, place: Arc<Netns>) -> Result<(), Failure> {
        self.tracker.forget(place.cookie());
        let node = Arc::clone(&self.node);
        blocking(move || pod::forget(&node, place.cookie())).await
    }

    async fn tell(&self, target: &Target, place: Arc<Netns>) -> Result<(), Failure> {
        let started = Instant::now();
        let netns = place.as_fd().try_clone_to_owned().map_err(|error| Failure {
            message: format!("no descriptor is left for the pod's namespace: {error}; raise the agent's limit of open files"),
            retry: true,
        })?;
        let acked = self
            .zds
            .add(target.uid.clone(), workload(target), Arc::new(netns))
            .await
            .map_err(|error| Failure {
                message: error.to_string(),
                retry: error.is_retryable(),
            })?;
        // An acknowledgement is ztunnel's word; what counts is whether connections would find it.
        if !listeners::complete(&self.node, &place)? {
            let (node, pid) = (Arc::clone(&self.node), self.fetch.then_some(acked.pid));
            blocking(move || fetch_listeners(&node, &place, pid)).await?;
            self.say_and_count(target, Notice::Relistened);
        }
        Metrics::observe(
            &self.metrics.enrol_duration,
            &By(Stage::Ztunnel),
            started.elapsed(),
        );
        Ok(())
    }

    fn expect(&self, target: &Target) {
        if let Err(error) = self.zds.expect(target.uid.clone(), workload(target)) {
            tracing::warn!(pod = %target, %error, "ztunnel cannot be told to expect the pod");
        }
    }

    async fn untell(&self, target: &Target) -> Result<(), Failure> {
        self.zds.remove(&target.uid).await;
        Ok(())
    }

    async fn annotate(&self, target: &Target, value: Option<Redirection>) -> Result<(), Failure> {
        self.source
            .set_redirection(&reference(target), value)
            .await
            .inspect(|_| self.wrote(Outcome::Success))
            .inspect_err(|_| self.wrote(Outcome::Retry))
            .map(|_| ())
            .map_err(|error| Failure {
                message: error.to_string(),
                // Refused by the API server's rules today may be allowed tomorrow, and peers would never learn of the pod.
                retry: true,
            })
    }

    async fn condition(&self, target: &Target, to: Option<&Uncaptured>) -> Result<(), Failure> {
        let written = self.source.set_uncaptured(&reference(target), to).await;
        written.map(|_| ()).map_err(|error| Failure {
            message: error.to_string(),
            retry: true,
        })
    }

    async fn say(&self, target: &Target, notice: Notice) {
        self.say_and_count(target, notice);
    }

    async fn verify(&self, places: Vec<(PodUid, Arc<Netns>)>) -> Vec<(PodUid, verify::Problem)> {
        let node = Arc::clone(&self.node);
        let checked = blocking(move || {
            let all: Vec<&Netns> = places.iter().map(|(_, p)| p.as_ref()).collect();
            let (of_pods, of_node): (Vec<_>, Vec<_>) = verify::verify_quick(&node, &all)?
                .into_iter()
                .partition(|problem| problem.cookie.is_some());
            let uncaptured = of_node.iter().find(|p| p.kind == verify::Kind::Program);
            let named = places.into_iter().filter_map(|(uid, place)| {
                let own = of_pods.iter().find(|p| p.cookie == Some(place.cookie()));
                // Without the node's programs nothing of any pod was captured, and ztunnel's listeners were missed.
                let problem = own.or(uncaptured)?;
                let kind = match problem.kind {
                    verify::Kind::Program => verify::Kind::Entry,
                    own => own,
                };
                let problem = verify::Problem {
                    kind,
                    ..problem.clone()
                };
                Some((uid, problem))
            });
            let named: Vec<_> = named.collect();
            let vital = uncaptured.is_some();
            let of_node: Vec<String> = of_node.into_iter().map(|p| p.what).collect();
            Ok((named, of_node, vital))
        });
        match checked.await {
            Ok((named, of_node, vital)) => {
                if !vital {
                    self.installation.whole(Part::Programs);
                }
                if !of_node.is_empty() {
                    self.mend(&of_node, vital).await;
                }
                named
            }
            Err(failure) => {
                tracing::warn!(%failure, "asking the kernel about captured pods");
                Vec::new()
            }
        }
    }

    async fn examine(&self, place: Arc<Netns>) -> Result<Option<String>, Failure> {
        let node = Arc::clone(&self.node);
        let found = blocking(move || {
            let mut problems = verify::verify_programs(&node)?;
            problems.extend(verify::verify_deep(&node, &place)?);
            let mut problems: Vec<String> = problems.into_iter().map(|p| p.what).collect();
            if !listeners::complete(&node, &place)? {
                problems.push("ztunnel does not listen in the pod: look at this node's ztunnel pod and its log".to_owned());
            }
            Ok(problems)
        });
        let found = found.await?;
        Ok((!found.is_empty()).then(|| found.join("; ")))
    }

    fn captured(&self, place: &Netns) -> bool {
        let pod = self.node.maps().pods.get(&place.cookie().0);
        matches!(pod, Ok(Some(_)))
    }

    async fn collect(&self) {
        let node = Arc::clone(&self.node);
        match blocking(move || pod::collect(&node)).await {
            Ok(0) => {}
            Ok(count) => tracing::info!(count, "cleared away what was left of dead namespaces"),
            Err(failure) => {
                tracing::warn!(%failure, "clearing away what is left of dead namespaces");
            }
        }
    }

    fn strays(&self, known: &[Arc<Netns>]) -> usize {
        let known: BTreeSet<u64> = known.iter().map(|p| p.cookie().0).collect();
        let pods = self.node.maps().pods.keys().unwrap_or_default();
        pods.iter().filter(|c| !known.contains(c)).count()
    }

    fn cookie(&self, place: &Netns) -> u64 {
        place.cookie().0
    }
}

fn reference(target: &Target) -> PodRef {
    PodRef {
        uid: target.uid.clone(),
        namespace: target.namespace.clone(),
        name: target.name.clone(),
    }
}

fn workload(target: &Target) -> zds::Workload {
    zds::Workload {
        name: target.name.clone(),
        namespace: target.namespace.clone(),
        service_account: target.service_account.clone(),
    }
}

/// Has the kernel know ztunnel's listeners in the pod, those of process `pid`, that it missed.
fn fetch_listeners(node: &Node, netns: &Netns, pid: Option<u32>) -> kernel::Result<()> {
    if let Some(pid) = pid {
        listeners::fetch(node, netns, pid)?;
    }
    if listeners::complete(node, netns)? {
        return Ok(());
    }
    let mut error = kernel::Error::wrong(
        "find ztunnel's listeners in",
        netns.path().display(),
        "ztunnel acknowledged the pod but does not listen there on 15001, 15006 and 15008 with its mark",
        "look at ztunnel's log; it needs CAP_NET_ADMIN to mark its sockets",
    );
    error.retryable = true;
    Err(error)
}
