//! The tasks of the ZDS server: one that listens, one for each ztunnel that has connected.
//!
//! What they say and hear is decided in `registry`.

use std::{
    os::fd::AsFd as _,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::{Netns, Peer, Shared};
use crate::zds::{
    messages::Request,
    registry::PeerId,
    report::Event,
    socket::{Connection, Listener},
    terms::{Message, Reason, Step},
};

/// How long a pause after the kernel refused a connection, for want of descriptors most likely.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Whether a process may be a ztunnel.
pub(super) type Admit = Arc<dyn Fn(u32) -> Result<(), String> + Send + Sync>;

/// Takes ztunnels that may be let in, until stopped.
pub(super) async fn listen(
    shared: Arc<Shared>,
    listener: Listener,
    admit: Admit,
    stop: CancellationToken,
) {
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let (connection, credentials) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::error!(%error, "cannot accept a ztunnel's connection; if files are short, raise the agent's limit of open files");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        if credentials.uid != shared.options.uid {
            shared.refuse(&credentials, "it does not run as ztunnel's user");
            continue;
        }
        let Some(pid) = u32::try_from(credentials.pid).ok().filter(|pid| *pid > 0) else {
            shared.refuse(
                &credentials,
                "its process cannot be seen from here: run the agent with hostPID: true",
            );
            continue;
        };
        if shared.lock().peers.len() >= shared.options.peers {
            shared.refuse(&credentials, "too many ztunnels are connected");
            continue;
        }
        let admit = Arc::clone(&admit);
        let admitted = tokio::task::spawn_blocking(move || admit(pid)).await;
        if let Err(why) = admitted.unwrap_or_else(|error| Err(error.to_string())) {
            tracing::error!(pid, why, "a ztunnel cannot be served");
            shared.refuse(&credentials, "it cannot be named as ztunnel");
            continue;
        }
        let pidfd = credentials.pidfd.map(Arc::new);
        let changed = Arc::new(Notify::new());
        let id = {
            let mut state = shared.lock();
            let id = state.registry.connected(pid, Instant::now());
            let peer = Peer {
                pid,
                pidfd: pidfd.clone(),
                connected: SystemTime::now(),
                changed: Arc::clone(&changed),
            };
            state.peers.insert(id, peer);
            id
        };
        tracing::info!(pid, "a ztunnel has connected");
        shared.tell(Event::Connected { pid, pidfd });
        let (shared, stop) = (Arc::clone(&shared), stop.clone());
        tokio::spawn(async move {
            let _alarm = Alarm(&shared);
            let reason = tokio::select! {
                () = stop.cancelled() => Reason::Stopped,
                reason = converse(&shared, id, &connection, &changed) => reason,
            };
            // Before anybody is told: who falls back to another ztunnel must not find this one still listening.
            drop(connection);
            part(&shared, id, pid, reason);
        });
    }
}

/// Tells when a conversation breaks off in a panic: nobody would know that its ztunnel hears of no pod any more.
struct Alarm<'a>(&'a Shared);

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.ended.cancel();
        }
    }
}

fn part(shared: &Shared, id: PeerId, pid: u32, reason: Reason) {
    shared.change(|state| {
        state.registry.gone(id, &reason);
        state.peers.remove(&id);
        if matches!(reason, Reason::Late { .. } | Reason::NoHello(_)) {
            state.timeouts += 1;
        }
    });
    match &reason {
        Reason::HungUp | Reason::Stopped => tracing::info!(pid, %reason, "a ztunnel has gone"),
        _ => tracing::warn!(pid, %reason, "hung up on a ztunnel"),
    }
    shared.tell(Event::Disconnected { pid, reason });
}

async fn converse(
    shared: &Shared,
    id: PeerId,
    connection: &Connection,
    changed: &Notify,
) -> Reason {
    loop {
        let step = shared.lock().registry.next(id, Instant::now());
        match step {
            Step::Close(reason) => return reason,
            Step::Send(message, until) => {
                if let Err(reason) = send(shared, connection, message, until.into()).await {
                    return reason;
                }
            }
            Step::Wait(until) => tokio::select! {
                received = connection.receive() => {
                    let packet = match received {
                        Ok(Some(packet)) => packet,
                        Ok(None) => return Reason::HungUp,
                        Err(reason) => return reason,
                    };
                    let now = Instant::now();
                    if let Err(reason) = shared.change(|state| state.registry.heard(id, &packet, now)) {
                        return reason;
                    }
                }
                () = changed.notified() => {}
                () = sleep_until(until) => {}
            },
        }
    }
}

async fn send(
    shared: &Shared,
    connection: &Connection,
    message: Message<Netns>,
    until: tokio::time::Instant,
) -> Result<(), Reason> {
    let netns = match &message {
        Message::Add { netns, .. } => Some(netns.clone()),
        _ => None,
    };
    let fd = netns.as_ref().map(|netns| netns.fd.as_fd());
    let tries = connection
        .send(&Request::from(message).into_packet(), fd, until)
        .await?;
    shared.lock().send_retries += u64::from(tries);
    Ok(())
}

async fn sleep_until(until: Option<Instant>) {
    match until {
        Some(until) => tokio::time::sleep_until(until.into()).await,
        None => std::future::pending().await,
    }
}
