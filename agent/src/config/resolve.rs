//! From the sources to one value a key: the strongest source that names it wins, and all that is wrong is collected.

use std::{collections::BTreeMap, fmt, path::PathBuf};

use serde::Serialize;
use serde_saphyr::Spanned;

use super::{AgentArgs, Config, KEYS, Key, values::Value};

/// Largest file of settings that is read: more is no file of settings.
const MAX_FILE: u64 = 1024 * 1024;

/// Where a value comes from.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// The command line.
    Flag,
    /// This variable.
    Environment(String),
    /// This line of this file.
    File(PathBuf, u64),
    /// Nobody said anything.
    Default,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag => f.write_str("flag"),
            Self::Environment(name) => write!(f, "environment {name}"),
            Self::File(path, 0) => write!(f, "file {}", path.display()),
            Self::File(path, line) => write!(f, "file {}:{line}", path.display()),
            Self::Default => f.write_str("default"),
        }
    }
}

/// The variables of the process, or a test's.
#[derive(Clone, Debug, Default)]
pub struct Environment(BTreeMap<String, Option<String>>);

impl Environment {
    /// The process's own.
    #[must_use]
    pub fn of_process() -> Self {
        Self(
            std::env::vars_os()
                .filter_map(|(name, value)| {
                    Some((name.into_string().ok()?, value.into_string().ok()))
                })
                .collect(),
        )
    }

    /// Sets a variable.
    #[must_use]
    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.0.insert(name.to_owned(), Some(value.to_owned()));
        self
    }
}

/// Something wrong with a setting.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Problem {
    /// The key, or the file.
    pub key: String,
    /// Where its value comes from.
    pub origin: Origin,
    /// What is wrong.
    pub what: String,
    /// What to do.
    pub cure: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} ({}): {}; {}",
            self.key, self.origin, self.what, self.cure
        )
    }
}

/// Everything that is wrong.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Problems(pub Vec<Problem>);

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_slice() {
            [one] => write!(f, "a setting is wrong: {one}"),
            many => {
                write!(f, "{} settings are wrong:", many.len())?;
                many.iter().try_for_each(|p| write!(f, "\n  {p}"))
            }
        }
    }
}

impl std::error::Error for Problems {}

/// Settings that hold together.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The settings.
    pub config: Config,
    /// Where each comes from, in the order of [`KEYS`].
    pub origins: Vec<Origin>,
    /// What deserves attention but stops nothing.
    pub warnings: Vec<String>,
}

struct Found {
    text: String,
    origin: Origin,
}

pub(super) struct Resolver<'a> {
    args: &'a AgentArgs,
    environment: &'a Environment,
    file: BTreeMap<String, Found>,
    origins: Vec<Origin>,
    problems: Vec<Problem>,
    warnings: Vec<String>,
}

impl<'a> Resolver<'a> {
    pub(super) fn new(args: &'a AgentArgs, environment: &'a Environment) -> Self {
        let mut resolver = Self {
            args,
            environment,
            file: BTreeMap::new(),
            origins: Vec::with_capacity(KEYS.len()),
            problems: Vec::new(),
            warnings: Vec::new(),
        };
        if let Some(path) = &args.config {
            resolver.read(path);
        }
        resolver.name_strangers();
        resolver
    }

    /// Reads the file into texts; what it holds that is no key is a problem.
    fn read(&mut self, path: &PathBuf) {
        let mut wrong = |line, what: String, cure: &str| {
            self.problems.push(Problem {
                key: "config".to_owned(),
                origin: Origin::File(path.clone(), line),
                what,
                cure: cure.to_owned(),
            });
        };
        let text = match read_bounded(path) {
            Ok(text) => text,
            Err(e) => {
                let cure = "name a readable file with --config, or leave it out";
                return wrong(0, format!("it cannot be read: {e}"), cure);
            }
        };
        // No document, or nothing but comments.
        if text.lines().all(|l| {
            let l = l.trim();
            l.is_empty() || l.starts_with('#') || l == "---"
        }) {
            return;
        }
        let entries = serde_saphyr::from_str::<BTreeMap<String, Spanned<serde_json::Value>>>(&text);
        let entries = match entries {
            Ok(entries) => entries,
            Err(e) => {
                let line = e.location().map_or(0, |l| l.line());
                let message = e.without_snippet().to_string();
                return wrong(line, message, "write `KEY: VALUE` lines, each key once");
            }
        };
        for (name, value) in entries {
            let line = value.referenced.line();
            let Some(key) = KEYS.iter().find(|k| k.name == name) else {
                let cure = match nearest(&name, KEYS.iter().map(|k| k.name)) {
                    Some(near) => format!("did you mean `{near}`?"),
                    None => "`culvert agent --help` lists the keys".to_owned(),
                };
                self.problems.push(Problem {
                    key: name,
                    origin: Origin::File(path.clone(), line),
                    what: "there is no such key".to_owned(),
                    cure,
                });
                continue;
            };
            let text = match value.value {
                serde_json::Value::Null => continue,
                serde_json::Value::String(text) => text,
                other => other.to_string(),
            };
            let origin = Origin::File(path.clone(), line);
            self.file
                .insert(key.name.to_owned(), Found { text, origin });
        }
    }

