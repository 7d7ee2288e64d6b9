//! The plugin's requests, answered: which pod is it, does it belong to the mesh, is it safe to start.
//!
//! Knows no HTTP and takes no step itself; [`crate::reconcile`] does.

use std::{path::Path, sync::Arc, time::Duration};

use culvert_cni::api::{
    AddReply, AddRequest, CheckReply, CheckRequest, DelRequest, GcRequest, PodRef, Refusal,
    StatusReply, Timings, code,
};
use tokio::{sync::watch, time::Instant};

use crate::{
    admin::Installation,
    cni_server::Handler,
    kernel::Netns,
    model::{Cluster, Namespace, Pod, PodUid},
    plan::membership::{self, Settings},
    reconcile::{Answer, Reconciler, live::Live, world::Failure},
    traces::{self, Trace},
    watch::Source,
};

use super::added;

/// Kept back from the plugin's budget for the answer's way.
const MARGIN: Duration = Duration::from_millis(200);
/// How long the plugin waits for the cluster to be listed before it is told to decide alone: an agent that has just
/// started needs less, unless the API server is away.
const LIST_TAKES: Duration = Duration::from_secs(2);
/// How often a pod that nobody knows yet is looked for again.
const PAUSE: Duration = Duration::from_millis(100);

/// Answers the plugin.
#[derive(Debug)]
pub(super) struct Requests {
    pub(super) reconciler: Reconciler<Live>,
    pub(super) source: Arc<Source>,
    pub(super) cluster: watch::Receiver<Cluster>,
    pub(super) settings: Settings,
    pub(super) installation: Installation,
    /// Cookie of the node's own network namespace.
    pub(super) home: u64,
}

/// What a pod turned out to be.
enum Known {
    Pod(Box<Pod>, Option<Namespace>),
    /// Whatever pod it is, it is not of the mesh.
    Outside(String),
}

impl Handler for Requests {
    async fn add(&self, request: AddRequest) -> Result<AddReply, Refusal> {
        let trace = added::begin(&request);
        let result = traces::within(trace.as_ref(), self.added(request, trace.as_ref())).await;
        added::end(trace, &result);
        result
    }

    async fn del(&self, request: DelRequest) -> Result<(), Refusal> {
        self.reconciler.del(&attachment(
            &request.network,
            &request.container_id,
            &request.ifname,
        ));
        Ok(())
    }

    async fn check(&self, request: CheckRequest) -> Result<CheckReply, Refusal> {
        let place = open(&request.netns).await?;
        let (listed, uid) = {
            let cluster = self.cluster.borrow();
            let mut pods = cluster.pods.values();
            let named =
                |p: &&Pod| p.namespace == request.pod.namespace && p.name == request.pod.name;
            let uid = match &request.pod.uid {
                Some(uid) => Some(uid.as_str().into()),
                None => pods.find(named).map(|p| p.uid.clone()),
            };
            (cluster.listed, uid)
        };
        let checked = match uid {
            Some(uid) => self.reconciler.check(&uid, &place).await,
            // Older runtimes do not name the UID.
            None if listed => return Ok(CheckReply::default()),
            None => None,
        };
        let Some(checked) = checked else {
            return Err(unlisted());
        };
        match checked {
            Ok(Answer::Enrolled { .. }) => Ok(CheckReply {
                enrolled: true,
                problem: None,
            }),
            Ok(Answer::Outside(_)) => Ok(CheckReply::default()),
            Err(failure) => Ok(CheckReply {
                enrolled: true,
                problem: Some(failure.message),
            }),
        }
    }

    async fn gc(&self, request: GcRequest) -> Result<(), Refusal> {
        let living = request
            .valid
            .iter()
            .map(|a| attachment(&request.network, &a.container_id, &a.ifname))
            .collect();
        let network = format!("{}/", request.network);
        let gone = self
            .reconciler
            .gc(|sandbox| sandbox.starts_with(&network), &living);
        if gone > 0 {
            tracing::info!(
                gone,
                network = request.network,
                "let go of sandboxes that the runtime does not know any more"
            );
        }
        Ok(())
    }

    fn status(&self) -> StatusReply {
        StatusReply {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            broken: self.installation.fault(),
        }
    }
}

impl Requests {
    async fn added(&self, request: AddRequest, trace: Option<&Trace>) -> Result<AddReply, Refusal> {
        let started = Instant::now();
        let budget = Duration::from_millis(request.budget_ms);
        let deadline = started + budget.saturating_sub(MARGIN);
        // The plugin keeps it open only until it is answered.
        let place = open(&request.netns).await?;
        if place.cookie().0 == self.home {
            return Ok(outside(
                "it is in the node's own network namespace",
                Timings::default(),
            ));
        }
        let known = self.look_up(&request.pod, deadline).await;
        if let Some(trace) = trace {
            let failed = known.as_ref().err().map(|r| r.message.as_str());
            trace.step("look up", started.elapsed(), failed.map_or(Ok(()), Err));
        }
        let known = known?;
        let mut timings = Timings {
            lookup_us: micros(started.elapsed()),
            ..Timings::default()
        };
        let (pod, namespace) = match known {
            Known::Outside(why) => return Ok(outside(&why, timings)),
            Known::Pod(pod, namespace) => (pod, namespace),
        };
        let sandbox = attachment(&request.network, &request.container_id, &request.ifname);
        let answer = self
            .reconciler
            .add(&pod, namespace.as_ref(), place, &sandbox, deadline)
            .await;
        match answer {
            Ok(Answer::Outside(why)) => Ok(outside(&why, timings)),
            Ok(Answer::Enrolled { kernel, ztunnel }) => {
                timings.kernel_us = micros(kernel);
                timings.ztunnel_us = micros(ztunnel);
                Ok(AddReply {
                    enrolled: true,
                    reason: "captured, and ztunnel serves it".to_owned(),
                    timings,
                })
            }
            Err(failure) => Err(refusal(&failure)),
        }
    }

