//! The plugin's place on the host while the agent runs, and the question what becomes of it when the agent ends.

use std::{env, sync::Arc, time::Duration};

use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    admin::{Installation, Metrics, Task, installation::Part},
    config::Config,
    install::{Installer, Options, State, Status},
    model::PodRef,
    watch::{About, Kind, Notice, Source, Standing},
};

/// A node that has just begun has no CNI configuration yet; one that has none for so long needs somebody.
const LONG_WAIT: Duration = Duration::from_secs(30);

/// Installs, heals, and reports how it stands; after `end`, takes everything away if no agent will follow.
pub(super) async fn keep(
    config: Config,
    source: Arc<Source>,
    metrics: Arc<Metrics>,
    task: Task,
    installation: Installation,
    end: CancellationToken,
) {
    let installer = Arc::new(Installer::new(Options::from(&config)));
    // With a plugin and no agent that can answer it, no pod starts.
    if !installer.has_plugin() && !knows_pods(&source, &task, &end).await {
        return;
    }
    let (sender, mut status) = watch::channel(Status::default());
    metrics.count_installer({
        let status = status.clone();
        move || status.borrow().clone()
    });
    let work = tokio::spawn(Arc::clone(&installer).watch(sender, end.clone()));
    let mut loud = Loud::default();
    loop {
        let now = status.borrow_and_update().clone();
        show(&task, &now.state);
        match &now.state {
            // With a plugin of an agent before this one in its place, pods go on starting.
            State::Failed { error } if !installer.has_usable_plugin() => {
                installation.broken(Part::Plugin, error.clone());
            }
            _ => installation.whole(Part::Plugin),
        }
        if let Some(note) = loud.note(&now.state, Instant::now()) {
            tell(&source, note).await;
        }
        tokio::select! {
            () = end.cancelled() => break,
            () = loud.due() => {}
            changed = status.changed() => match changed {
                Ok(()) => {}
                Err(_) if end.is_cancelled() => break,
                // It has died, and so does the agent: nothing is taken away for that.
                Err(_) => return,
            },
        }
    }
    let until = Instant::now() + for_asking(config.shutdown_timeout);
    if let Err(error) = work.await {
        tracing::error!(%error, "the installer did not end well");
    }
    if let Some(why) = removal(&config, &source, until).await {
        tracing::warn!(
            why,
            "taking the plugin and its configuration away; running pods stay captured"
        );
        if let Err(errors) = tokio::task::block_in_place(|| installer.uninstall()) {
            for error in errors {
                tracing::error!(%error, "taking the plugin away");
            }
        }
    }
}

/// Waits until it is known which pods there are; false when the end comes first.
async fn knows_pods(source: &Source, task: &Task, end: &CancellationToken) -> bool {
    task.set_not_ready(
        "nothing is put in place before pods and namespaces have been listed once: see `watch`",
    );
    let mut cluster = source.subscribe();
    tokio::select! {
        () = end.cancelled() => false,
        listed = cluster.wait_for(|cluster| cluster.listed) => listed.is_ok(),
    }
}

/// In readiness.
fn show(task: &Task, state: &State) {
    match why_not(state) {
        None => task.set_ready(),
        Some(why) => task.set_not_ready(why),
    }
}

/// Why the plugin is not in its place; none = it is.
fn why_not(state: &State) -> Option<String> {
    match state {
        State::Installed { .. } => None,
        State::Waiting { reason } => Some(reason.clone()),
        State::Contested { by } => Some(format!(
            "the CNI configuration is overwritten again and again by {by}: pods that start in between start outside the \
             mesh and are enrolled a moment later"
        )),
        State::Failed { error } => Some(error.clone()),
    }
}

/// When an event is due: at once where something is wrong, and where something is only waited for once it has been long.
#[derive(Debug, Default)]
struct Loud {
    /// It is waited since then.
    waiting: Option<Instant>,
    /// What was said last, and still is so.
    said: Option<String>,
}

impl Loud {
    /// What there is to say now that has not been said.
    fn note(&mut self, state: &State, now: Instant) -> Option<String> {
        let Some(why) = why_not(state) else {
            *self = Self::default();
            return None;
        };
        let note = if matches!(state, State::Waiting { .. }) {
            let since = *self.waiting.get_or_insert(now);
            if now < since + LONG_WAIT {
                return None;
            }
            format!(
                "the CNI plugin is not in place after {} s: {why}; until it is, pods of the mesh start outside it and are \
                 enrolled a moment later",
                LONG_WAIT.as_secs()
            )
        } else {
            self.waiting = None;
            why
        };
        let new = self.said.as_ref() != Some(&note);
        new.then(|| self.said.insert(note).clone())
    }