    /// Warns of variables that look like ours and are not.
    fn name_strangers(&mut self) {
        let known: Vec<String> = KEYS.iter().map(Key::env).collect();
        for name in self
            .environment
            .0
            .keys()
            .filter(|n| n.starts_with("CULVERT_"))
        {
            if name == "CULVERT_CONFIG" || known.contains(name) || is_service_link(name) {
                continue;
            }
            if let Some(near) = nearest(name, known.iter().map(String::as_str)) {
                self.warnings.push(format!(
                    "environment {name} is no setting and is ignored: did you mean {near}?"
                ));
            }
        }
    }

    fn variable(&mut self, name: &str, key: &Key) -> Option<Found> {
        let origin = Origin::Environment(name.to_owned());
        match self.environment.0.get(name)? {
            // Charts leave variables empty where they mean "not set".
            Some(text) if text.is_empty() => None,
            Some(text) => Some(Found {
                text: text.clone(),
                origin,
            }),
            None => {
                self.problem(key, origin, "the value is no UTF-8".to_owned());
                None
            }
        }
    }

    fn problem(&mut self, key: &Key, origin: Origin, what: String) {
        self.problems.push(Problem {
            key: key.name.to_owned(),
            origin,
            what,
            cure: format!("set it to {} ({})", key.shape, key.help.trim()),
        });
    }

    /// The value of the next key. A wrong one is noted, and the default stands in for it so that the rest is looked at.
    pub(super) fn take<T: Value>(&mut self, key: Option<&Key>, default: fn() -> T) -> T {
        let Some(key) = key else {
            return default();
        };
        let flag = self.args.flags.get(key.name).map(|text| Found {
            text: text.clone(),
            origin: Origin::Flag,
        });
        let ours = self.variable(&key.env(), key);
        let theirs = self.theirs(key);
        let file = self.file.remove(key.name);
        if let Some(ours) = flag.as_ref().or(ours.as_ref()) {
            for other in &theirs {
                self.compare::<T>(key, ours, other);
            }
        }
        let Some(found) = flag.or(ours).or(theirs.into_iter().next()).or(file) else {
            self.origins.push(Origin::Default);
            return default();
        };
        self.origins.push(found.origin.clone());
        match T::parse(&found.text) {
            Ok(value) => value,
            Err(what) => {
                self.problem(key, found.origin, what);
                default()
            }
        }
    }

    /// What the variables of others say, translated.
    fn theirs(&mut self, key: &Key) -> Vec<Found> {
        let mut found = Vec::new();
        for alias in key.aliases {
            let Some(raw) = self.variable(alias.env, key) else {
                continue;
            };
            match (alias.translate)(&raw.text) {
                Ok(text) => found.push(Found { text, ..raw }),
                Err(what) => self.problem(key, raw.origin, what),
            }
        }
        found
    }

    fn compare<T: Value>(&mut self, key: &Key, ours: &Found, other: &Found) {
        let show = |found: &Found| T::parse(&found.text).map(|v| v.show());
        if let (Ok(ours_text), Ok(other_text)) = (show(ours), show(other))
            && ours_text != other_text
        {
            self.warnings.push(format!(
                "{}: `{ours_text}` ({}) is used, not `{other_text}` ({}): set one of them",
                key.name, ours.origin, other.origin
            ));
        }
    }

    /// Where the value of a key came from.
    pub(super) fn origin(&self, name: &str) -> Origin {
        KEYS.iter()
            .position(|k| k.name == name)
            .and_then(|at| self.origins.get(at))
            .cloned()
            .unwrap_or(Origin::Default)
    }

    pub(super) fn is_default(&self, name: &str) -> bool {
        self.origin(name) == Origin::Default
    }

    /// Notes what a check of several values found.
    pub(super) fn wrong(&mut self, name: &str, what: impl Into<String>, cure: impl Into<String>) {
        self.problems.push(Problem {
            key: name.to_owned(),
            origin: self.origin(name),
            what: what.into(),
            cure: cure.into(),
        });
    }

    /// Notes what deserves attention.
    pub(super) fn warn(&mut self, text: String) {
        self.warnings.push(text);
    }

    pub(super) fn finish(self, config: Config) -> Result<Loaded, Problems> {
        if !self.problems.is_empty() {
            return Err(Problems(self.problems));
        }
        Ok(Loaded {
            config,
            origins: self.origins,
            warnings: self.warnings,
        })
    }
}

fn read_bounded(path: &PathBuf) -> std::io::Result<String> {
    use std::io::Read as _;
    let mut text = String::new();
    let mut file = std::fs::File::open(path)?.take(MAX_FILE + 1);
    let read = file.read_to_string(&mut text)?;
    if u64::try_from(read).is_ok_and(|read| read > MAX_FILE) {
        return Err(std::io::Error::other(format!(
            "it is larger than {MAX_FILE} bytes"
        )));
    }
    Ok(text)
}

/// Kubernetes puts `NAME_SERVICE_HOST`, `NAME_PORT` and so on into every container for each Service of its namespace.
fn is_service_link(name: &str) -> bool {
    name.contains("_SERVICE_HOST")
        || name.contains("_SERVICE_PORT")
        || name.ends_with("_PORT")
        || name.contains("_PORT_")
}

/// The candidate that a slip of the hand would turn into `name`.
fn nearest<'c>(name: &str, candidates: impl Iterator<Item = &'c str>) -> Option<&'c str> {
    let (distance, best) = candidates
        .map(|c| (edits(name, c), c))
        .min_by_key(|(distance, _)| *distance)?;
    (distance <= 1 + name.len() / 5).then_some(best)
}

/// Levenshtein distance.
fn edits(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let kept = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = kept.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}
