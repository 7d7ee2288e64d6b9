//! What an agent that cannot work leaves behind at its own pod before it ends: an event, where `kubectl describe` shows
//! it. Its last line of log is the caller's.

use std::{env, time::Duration};

use crate::watch::{client, events};

/// The end is not held up for longer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Tells of it, as far as that is possible: without a pod, or with nobody who listens, the log has it.
pub fn tell(error: &anyhow::Error) {
    let (Ok(pod), Ok(namespace)) = (env::var("POD_NAME"), env::var("POD_NAMESPACE")) else {
        return;
    };
    // The agent's own may be what has failed.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let Ok(runtime) = runtime else {
        return;
    };
    let note = format!("{error:#}");
    let told = async {
        let client = client::connect(&client::config(None).await?)?;
        events::tell_of_end(&client, &namespace, &pod, note).await
    };
    match runtime.block_on(async { tokio::time::timeout(PATIENCE, told).await }) {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "no event tells of the end"),
        Err(_) => tracing::debug!("no event tells of the end: no answer in time"),
    }
}
