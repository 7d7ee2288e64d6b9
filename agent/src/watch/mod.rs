//! Which pods and namespaces there are: from the Kubernetes API or from a directory of manifests, as plain data.
//!
//! Knows no kernel and decides nothing; writes nothing but an annotation and a condition of pods, and events.

pub mod api;
pub mod cilium;
pub mod client;
pub mod error;
pub mod events;
mod follow;
pub mod manifests;
mod objects;
mod outage;
mod parse;
mod policies;
pub mod preflight;
pub mod rbac;
pub mod removal;
pub mod stats;
mod token;
pub mod view;

use tokio::sync::watch;

pub use self::{
    api::{Api, Options, Written},
    cilium::Cilium,
    error::{Error, Result},
    events::{About, Kind, Notice},
    manifests::Manifests,
    removal::Standing,
};
use crate::model::{Cluster, Pod, PodRef, Redirection, Uncaptured};

/// Where pods and namespaces come from.
#[derive(Debug)]
pub enum Source {
    /// A Kubernetes API server.
    Api(Api),
    /// Files.
    Manifests(Manifests),
}

impl Source {
    /// The picture of the cluster: `borrow()` it for as short as possible, `changed()` tells when to look again.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<Cluster> {
        match self {
            Self::Api(api) => api.subscribe(),
            Self::Manifests(manifests) => manifests.subscribe(),
        }
    }

    /// Keeps the picture up to date until it is dropped.
    pub async fn run(&self) {
        match self {
            Self::Api(api) => api.run().await,
            Self::Manifests(manifests) => manifests.run().await,
        }
    }

    /// A pod that the picture does not show yet, asked for directly. Whether it is the one meant is for the caller to
    /// see: [`Pod::is_called`].
    pub async fn get_pod(&self, namespace: &str, name: &str) -> Result<Option<Pod>> {
        match self {
            Self::Api(api) => api.get_pod(namespace, name).await,
            Self::Manifests(manifests) => Ok(manifests.get_pod(namespace, name)),
        }
    }

    /// Tells istiod whether peers may speak HBONE to the pod; `None` takes it back.
    pub async fn set_redirection(&self, pod: &PodRef, to: Option<Redirection>) -> Result<Written> {
        match self {
            Self::Api(api) => api.set_redirection(pod, to).await,
            Self::Manifests(manifests) if manifests.set_redirection(pod, to) => Ok(Written::Done),
            Self::Manifests(_) => Ok(Written::Gone),
        }
    }

    /// Says by the pod's condition why it is not in the mesh; `None` takes it away. Manifests have no status.
    pub async fn set_uncaptured(&self, pod: &PodRef, to: Option<&Uncaptured>) -> Result<Written> {
        match self {
            Self::Api(api) => api.set_uncaptured(pod, to).await,
            Self::Manifests(_) => Ok(Written::Done),
        }
    }

    /// Says something about a pod or this node, where its users look. Never waits.
    pub fn event(&self, notice: Notice) {
        match self {
            Self::Api(api) => api.event(notice),
            Self::Manifests(_) => {
                let Notice {
                    about,
                    kind,
                    reason,
                    note,
                    ..
                } = notice;
                let about = match &about {
                    About::Pod(pod) => format!("pod {pod}"),
                    About::Node => "this node".into(),
                };
                match kind {
                    Kind::Normal => tracing::info!(about, reason, "{note}"),
                    Kind::Warning => tracing::warn!(about, reason, "{note}"),
                }
            }
        }
    }
}
