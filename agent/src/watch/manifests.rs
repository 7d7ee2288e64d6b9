//! Pods and namespaces from files instead of an API server: for hosts without Kubernetes, for the demo and for tests.
//!
//! `--pods PATH` names a file or a directory (`*.yaml`, `*.yml`, `*.json`) of `Pod`, `Namespace` and `List` manifests.
//! Beyond what Kubernetes asks for, a pod needs `status.podIPs` and, as no container runtime tells, the annotation
//! `culvert.dev/netns` with the path of its network namespace. Without `metadata.uid` it gets one made from its
//! namespace and name. A namespace without a manifest exists, without labels. Only regular files of up to 1 MiB are read.
//! Nothing is ever written to them: what would be annotated is kept in memory.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    fmt, fs,
    io::{self, Read as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use notify::{RecursiveMode, Watcher as _};
use tokio::{
    sync::{Notify, watch},
    time::timeout,
};

use super::{parse, view::View};
use crate::model::{Cluster, Namespace, Pod, PodRef, PodUid, Redirection, keys};

/// Files are read again at least this often: not every file system tells of changes.
const REREAD: Duration = Duration::from_secs(5);
/// A file that was just touched may still be being written: wait for this much quiet, but not for ever.
const QUIET: Duration = Duration::from_millis(20);
const LONGEST_WAIT: Duration = Duration::from_millis(200);

/// Longest file that is read: some thousand pods.
const LONGEST: u64 = 1024 * 1024;

/// A directory of manifests, or one file.
#[derive(Debug)]
pub struct Manifests {
    path: PathBuf,
    view: View,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    files: BTreeMap<PathBuf, File>,
    problems: Vec<Problem>,
    redirections: BTreeMap<PodUid, Redirection>,
    /// The files have been published once, be there none at all.
    published: bool,
}

/// A file's last good content.
#[derive(Debug, Default)]
struct File {
    stamp: Option<Stamp>,
    content: parse::Content,
    broken: Option<Problem>,
}

/// Changes when the file does.
type Stamp = (u64, Option<SystemTime>, u64);

/// What is wrong with the manifests.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Problem {
    /// The file, or the path as a whole.
    pub file: PathBuf,
    /// The line, from 1; 0 where it is about the whole file.
    pub line: u64,
    /// What is wrong, and what to do.
    pub what: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.file.display())?;
        if self.line > 0 {
            write!(f, "{}:", self.line)?;
        }
        write!(f, " {}", self.what)
    }
}

