//! Ending in good order: told by a signal, with a deadline after which what is left is left.

use std::{future::Future, io, time::Duration};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Tells every part of the agent when to stop.
#[derive(Clone, Debug)]
pub struct Shutdown {
    stop: CancellationToken,
    hurry: CancellationToken,
    timeout: Duration,
}

/// How the last work ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ended<T> {
    /// It was finished.
    Done(T),
    /// The deadline came first.
    TimedOut,
    /// A second signal came first.
    Hurried,
}

impl Shutdown {
    /// Listens for SIGTERM and SIGINT from now on. Inside a tokio runtime.
    pub fn on_signals(timeout: Duration) -> io::Result<Self> {
        let shutdown = Self::manual(timeout);
        let mut signals = (
            signal(SignalKind::terminate())?,
            signal(SignalKind::interrupt())?,
        );
        let Self { stop, hurry, .. } = shutdown.clone();
        tokio::spawn(async move {
            let name = next(&mut signals).await;
            tracing::info!(signal = name, "stopping; pods stay captured");
            stop.cancel();
            let name = next(&mut signals).await;
            tracing::warn!(signal = name, "told again: stopping at once");
            hurry.cancel();
        });
        Ok(shutdown)
    }

    /// Told by [`Shutdown::stop`] alone.
    #[must_use]
    pub fn manual(timeout: Duration) -> Self {
        Self {
            stop: CancellationToken::new(),
            hurry: CancellationToken::new(),
            timeout,
        }
    }

    /// Stops, as a signal does.
    pub fn stop(&self) {
        self.stop.cancel();
    }

    /// For the parts: cancelled when it is time to stop.
    #[must_use]
    pub fn token(&self) -> CancellationToken {
        self.stop.clone()
    }

    /// Waits until it is time to stop.
    pub async fn requested(&self) {
        self.stop.cancelled().await;
    }

    /// Runs the last work, for as long as there is time and nobody hurries.
    pub async fn finish<T>(&self, work: impl Future<Output = T>) -> Ended<T> {
        tokio::select! {
            biased;
            done = work => Ended::Done(done),
            () = self.hurry.cancelled() => Ended::Hurried,
            () = tokio::time::sleep(self.timeout) => Ended::TimedOut,
        }
    }
}

async fn next((terminate, interrupt): &mut (Signal, Signal)) -> &'static str {
    tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_that_never_ends_is_left() {
        let shutdown = Shutdown::manual(Duration::from_millis(20));
        shutdown.stop();
        shutdown.requested().await;
        assert_eq!(shutdown.finish(async { 7 }).await, Ended::Done(7));
        let never = std::future::pending::<()>();
        assert_eq!(shutdown.finish(never).await, Ended::TimedOut);
    }

    #[tokio::test]
    async fn sigterm_stops_and_a_second_one_hurries() {
        let shutdown = Shutdown::on_signals(Duration::from_secs(60)).unwrap();
        let me = nix::unistd::Pid::this();
        nix::sys::signal::kill(me, nix::sys::signal::Signal::SIGTERM).unwrap();
        tokio::time::timeout(Duration::from_secs(10), shutdown.requested())
            .await
            .unwrap();
        let again = async {
            nix::sys::signal::kill(me, nix::sys::signal::Signal::SIGTERM).unwrap();
            std::future::pending::<()>().await;
        };
        let ended = tokio::time::timeout(Duration::from_secs(10), shutdown.finish(again)).await;
        assert_eq!(ended, Ok(Ended::Hurried));
    }
}
