//! What tests run in pods: the image of `culvert-pod`, and pods made of it. Which pods a test needs is the test's.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use anyhow::Result;
use serde_json::{Value, json};

use crate::built::binary;
use crate::cluster::Cluster;
use crate::image::Image;

/// The image of `culvert-pod`; see its `--help` for what it does.
pub const POD: &str = "culvert.test/pod:1";
/// On which clusters this process has brought it.
static BROUGHT: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

impl Cluster {
    /// Makes [`POD`] known to all nodes, once.
    ///
    /// # Errors
    /// When it has not been built, or a node refuses it.
    pub fn add_workload(&self) -> Result<()> {
        let mut brought = BROUGHT.lock().unwrap_or_else(PoisonError::into_inner);
        let id = self.scratch().to_path_buf();
        if !brought.contains(&id) {
            let image = Image::new(POD)
                .program("bin/culvert-pod", binary("CULVERT_POD_BIN", "culvert-pod")?)?
                .entrypoint(&["/bin/culvert-pod"]);
            self.add_image(&image)?;
            brought.push(id);
        }
        Ok(())
    }
}

/// A pod of [`POD`] on a node, with these arguments; it is not started again when it ends. A server is ready when its port
/// is open.
#[must_use]
pub fn pod(name: &str, node: &str, args: &[&str]) -> Value {
    let mut pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            "nodeName": node,
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 1,
            "containers": [{"name": "main", "image": POD, "args": args}],
        },
    });
    if args.first() == Some(&"serve") {
        pod["spec"]["containers"][0]["readinessProbe"] =
            json!({"tcpSocket": {"port": 8080}, "periodSeconds": 1, "timeoutSeconds": 20});
    }
    pod
}
