//! One pod being served: its namespace, its listeners' lifetime, and everything its connections share.
//!
//! Owns start, drain and cut. What a connection does is in `outbound`, `inbound` and `hbone`.

use std::sync::Arc;

use rustls::ServerConfig;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::Config;
use crate::counters::Counters;
use crate::hbone::client::Pool;
use crate::identity::Credentials;
use crate::listeners;
use crate::messages::WorkloadInfo;
use crate::netns::Netns;
use crate::tls;

/// Who a pod is.
#[derive(Clone, Debug)]
pub struct Workload {
    /// The pod's UID.
    pub uid: String,
    /// Name, namespace and service account.
    pub info: WorkloadInfo,
}

/// A pod being served.
#[derive(Debug)]
pub struct Pod {
    /// Who it is.
    pub workload: Workload,
    /// Where its sockets are made.
    pub netns: Netns,
    /// What has happened in it.
    pub counters: Counters,
    /// What it proves its identity with.
    pub credentials: Credentials,
    /// How it answers other proxies.
    pub tls_server: Arc<ServerConfig>,
    /// Its connections to other proxies.
    pub pool: Pool,
    /// Settings shared by all pods.
    pub config: Arc<Config>,
    accepting: CancellationToken,
    alive: CancellationToken,
    tasks: TaskTracker,
}

impl Pod {
    /// Opens the pod's listeners and serves them until [`Pod::cut`].
    ///
    /// # Errors
    /// When a port is taken or the namespace cannot be entered; nothing is left behind.
    pub fn start(
        config: Arc<Config>,
        workload: Workload,
        netns: Netns,
    ) -> anyhow::Result<Arc<Self>> {
        let credentials = config.ca.issue(&workload.info)?;
        let tls_server = Arc::new(tls::server(&credentials)?);
        let opened = netns.run(|| listeners::open(config.dns_listen))??;
        let alive = CancellationToken::new();
        let pod = Arc::new(Self {
            workload,
            netns,
            counters: Counters::default(),
            credentials,
            tls_server,
            pool: Pool::default(),
            config,
            accepting: alive.child_token(),
            alive,
            tasks: TaskTracker::new(),
        });
        if let Err(error) = opened.serve(&pod) {
            pod.cut();
            return Err(error.into());
        }
        tracing::info!(uid = pod.workload.uid, pod = %pod.name(), netns = pod.netns.inode(), identity = %pod.credentials.id, "serving pod");
        Ok(pod)
    }

    /// `namespace/name`, for logs.
    #[must_use]
    pub fn name(&self) -> String {
        format!(
            "{}/{}",
            self.workload.info.namespace, self.workload.info.name
        )
    }

    /// Closes the listeners once their queues are empty; connections go on.
    pub fn stop_accepting(&self) {
        self.accepting.cancel();
        self.tasks.close();
    }

    /// Resolves when listeners are told to close.
    pub async fn draining(&self) {
        self.accepting.cancelled().await;
    }

    /// Resolves when the last connection has ended after [`Pod::stop_accepting`].
    pub async fn idle(&self) {
        self.tasks.wait().await;
    }

    /// Ends listeners and connections at once.
    pub fn cut(&self) {
        self.alive.cancel();
        self.tasks.close();
        tracing::info!(uid = self.workload.uid, pod = %self.name(), "pod is no longer served");
    }

    /// Runs something that a drain waits for.
    pub fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let alive = self.alive.clone();
        self.tasks.spawn(async move {
            alive.run_until_cancelled_owned(work).await;
        });
    }

    /// Runs something that ends with the pod but that a drain does not wait for.
    pub fn spawn_background(&self, work: impl Future<Output = ()> + Send + 'static) {
        let alive = self.alive.clone();
        tokio::spawn(async move {
            alive.run_until_cancelled_owned(work).await;
        });
    }
}
