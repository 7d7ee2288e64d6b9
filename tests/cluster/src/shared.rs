//! One cluster for all tests of a process: the one that `CULVERT_CLUSTER` names, or one started by the first test that
//! asks and ended with the process.
#![expect(
    unsafe_code,
    reason = "a handler for the end of the process is registered with the C library"
)]

use std::panic::catch_unwind;
use std::sync::OnceLock;

use anyhow::{Result, anyhow, ensure};

use crate::cluster::{Cluster, Options};

static SHARED: OnceLock<Result<Cluster, String>> = OnceLock::new();

impl Cluster {
    /// The cluster that all tests of this process share; the first call starts it.
    ///
    /// With `CULVERT_CLUSTER=NAME` it is one that runs already (`cargo xtask cluster up --name NAME`) and goes on.
    ///
    /// # Errors
    /// When it does not start, for every caller, or when the named one is another kind of cluster.
    pub fn shared(options: &Options) -> Result<&'static Self> {
        let start = || -> Result<Self> {
            if let Some(name) = std::env::var_os("CULVERT_CLUSTER") {
                let cluster = Self::attach(&name.to_string_lossy())?;
                let (nodes, wanted) = (cluster.nodes().len(), usize::from(options.nodes));
                ensure!(
                    nodes >= wanted && cluster.cni() == options.cni,
                    "cluster {} has {nodes} nodes and CNI {:?}, not {wanted} and {:?}",
                    cluster.name(),
                    cluster.cni(),
                    options.cni
                );
                return Ok(cluster);
            }
            let cluster = Self::up(options)?;
            // SAFETY: the handler is a plain function of this program, which outlives every handler.
            let registered = unsafe { libc::atexit(end) };
            ensure!(registered == 0, "no handler for the end of the process");
            Ok(cluster)
        };
        let started = SHARED.get_or_init(|| start().map_err(|error| format!("{error:#}")));
        started.as_ref().map_err(|error| anyhow!(error.clone()))
    }
}

/// Values in statics are never dropped.
extern "C" fn end() {
    // A panic must not cross into C.
    let ended = catch_unwind(|| {
        if let Some(Ok(cluster)) = SHARED.get()
            && let Err(error) = cluster.end()
        {
            eprintln!("{error:#}");
        }
    });
    if ended.is_err() {
        eprintln!("ending the shared cluster panicked");
    }
}
