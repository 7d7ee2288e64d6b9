//! What deserves attention about the programs that capture lookups, in readiness and so in `culvert status`. Without them
//! the agent is ready all the same: only pods that are to have DNS capture need them, and each says so itself.

use std::{sync::Arc, time::Duration};

use crate::{
    admin::Task,
    kernel::{Node, dns},
};

/// The passes over all pods look; this only says what they saw.
const LOOK: Duration = Duration::from_secs(1);

/// Says it at each change.
pub(super) async fn show(node: Arc<Node>, task: Task) {
    loop {
        task.set_ready_but(dns::attention(&node).join("; "));
        tokio::time::sleep(LOOK).await;
    }
}
