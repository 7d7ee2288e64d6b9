//! The plugin's place on the host while the agent runs, and the question what becomes of it when the agent ends.

use std::{sync::Arc, time::Duration};

use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    admin::{Installation, Metrics, Task, installation::Part},
    config::Config,
    install::{Installer, Options, State, Status},
    watch::{About, Kind, Notice, Source, Standing},
};

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
    let mut before = Status::default();
    loop {
        let now = status.borrow_and_update().clone();
        report(&source, &task, &before, &now);
        match &now.state {
            // With a plugin of an agent before this one in its place, pods go on starting.
            State::Failed { error } if !installer.has_usable_plugin() => {
                installation.broken(Part::Plugin, error.clone());
            }
            _ => installation.whole(Part::Plugin),
        }
        before = now;
        tokio::select! {
            () = end.cancelled() => break,
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

fn report(source: &Source, task: &Task, before: &Status, now: &Status) {
    let why = match &now.state {
        State::Installed { .. } => return task.set_ready(),
        State::Waiting { reason } => reason.clone(),
        State::Contested { by } => format!(
            "the CNI configuration is overwritten again and again by {by}: pods that start in between start outside the \
             mesh and are enrolled a moment later"
        ),
        State::Failed { error } => error.clone(),
    };
    task.set_not_ready(why.clone());
    let loud = matches!(now.state, State::Contested { .. } | State::Failed { .. });
    if loud && before.state != now.state {
        source.event(Notice {
            about: About::Node,
            kind: Kind::Warning,
            reason: "CulvertCniConfiguration",
            action: "Install",
            note: why,
        });
    }
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
