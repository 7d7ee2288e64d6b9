//! Keeping the plugin in its place: looks again at every change of the directories and every few seconds, mends, and says
//! how it stands.
//!
//! Decides when to look and what to call the outcome; what to change is for the plan.

use std::{
    collections::{BTreeMap, VecDeque},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use notify::{EventKind, RecursiveMode, Watcher as _, event::AccessKind};
use serde::Serialize;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use super::{
    Cause, Error, Installer, Operation, Plan, active,
    party::{self, Party},
};

/// Without any event: a directory may be mounted anew, or the kernel's queue may run over.
const PERIOD: Duration = Duration::from_secs(5);
/// A writer that does not rename writes in several steps: one look when it is quiet.
const QUIET: Duration = Duration::from_millis(20);
/// But a writer that never rests must not keep us from mending.
const RESTLESS: Duration = Duration::from_millis(200);
/// In a fight each turn costs both sides a flushed disk: less often, but still within the second.
const FIGHT: Duration = Duration::from_millis(300);
/// As long as the file that counted is there but broken, it may be in the middle of being written.
const PATIENCE: Duration = Duration::from_millis(500);
/// Our lists whose original is gone stay this long: its owner may only be replacing it.
const ORPHAN: Duration = Duration::from_secs(2);
/// Mended more often than this in [`WINDOW`], somebody works against us.
const CONTESTED: usize = 5;
/// See [`CONTESTED`].
const WINDOW: Duration = Duration::from_secs(60);

/// How the plugin's place stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase", tag = "state")]
pub enum State {
    /// Nothing to put our entry in yet. Nothing is wrong with us.
    Waiting {
        /// What it waits for.
        reason: String,
    },
    /// Plugin and entry are in place.
    Installed {
        /// The file with the entry.
        entry_in: PathBuf,
    },
    /// Mended again and again: pods that start between may start outside the mesh.
    Contested {
        /// Who undoes it, as best as can be told.
        by: String,
    },
    /// It cannot be put in place.
    Failed {
        /// Why, and what cures it.
        error: String,
    },
}

/// How the plugin's place stands, and how often something was done about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Status {
    /// Now.
    pub state: State,
    /// Times something was put in place, the first included.
    pub installs: u64,
    /// Of those, times that it had been in place and was undone.
    pub healed: u64,
    /// Times the plugin could not be copied.
    pub plugin_failures: u64,
    /// Times the configuration could not be written.
    pub configuration_failures: u64,
}

impl Default for Status {
    fn default() -> Self {
        let state = State::Waiting {
            reason: "the installer has not begun yet".to_owned(),
        };
        Self {
            state,
            installs: 0,
            healed: 0,
            plugin_failures: 0,
            configuration_failures: 0,
        }
    }
}

/// What one look found and did.
struct Round {
    outcome: Outcome,
    /// The configuration that counts.
    active: Option<String>,
    /// Directories that hold what counts.
    dirs: Vec<PathBuf>,
}

enum Outcome {
    /// All was in place.
    InPlace(PathBuf),
    /// Something was put in place; by whom it had been undone.
    Mended(PathBuf, Party),
    /// Nothing to put our entry in; whether lists of ours have lost their original.
    Waiting {
        reason: String,
        orphans: bool,
    },
    /// Look again soon: somebody is writing.
    Busy,
    Failed(Error),
}

/// What is remembered from one look to the next.
#[derive(Default)]
struct Memory {
    was_installed: bool,
    active: Option<String>,
    broken_since: Option<Instant>,
    orphaned_since: Option<Instant>,
    mended: VecDeque<Instant>,
    by: String,
    /// What was last logged, so that it is not every few seconds.
    said: String,
}