impl Manifests {
    /// Reads nothing yet; [`Self::run`] does.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            view: View::new(1),
            state: Mutex::default(),
        }
    }

    /// The picture of the cluster.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<Cluster> {
        self.view.subscribe()
    }

    /// What is wrong with the files now.
    #[must_use]
    pub fn problems(&self) -> Vec<Problem> {
        self.lock().problems.clone()
    }

    /// What the pods' annotations would say.
    #[must_use]
    pub fn redirections(&self) -> BTreeMap<PodUid, Redirection> {
        self.lock().redirections.clone()
    }

    /// Reads the files whenever they change, until it is dropped.
    pub async fn run(&self) {
        let changed = std::sync::Arc::new(Notify::new());
        let _watcher = self.watcher(std::sync::Arc::clone(&changed));
        loop {
            self.read();
            if timeout(REREAD, changed.notified()).await.is_ok() {
                let quiet = async { while timeout(QUIET, changed.notified()).await.is_ok() {} };
                // In time or not, it is read now.
                let _ = timeout(LONGEST_WAIT, quiet).await;
            }
        }
    }

    /// Without it, changes are seen by reading again.
    fn watcher(&self, changed: std::sync::Arc<Notify>) -> Option<notify::RecommendedWatcher> {
        let watched = if self.path.is_dir() {
            Some(self.path.as_path())
        } else {
            // An editor replaces the file: its directory sees that.
            self.path.parent().filter(|p| !p.as_os_str().is_empty())
        };
        let watched = watched.unwrap_or(Path::new("."));
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            if event.is_ok_and(|e| !e.kind.is_access()) {
                changed.notify_one();
            }
        });
        let watcher = watcher.and_then(|mut w| {
            w.watch(watched, RecursiveMode::NonRecursive)?;
            Ok(w)
        });
        watcher
            .inspect_err(|error| {
                tracing::warn!(path = %watched.display(), %error, "changes are seen only every 5 s");
            })
            .ok()
    }

    /// Reads what has changed and publishes it.
    pub fn read(&self) {
        let mut state = self.lock();
        let mut problems = Vec::new();
        // What was wrong before may have been put right without a change to any file that was read.
        let mut changed = !state.published || !state.problems.is_empty();
        match self.list() {
            Ok(paths) => {
                let known = state.files.len();
                state.files.retain(|path, _| paths.contains(path));
                changed |= state.files.len() < known;
                for path in paths {
                    changed |= state.files.entry(path.clone()).or_default().read(&path);
                }
            }
            // Gone for a moment, or for good: what was there stays, as with a broken file.
            Err(e) => problems.push(Problem {
                file: self.path.clone(),
                line: 0,
                what: format!(
                    "{e}: give --pods an existing file or directory; what was read before stays"
                ),
            }),
        }
        if !changed && problems.is_empty() {
            return;
        }
        state.published = true;
        let (pods, namespaces) = merge(&state.files, &mut problems);
        for problem in &problems {
            if !state.problems.contains(problem) {
                tracing::warn!("{problem}");
            }
        }
        state.problems = problems;
        state.redirections.retain(|uid, _| pods.contains_key(uid));
        drop(state);
        // What asks for the mesh is not known here; what has no label does not.
        let mut opted_in = BTreeMap::new();
        for pod in pods.values().filter(|p| !p.labels.is_empty()) {
            *opted_in.entry(pod.namespace.clone()).or_default() += 1;
        }
        self.view.replace_opted_in(opted_in);
        self.view.replace_namespaces(namespaces);
        self.view.replace_pods(pods);
    }

    fn list(&self) -> io::Result<BTreeSet<PathBuf>> {
        if !fs::metadata(&self.path)?.is_dir() {
            return Ok([self.path.clone()].into());
        }
        let mut found = BTreeSet::new();
        for entry in fs::read_dir(&self.path)? {
            let path = entry?.path();
            let known = ["yaml", "yml", "json"].map(OsStr::new);
            let hidden = path
                .file_name()
                .is_some_and(|n| n.as_encoded_bytes().starts_with(b"."));
            if path.extension().is_some_and(|e| known.contains(&e)) && !hidden {
                found.insert(path);
            }
        }
        Ok(found)
    }

    /// The pod of that name.
    #[must_use]
    pub fn get_pod(&self, namespace: &str, name: &str) -> Option<Pod> {
        let receiver = self.view.subscribe();
        let cluster = receiver.borrow();
        let mut pods = cluster.pods.values();
        pods.find(|p| p.namespace == namespace && p.name == name)
            .cloned()
    }

    /// Remembers what the annotation would say; false if there is no such pod.
    pub fn set_redirection(&self, pod: &PodRef, to: Option<Redirection>) -> bool {
        if !self.view.subscribe().borrow().pods.contains_key(&pod.uid) {
            return false;
        }
        let mut state = self.lock();
        let before = match to {
            Some(to) => state.redirections.insert(pod.uid.clone(), to),
            None => state.redirections.remove(&pod.uid),
        };
        if before != to {
            let to = to.map_or("none", Redirection::as_str);
            tracing::info!(%pod, "{} is {to} now", keys::REDIRECTION);
        }
        true
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl File {
    /// Keeps the last good content if the file is broken now; false if it is as it was.
    fn read(&mut self, path: &Path) -> bool {
        let now = stamp(path);
        if now.is_some() && now == self.stamp {
            return false;
        }
        let wrong = |line, what| Problem {
            file: path.into(),
            line,
            what: format!("{what}; what this file said before stays"),
        };
        let read = text(path).map_err(|what| wrong(0, what));
        let read = read.and_then(|text| parse::content(&text).map_err(|e| wrong(e.line, e.what)));
        match read {
            Ok(content) => {
                self.content = content;
                self.broken = None;
            }
            Err(problem) => self.broken = Some(problem),
        }
        self.stamp = now;
        true
    }
}

/// What a file says, or why it is not read.
fn text(path: &Path) -> Result<String, String> {
    let mut options = fs::OpenOptions::new();
    // A pipe without a writer would be waited for.
    options.read(true).custom_flags(libc::O_NONBLOCK);
    let file = options.open(path).map_err(|e| e.to_string())?;
    if !file.metadata().map_err(|e| e.to_string())?.is_file() {
        return Err("this is no regular file: put one in its place, or take it away".to_owned());
    }
    let mut bytes = Vec::new();
    let read = file.take(LONGEST + 1).read_to_end(&mut bytes);
    if read.map_err(|e| e.to_string())? as u64 > LONGEST {
        return Err("it is longer than 1 MiB: split it into several files".to_owned());
    }
    String::from_utf8(bytes).map_err(|e| format!("{e}: write it in UTF-8"))
}

fn stamp(path: &Path) -> Option<Stamp> {
    use std::os::unix::fs::MetadataExt as _;
    let meta = fs::metadata(path).ok()?;
    Some((meta.ino(), meta.modified().ok(), meta.len()))
}

/// All files as one; of two that define the same, the first counts.
fn merge(
    files: &BTreeMap<PathBuf, File>,
    problems: &mut Vec<Problem>,
) -> (BTreeMap<PodUid, Pod>, BTreeMap<String, Namespace>) {
    let mut pods: BTreeMap<PodUid, Pod> = BTreeMap::new();
    let mut namespaces: BTreeMap<String, Namespace> = BTreeMap::new();
    let mut names = BTreeSet::new();
    for (path, file) in files {
        let problem = |line, what| Problem {
            file: path.clone(),
            line,
            what,
        };
        problems.extend(file.broken.clone());
        let hints = file.content.hints.iter();
        problems.extend(hints.map(|h| problem(h.line, h.what.clone())));
        for (name, namespace) in &file.content.namespaces {
            if namespaces.contains_key(name) {
                let what = format!("namespace {name} is defined twice: remove this one");
                problems.push(problem(0, what));
            } else {
                namespaces.insert(name.clone(), namespace.clone());
            }
        }
        for pod in &file.content.pods {
            let name = (pod.namespace.clone(), pod.name.clone());
            if pods.contains_key(&pod.uid) || !names.insert(name) {
                let what = format!(
                    "pod {} is defined twice, by name or UID: remove this one",
                    pod.reference()
                );
                problems.push(problem(0, what));
            } else {
                pods.insert(pod.uid.clone(), pod.clone());
            }
        }
    }
    for pod in pods.values() {
        namespaces.entry(pod.namespace.clone()).or_default();
    }
    (pods, namespaces)
}

#[cfg(test)]
#[path = "manifests_tests.rs"]
mod tests;