    /// Returns when there may be something to say without a change.
    async fn due(&self) {
        match (self.waiting, &self.said) {
            (Some(since), None) => tokio::time::sleep_until(since + LONG_WAIT).await,
            _ => std::future::pending().await,
        }
    }
}

/// An event on the node, and on the agent's own pod where it has one: that is where an installation is looked after.
async fn tell(source: &Source, note: String) {
    let event = |about, note| {
        source.event(Notice {
            about,
            kind: Kind::Warning,
            reason: "CulvertCniConfiguration",
            action: "Install",
            note,
        });
    };
    event(About::Node, note.clone());
    if let Some(pod) = own_pod(source).await {
        event(About::Pod(pod), note);
    }
}

async fn own_pod(source: &Source) -> Option<PodRef> {
    let Source::Api(api) = source else {
        return None;
    };
    let (name, namespace) = (env::var("POD_NAME").ok()?, env::var("POD_NAMESPACE").ok()?);
    // `kubectl describe` looks for events by the pod's UID.
    let pod = api.get_pod(&namespace, &name).await.ok()??;
    Some(pod.reference())
}

/// Of the time for ending, how much may pass before it is known what becomes of everything. The rest is for taking it away.
fn for_asking(all: Duration) -> Duration {
    all * 2 / 3
}

/// The answer, if it comes in time.
async fn in_time(asked: impl Future<Output = Standing>, until: Instant) -> Standing {
    let answer = tokio::time::timeout_at(until, asked).await;
    answer.unwrap_or_else(|_| {
        Standing::Unknown("the API server has not answered in time to act upon it".to_owned())
    })
}

/// Why everything is to be taken away; none to leave it for the next agent.
async fn removal(config: &Config, source: &Source, until: Instant) -> Option<String> {
    if config.disable_safe_upgrade {
        return Some("safe upgrades are switched off".to_owned());
    }
    let Source::Api(api) = source else {
        return None;
    };
    let Some(namespace) = &config.daemonset_namespace else {
        tracing::warn!(
            "left in place: without --daemonset-namespace nobody can tell an upgrade from a removal"
        );
        return None;
    };
    match in_time(api.standing(namespace, &config.daemonset_name), until).await {
        Standing::Removed(why) => Some(why),
        Standing::Stays => None,
        Standing::Unknown(why) => {
            tracing::warn!(
                why,
                "cannot tell an upgrade from a removal: everything is left in place"
            );
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waiting(reason: &str) -> State {
        State::Waiting {
            reason: reason.to_owned(),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_only_waited_for_is_said_when_it_is_long() {
        let mut loud = Loud::default();
        let started = Instant::now();
        assert_eq!(loud.note(&waiting("no file"), started), None);
        loud.due().await;
        assert_eq!(started.elapsed(), LONG_WAIT);
        let note = loud.note(&waiting("no file"), Instant::now()).unwrap();
        assert!(note.contains("not in place after 30 s: no file"), "{note}");
        assert_eq!(loud.note(&waiting("no file"), Instant::now()), None);
        let other = loud.note(&waiting("a broken file"), Instant::now());
        assert!(other.is_some_and(|note| note.contains("a broken file")));
        // What is over and begins anew is waited for anew.
        let installed = State::Installed {
            entry_in: "/x".into(),
        };
        assert_eq!(loud.note(&installed, Instant::now()), None);
        assert_eq!(loud.note(&waiting("no file"), Instant::now()), None);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_wrong_is_said_at_once_and_once() {
        let mut loud = Loud::default();
        let failed = State::Failed {
            error: "read-only".to_owned(),
        };
        let now = Instant::now();
        assert_eq!(loud.note(&failed, now).as_deref(), Some("read-only"));
        assert_eq!(loud.note(&failed, now), None);
        let never = tokio::time::timeout(LONG_WAIT * 10, loud.due()).await;
        assert!(never.is_err(), "nothing is due");
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_is_waited_for_no_longer_than_leaves_time_to_act_upon_it() {
        let all = Duration::from_secs(10);
        let started = Instant::now();
        let until = started + for_asking(all);
        let gone = Standing::Removed("gone".to_owned());
        let slow = async {
            // A request over a connection that has died, and the one after it.
            tokio::time::sleep(Duration::from_secs(6)).await;
            gone.clone()
        };
        assert_eq!(in_time(slow, until).await, gone);
        let never = in_time(std::future::pending(), until).await;
        assert!(matches!(never, Standing::Unknown(_)), "{never:?}");
        assert!(started.elapsed() <= all - Duration::from_secs(3));
    }
}