impl Installer {
    /// Installs, and keeps it so until `stop`.
    ///
    /// On the way out it leaves everything as it is: whether to remove it is for whoever stops it to ask.
    pub async fn watch(self: Arc<Self>, status: watch::Sender<Status>, stop: CancellationToken) {
        let wake = Arc::new(Notify::new());
        let mut watches = Watches::new(&wake);
        let mut memory = Memory::default();
        loop {
            let installer = Arc::clone(&self);
            let give_up = memory
                .orphaned_since
                .is_some_and(|since| since.elapsed() >= ORPHAN);
            let patient = memory
                .broken_since
                .is_none_or(|since| since.elapsed() < PATIENCE);
            let keep = memory.active.clone().filter(|_| patient);
            let round =
                tokio::task::spawn_blocking(move || installer.round(keep.as_deref(), give_up))
                    .await;
            let Ok(round) = round else {
                // Only a panic ends a blocking task, and a runtime that is shutting down.
                status.send_modify(|s| {
                    s.state = State::Failed {
                        error: "the installer stopped: see the log".to_owned(),
                    }
                });
                return;
            };
            watches.follow(&round.dirs);
            let next = memory.take(round, &status, &self.options.bin_dir);
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(next) => {}
                () = wake.notified() => settle(&wake, if memory.is_contested() { FIGHT } else { QUIET }).await,
            }
        }
    }

    /// Looks once and mends. `keep` is the configuration that counted last: as long as it is there but broken, no other
    /// takes its place. With `give_up`, lists of ours that have lost their original go.
    fn round(&self, keep: Option<&str>, give_up: bool) -> Round {
        let mut dirs = vec![self.options.conf_dir.clone(), self.options.bin_dir.clone()];
        let mut plan = match self.plan() {
            Ok(plan) => plan,
            Err(e) => {
                return Round {
                    outcome: Outcome::Failed(e),
                    active: keep.map(str::to_owned),
                    dirs,
                };
            }
        };
        dirs.extend(plan.entry_in.as_deref().and_then(link_target));
        dirs.extend(
            plan.active
                .as_deref()
                .and_then(|n| link_target(&self.options.conf_dir.join(n))),
        );
        let active = plan.active.clone();
        let done = |outcome| Round {
            outcome,
            active,
            dirs,
        };
        if let Some(keep) = keep
            && plan.active.as_deref().is_none_or(|now| now > keep)
            && self.options.conf_dir.join(keep).exists()
        {
            return Round {
                active: Some(keep.to_owned()),
                ..done(Outcome::Busy)
            };
        }
        let orphans = !plan.orphans.is_empty();
        if give_up {
            plan.operations.append(&mut plan.orphans);
        }
        // What a killed run of ours left lying about is nobody's doing.
        let undone = plan
            .operations
            .iter()
            .any(|o| !matches!(o, Operation::Sweep { .. }));
        let by = undone.then(|| self.culprit(&plan));
        match self.apply(&plan) {
            Err(Error {
                cause: Cause::Changed,
                ..
            }) => return done(Outcome::Busy),
            Err(e) => return done(Outcome::Failed(e)),
            Ok(()) => {}
        }
        done(match (plan.waiting, plan.entry_in) {
            (None, Some(entry_in)) => match by {
                Some(by) => Outcome::Mended(entry_in, by),
                None => Outcome::InPlace(entry_in),
            },
            (reason, _) => Outcome::Waiting {
                reason: reason.unwrap_or_default(),
                orphans: orphans && !give_up,
            },
        })
    }

    /// Who may have undone what this plan mends.
    fn culprit(&self, plan: &Plan) -> Party {
        let files = active::scan(&self.options.conf_dir).unwrap_or_default();
        let conf = plan.operations.iter().find(|o| {
            matches!(
                o,
                Operation::Write { .. } | Operation::Link { .. } | Operation::Remove { .. }
            )
        });
        let Some(path) = conf.map(Operation::path) else {
            return Party {
                who: format!(
                    "whoever replaces or removes {}",
                    self.options.bin_dir.join(super::PLUGIN).display()
                ),
                known: false,
            };
        };
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let file = files.iter().find(|f| f.name == name);
        let types = file.map(active::types).unwrap_or_default();
        party::name(&name, &files, &types)
    }
}

/// The directory of what a link leads to.
fn link_target(path: &Path) -> Option<PathBuf> {
    path.read_link().ok()?;
    Some(path.canonicalize().ok()?.parent()?.to_owned())
}

/// Waits until whoever is writing has finished, but not forever.
async fn settle(wake: &Notify, quiet: Duration) {
    let _ = tokio::time::timeout(RESTLESS.max(quiet), async {
        while tokio::time::timeout(quiet, wake.notified()).await.is_ok() {}
    })
    .await;
}