    /// Finds the pod and its namespace: in what is watched, or by asking.
    async fn look_up(&self, named: &PodRef, deadline: Instant) -> Result<Known, Refusal> {
        let started = Instant::now();
        loop {
            let refusal = match self.look_up_once(named).await {
                Ok(known) => return Ok(known),
                Err(refusal) => refusal,
            };
            let undecided = refusal.undecided && started.elapsed() >= LIST_TAKES;
            if !refusal.retry || undecided || Instant::now() + PAUSE >= deadline {
                return Err(refusal);
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn look_up_once(&self, named: &PodRef) -> Result<Known, Refusal> {
        if self.settings.excluded_namespaces.contains(&named.namespace) {
            return Ok(Known::Outside(
                "its namespace is excluded by configuration".to_owned(),
            ));
        }
        let (shown, namespace, could_be_in) = {
            let cluster = self.cluster.borrow();
            if !cluster.listed {
                return Err(unlisted());
            }
            let shown = named.uid.as_deref().and_then(|uid| {
                let mut pods = cluster.pods.values();
                let uid = PodUid::from(uid);
                pods.find(|p| p.is_called(&uid)).cloned()
            });
            let namespace = cluster.namespaces.get(&named.namespace).cloned();
            let could_be_in = namespace.as_ref().is_none_or(|ns| {
                if !cluster.opted_in_listed {
                    return true;
                }
                let opted_in = cluster.opted_in.get(&named.namespace).copied().unwrap_or(0);
                membership::could_be_in(&named.namespace, &ns.labels, opted_in, &self.settings)
            });
            (shown, namespace, could_be_in)
        };
        if let Some(pod) = shown {
            return Ok(Known::Pod(Box::new(pod), namespace));
        }
        match self.source.get_pod(&named.namespace, &named.name).await {
            Ok(Some(pod))
                if named
                    .uid
                    .as_deref()
                    .is_none_or(|uid| pod.is_called(&uid.into())) =>
            {
                Ok(Known::Pod(Box::new(pod), namespace))
            }
            Ok(_) => Err(Refusal::later(
                format!("the API server knows no pod {named} with this UID"),
                "wait; a pod that was deleted meanwhile is not tried again",
            )),
            // Whatever its labels are: nobody in that namespace asks for the mesh, as far as the watch tells.
            Err(error) if !could_be_in => {
                tracing::warn!(pod = %named, %error, "starts outside the mesh, as its namespace says, unseen");
                Ok(Known::Outside(
                    "nothing in its namespace asks for the mesh".to_owned(),
                ))
            }
            Err(error) => Err(Refusal::later(
                format!("the API server could not be asked about pod {named}: {error}"),
                "look at the API server and at the agent's way to it",
            )),
        }
    }
}

fn unlisted() -> Refusal {
    Refusal::undecided(
        "the agent does not know the cluster's pods and namespaces yet",
        "wait; if it lasts, the agent's log and /readyz say what keeps it from the API server",
    )
}

async fn open(path: &str) -> Result<Netns, Refusal> {
    let opened = if path.starts_with("/proc/") {
        // No file system is waited for there: two changes of threads would take longer than this.
        Netns::open(Path::new(path))
    } else {
        let owned = path.to_owned();
        let opened = tokio::task::spawn_blocking(move || Netns::open(Path::new(&owned)));
        let failed = |error| Refusal::later(format!("opening {path}: {error}"), "");
        opened.await.map_err(failed)?
    };
    opened.map_err(|error| {
        Refusal::for_good(
            code::INVALID_ENVIRONMENT,
            error.to_string(),
            "the agent must see the plugin's process: run it with hostPID: true",
        )
    })
}

fn attachment(network: &str, container_id: &str, ifname: &str) -> String {
    format!("{network}/{container_id}/{ifname}")
}

fn outside(why: &str, timings: Timings) -> AddReply {
    AddReply {
        enrolled: false,
        reason: why.to_owned(),
        timings,
    }
}

fn refusal(failure: &Failure) -> Refusal {
    let look = "`culvert status` and the pod's events say more";
    if failure.retry {
        Refusal::later(&failure.message, look)
    } else {
        Refusal::for_good(code::CANNOT_ENROL, &failure.message, look)
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
