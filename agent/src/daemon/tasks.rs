//! The agent's long-lived tasks: begun under a name, waited for at the end.
//!
//! One that is over before the agent is takes the agent with it. Half an agent looks alive, answers and lets pods slip; one
//! that ends is started anew by the kubelet, and finds everything again.

use std::{any::Any, collections::HashMap};

use tokio::task::{Id, JoinError, JoinSet};
use tokio_util::sync::CancellationToken;

/// A task that was not to end and did.
#[derive(Debug, thiserror::Error)]
#[error(
    "task {name} {how}, though the agent was not told to end: it ends now, to be started anew; pods stay captured, and what \
     went before it in the log is worth a report"
)]
pub(super) struct Died {
    name: &'static str,
    how: String,
}

/// Tasks under their names.
pub(super) struct Tasks {
    running: JoinSet<()>,
    named: HashMap<Id, Named>,
    end: CancellationToken,
}

struct Named {
    name: &'static str,
    /// It is over when its work is done.
    once: bool,
}

impl Tasks {
    /// None yet; `end` is when they may end.
    pub(super) fn new(end: CancellationToken) -> Self {
        Self {
            running: JoinSet::new(),
            named: HashMap::new(),
            end,
        }
    }

    /// Begins what goes on until the end, which it sees for itself.
    pub(super) fn keep(
        &mut self,
        name: &'static str,
        work: impl Future<Output = ()> + Send + 'static,
    ) {
        self.begin(Named { name, once: false }, work);
    }

    /// Begins what is dropped at the end.
    pub(super) fn keep_until_end(
        &mut self,
        name: &'static str,
        work: impl Future<Output = ()> + Send + 'static,
    ) {
        let work = until(self.end.clone(), work);
        self.begin(Named { name, once: false }, work);
    }

    /// Begins what is over when it is done, or dropped at the end.
    pub(super) fn once(
        &mut self,
        name: &'static str,
        work: impl Future<Output = ()> + Send + 'static,
    ) {
        let work = until(self.end.clone(), work);
        self.begin(Named { name, once: true }, work);
    }

    fn begin(&mut self, named: Named, work: impl Future<Output = ()> + Send + 'static) {
        let id = self.running.spawn(work).id();
        self.named.insert(id, named);
    }

    /// Waits for the first that ends without being told to. Nothing is lost when it is dropped meanwhile.
    pub(super) async fn death(&mut self) -> Died {
        loop {
            let Some(ended) = self.running.join_next_with_id().await else {
                // Nobody is left who could die.
                return std::future::pending().await;
            };
            if let Some(died) = self.judge(ended) {
                return died;
            }
        }
    }

    /// Waits until all are over, and tells of those that did not end well.
    pub(super) async fn finish(&mut self) {
        while let Some(ended) = self.running.join_next_with_id().await {
            if let Some(died) = self.judge(ended) {
                tracing::error!(task = died.name, how = died.how, "did not end well");
            }
        }
    }

    fn judge(&mut self, ended: Result<(Id, ()), JoinError>) -> Option<Died> {
        let (id, failure) = match ended {
            Ok((id, ())) => (id, None),
            Err(error) => (error.id(), Some(error)),
        };
        let Named { name, once } = self.named.remove(&id)?;
        let how = match failure {
            None if once || self.end.is_cancelled() => return None,
            None => "ended".to_owned(),
            Some(error) => match error.try_into_panic() {
                Ok(panic) => format!("panicked ({})", message(&*panic)),
                Err(error) => error.to_string(),
            },
        };
        Some(Died { name, how })
    }
}

/// Drops a future at the end.
async fn until(end: CancellationToken, work: impl Future<Output = ()>) {
    tokio::select! {
        () = end.cancelled() => {}
        () = work => {}
    }
}

/// What a panic said.
fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("without a word")
}

#[cfg(test)]
mod tests {
    use std::{future::pending, time::Duration};

    use super::*;

    async fn death(tasks: &mut Tasks) -> Option<String> {
        let died = tokio::time::timeout(Duration::from_secs(60), tasks.death()).await;
        died.ok().map(|died| died.to_string())
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_panics_or_ends_is_named() {
        let mut tasks = Tasks::new(CancellationToken::new());
        tasks.keep_until_end("lives", pending());
        tasks.once("done", async {});
        assert_eq!(death(&mut tasks).await, None, "what is done has not died");
        tasks.keep("source", async { panic!("{} things", 7) });
        let said = death(&mut tasks).await.unwrap();
        assert!(said.contains("task source panicked (7 things)"), "{said}");
        tasks.keep("reconciler", async {});
        let said = death(&mut tasks).await.unwrap();
        assert!(said.contains("task reconciler ended"), "{said}");
        tasks.once("opening", async { panic!("no") });
        let said = death(&mut tasks).await.unwrap();
        assert!(said.contains("task opening panicked (no)"), "{said}");
    }

    #[tokio::test(start_paused = true)]
    async fn at_the_end_they_end() {
        let end = CancellationToken::new();
        let mut tasks = Tasks::new(end.clone());
        tasks.keep_until_end("dropped", pending());
        tasks.keep("sees it", {
            let end = end.clone();
            async move { end.cancelled().await }
        });
        end.cancel();
        assert_eq!(death(&mut tasks).await, None);
        tasks.finish().await;
    }
}
