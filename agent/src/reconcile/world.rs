//! What the reconciliation does to the world, as a list of verbs.
//!
//! One implementation acts for real ([`super::live`]); tests of retry and order have one of their own. Nothing here
//! decides.

use std::{collections::HashMap, fmt, future::Future, net::IpAddr, sync::Arc, time::Duration};

use crate::{
    kernel::{
        pod::Policy,
        verify::{Problem, Repair},
    },
    model::{PodUid, Redirection, Uncaptured},
};

/// A pod as the verbs name it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Target {
    /// `metadata.uid`.
    pub uid: PodUid,
    /// Its UID on the node where that is another (static pods).
    pub static_uid: Option<PodUid>,
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
    /// `spec.serviceAccountName`.
    pub service_account: String,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Why a verb failed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Failure {
    /// What happened, with the cure where there is one.
    pub message: String,
    /// Whether the same may succeed later without anybody changing anything.
    pub retry: bool,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// What [`World::release`] or [`World::detach`] left.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Left {
    /// Nothing.
    Nothing,
    /// Rules, for this many old connections.
    Connections(usize),
}

/// What is said about a pod to whoever looks after it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Notice {
    /// It is in the mesh now, which took this long without the waiting.
    Enrolled(Duration),
    /// It left the mesh.
    Unenrolled,
    /// It ended in the mesh.
    Ended,
    /// Something of ours was missing and is back.
    Repaired(Repair),
    /// These of ours in its network namespace had been taken away or changed, and are there again. They are counted.
    PutBack(Vec<Repair>),
    /// ztunnel listened in it and was not known to.
    Relistened,
    /// Somebody took its annotation away, and it is written again.
    Reannotated,
    /// It cannot be enrolled, or not yet.
    Failed(Failure),
    /// It is of a kind that cannot be served.
    Refused(String),
    /// A NetworkPolicy cuts it off from the mesh.
    CutOff(String),
    /// Something in its annotations was ignored.
    Ignored(String),
}

/// The verbs.
pub trait World: fmt::Debug + Send + Sync + 'static {
    /// A network namespace held open.
    type Place: std::fmt::Debug + Send + Sync + 'static;

    /// Finds the namespaces of running pods; those not found are left out.
    fn find(
        &self,
        pods: Vec<(Target, Vec<IpAddr>)>,
    ) -> impl Future<Output = Result<HashMap<PodUid, Arc<Self::Place>>, Failure>> + Send;

    /// Finds the namespaces of running pods by cookie; those not found are left out.
    fn recover(
        &self,
        pods: Vec<(Target, u64)>,
    ) -> impl Future<Output = HashMap<PodUid, Arc<Self::Place>>> + Send;

    /// Makes the kernel capture the pod as the policy says.
    fn attach(
        &self,
        target: &Target,
        place: Arc<Self::Place>,
        policy: Policy,
    ) -> impl Future<Output = Result<(), Failure>> + Send;

    /// Lets a living pod's new connections go direct; what comes by ztunnel is still delivered.
    fn release(
        &self,
        target: &Target,
        place: Arc<Self::Place>,
    ) -> impl Future<Output = Result<Left, Failure>> + Send;

    /// Lets a living pod go.
    fn detach(
        &self,
        target: &Target,
        place: Arc<Self::Place>,
    ) -> impl Future<Output = Result<Left, Failure>> + Send;

    /// Whether processes of a pod that its API no longer knows still run: force-deleted, it is gone there before the
    /// kubelet has ended it.
    fn inhabited(&self, place: Arc<Self::Place>) -> impl Future<Output = bool> + Send;

    /// Clears away what is left of a pod that is gone.
    fn forget(
        &self,
        target: &Target,
        place: Arc<Self::Place>,
    ) -> impl Future<Output = Result<(), Failure>> + Send;

    /// Tells ztunnel and waits until it serves the pod.
    fn tell(
        &self,
        target: &Target,
        place: Arc<Self::Place>,
    ) -> impl Future<Output = Result<(), Failure>> + Send;

    /// ztunnel will be told of this pod later.
    fn expect(&self, target: &Target);

    /// Takes the pod from ztunnel.
    fn untell(&self, target: &Target) -> impl Future<Output = Result<(), Failure>> + Send;

    /// Writes the annotation; a pod that is gone is no failure.
    fn annotate(
        &self,
        target: &Target,
        value: Option<Redirection>,
    ) -> impl Future<Output = Result<(), Failure>> + Send;

    /// Says by a condition of the pod why it is not in the mesh, or takes the condition away; a pod that is gone is no
    /// failure.
    fn condition(
        &self,
        target: &Target,
        to: Option<&Uncaptured>,
    ) -> impl Future<Output = Result<(), Failure>> + Send;

    /// Says something about the pod.
    fn say(&self, target: &Target, notice: Notice) -> impl Future<Output = ()> + Send;

    /// Which of these are not as [`World::attach`] left them, and what is wrong. What all of them need and none brings
    /// along, the node's own programs, is put right at once.
    fn verify(
        &self,
        places: Vec<(PodUid, Arc<Self::Place>)>,
    ) -> impl Future<Output = Vec<(PodUid, Problem)>> + Send;

    /// Everything about one pod that [`World::attach`] made: what is wrong with it, if anything.
    fn examine(
        &self,
        place: Arc<Self::Place>,
    ) -> impl Future<Output = Result<Option<String>, Failure>> + Send;

    /// Does the kernel capture this namespace?
    fn captured(&self, place: &Self::Place) -> bool;

    /// Clears away what is left of namespaces that are gone.
    fn collect(&self) -> impl Future<Output = ()> + Send;

    /// How many namespaces the kernel captures besides these.
    fn strays(&self, known: &[Arc<Self::Place>]) -> usize;

    /// The namespace's cookie: never another's until the node boots anew.
    fn cookie(&self, place: &Self::Place) -> u64;
}