impl Memory {
    /// Takes in what a look found, tells, and says when to look again at the latest.
    fn take(&mut self, round: Round, status: &watch::Sender<Status>, bin_dir: &Path) -> Duration {
        let now = Instant::now();
        while self
            .mended
            .front()
            .is_some_and(|at| now.duration_since(*at) > WINDOW)
        {
            self.mended.pop_front();
        }
        self.active = round.active;
        let (orphaned, busy) = match &round.outcome {
            Outcome::Waiting { orphans, .. } => (*orphans, false),
            Outcome::Busy => (false, true),
            _ => (false, false),
        };
        self.orphaned_since = if orphaned {
            self.orphaned_since.or(Some(now))
        } else {
            None
        };
        self.broken_since = if busy {
            self.broken_since.or(Some(now))
        } else {
            None
        };
        let tell = |change: &mut dyn FnMut(&mut Status)| {
            status.send_if_modified(|s| {
                let before = s.clone();
                change(s);
                *s != before
            });
        };
        match round.outcome {
            Outcome::Busy => return PATIENCE / 5,
            Outcome::Waiting { reason, orphans } => {
                self.was_installed = false;
                tell(&mut |s| {
                    s.state = State::Waiting {
                        reason: reason.clone(),
                    }
                });
                return if orphans { ORPHAN / 4 } else { PERIOD };
            }
            Outcome::Failed(error) => {
                let text = error.to_string();
                if self.said != text {
                    tracing::warn!(%error, "the CNI plugin is not in place");
                    self.said.clone_from(&text);
                }
                let plugin = error.path.starts_with(bin_dir);
                tell(&mut |s| {
                    if plugin {
                        s.plugin_failures += 1;
                    } else {
                        s.configuration_failures += 1;
                    }
                    s.state = State::Failed {
                        error: text.clone(),
                    };
                });
            }
            Outcome::Mended(entry_in, by) => {
                let again = std::mem::replace(&mut self.was_installed, true);
                if again {
                    self.mended.push_back(now);
                    // In a fight, the state says it once.
                    if !self.is_contested() {
                        tracing::warn!(by = %by.who, file = %entry_in.display(), "the CNI plugin's place was undone; put back");
                    }
                    // A fight leaves the directory now in one state, now in another: who was once found out stays named.
                    if by.known || !self.is_contested() || self.by.is_empty() {
                        self.by = by.who;
                    }
                } else {
                    tracing::info!(file = %entry_in.display(), "the CNI plugin is installed");
                }
                let state = self.state(entry_in);
                tell(&mut |s| {
                    s.installs += 1;
                    s.healed += u64::from(again);
                    s.state = state.clone();
                });
            }
            Outcome::InPlace(entry_in) => {
                self.was_installed = true;
                self.said.clear();
                let state = self.state(entry_in);
                tell(&mut |s| s.state = state.clone());
            }
        }
        PERIOD
    }

    fn is_contested(&self) -> bool {
        self.mended.len() > CONTESTED
    }

    fn state(&self, entry_in: PathBuf) -> State {
        if self.is_contested() {
            State::Contested {
                by: self.by.clone(),
            }
        } else {
            State::Installed { entry_in }
        }
    }
}

/// The kernel's notices of changes in the directories that matter.
struct Watches {
    watcher: Option<notify::RecommendedWatcher>,
    /// Directory -> which one it was: a path can be mounted or made anew.
    watched: BTreeMap<PathBuf, (u64, u64)>,
}

impl Watches {
    fn new(wake: &Arc<Notify>) -> Self {
        let wake = Arc::clone(wake);
        let told = move |event: notify::Result<notify::Event>| {
            // Our own reading must not wake us, and neither must the runtime's.
            let only_read = |kind: &EventKind| matches!(kind, EventKind::Access(access) if !matches!(access, AccessKind::Close(notify::event::AccessMode::Write)));
            if !event.is_ok_and(|e| only_read(&e.kind)) {
                wake.notify_one();
            }
        };
        let watcher = notify::recommended_watcher(told)
            .inspect_err(|error| {
                tracing::warn!(%error, "no notices of changes: looking every {PERIOD:?} instead; raise fs.inotify.max_user_instances");
            })
            .ok();
        Self {
            watcher,
            watched: BTreeMap::new(),
        }
    }

    fn follow(&mut self, dirs: &[PathBuf]) {
        let Some(watcher) = &mut self.watcher else {
            return;
        };
        let mut wanted = BTreeMap::new();
        for dir in dirs {
            if let Ok(metadata) = dir.metadata() {
                wanted.insert(dir.clone(), (metadata.dev(), metadata.ino()));
            }
        }
        self.watched.retain(|dir, which| {
            let stays = wanted.get(dir) == Some(which);
            if !stays {
                // It may be gone already, and the watch with it.
                let _ = watcher.unwatch(dir);
            }
            stays
        });
        for (dir, which) in wanted {
            if self.watched.contains_key(&dir) {
                continue;
            }
            match watcher.watch(&dir, RecursiveMode::NonRecursive) {
                Ok(()) => {
                    self.watched.insert(dir, which);
                }
                Err(error) => tracing::debug!(%error, dir = %dir.display(), "not watched"),
            }
        }
    }
}
