//! One call of the plugin, from its environment and stdin to what goes to stdout.
//!
//! It knows the commands of the specification and which answer each may give; it decides nothing about a pod.

use std::{
    fs::{self, File},
    io::{self, IsTerminal, Read},
    os::fd::AsRawFd as _,
    path::Path,
    time::{Duration, Instant, SystemTime},
};

use serde::Serialize;

use crate::{
    api::{
        AddReply, AddRequest, CheckReply, CheckRequest, DelRequest, GcRequest, Level, LogRecord,
        PodRef, Refusal, StatusReply, Timings, code, paths,
    },
    ask::{self, Asked, Verdict},
    client::{self, Failure},
    config::{self, Config, NEWEST, VERSIONS},
    environment::{self, Command, Target, Variables},
    log,
};

/// How long DEL and GC, which do without an answer, wait for one.
const DELETE_TIME: Duration = Duration::from_secs(5);

/// How long STATUS waits: it is asked every few seconds, and an agent that is late is no broken installation.
const STATUS_TIME: Duration = Duration::from_secs(1);

/// How long the agent may take to note a record.
const LOG_TIME: Duration = Duration::from_millis(200);

/// What goes to stdout, and whether the call succeeded.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Answer {
    /// A result, an error object, or nothing.
    pub stdout: String,
    /// The exit code is 0.
    pub success: bool,
}

/// What a call wants to have noted: nothing unless `message` says something.
#[derive(Debug)]
struct Note {
    level: Level,
    message: String,
    /// Nobody is there to be told.
    away: bool,
    /// Where the time went, as the agent says.
    timings: Option<Timings>,
}

impl Note {
    fn new(level: Level, message: impl Into<String>) -> Self {
        Self {
            level,
            message: message.into(),
            away: false,
            timings: None,
        }
    }
}

/// Runs a call.
pub fn run(variables: &impl Variables, stdin: impl Read + IsTerminal) -> Answer {
    let started = Instant::now();
    let command = match environment::command(variables) {
        Ok(command) => command,
        Err(refusal) => return error(NEWEST, &refusal),
    };
    // By hand nobody types a configuration.
    let content = if command == Command::Version && stdin.is_terminal() {
        Ok(Vec::new())
    } else {
        config::read(stdin)
    };
    let content = match content {
        Ok(content) => content,
        Err(refusal) => return error(NEWEST, &refusal),
    };
    let version = config::version(&content).unwrap_or(NEWEST);
    if command == Command::Version {
        return versions(version);
    }
    let config = match config::parse(&content) {
        Ok(config) => config,
        Err(refusal) => return error(version, &refusal),
    };
    let mut about = None;
    let (result, note) = perform(command, variables, &config, &mut about);
    if let Some(note) = note {
        write_down(command, about.as_ref(), &config, started, &note);
    }
    match result {
        Ok(stdout) => Answer {
            stdout,
            success: true,
        },
        Err(refusal) => error(version, &refusal),
    }
}

type Performed = (Result<String, Refusal>, Option<Note>);

fn failed(refusal: Refusal) -> Performed {
    let note = Note::new(Level::Error, refusal.to_string());
    (Err(refusal), Some(note))
}

fn perform(
    command: Command,
    variables: &impl Variables,
    config: &Config,
    about: &mut Option<Target>,
) -> Performed {
    if let Err(refusal) = allowed(command, config.version) {
        return failed(refusal);
    }
    match command {
        Command::Gc => return gc(config),
        Command::Status => return status(config),
        _ => {}
    }
    let target = match environment::target(variables, command) {
        Ok(target) => &*about.insert(target),
        Err(refusal) => return failed(refusal),
    };
    match command {
        Command::Del => del(config, target),
        _ => match &target.pod {
            Some(pod) => match verdict(command, config, target, pod) {
                Ok(performed) => performed,
                Err(refusal) => failed(refusal),
            },
            None => (
                Ok(output(command, config)),
                Some(Note::new(Level::Info, "no pod in CNI_ARGS: passed through")),
            ),
        },
    }
}

/// Which commands a version has.
fn allowed(command: Command, version: &str) -> Result<(), Refusal> {
    let since = match command {
        Command::Check => "0.4.0",
        Command::Gc | Command::Status => "1.1.0",
        Command::Add | Command::Del | Command::Version => return Ok(()),
    };
    // The versions we speak are ordered as text, too.
    if version >= since {
        return Ok(());
    }
    Err(Refusal::for_good(
        code::INCOMPATIBLE_VERSION,
        format!("CNI version {version} has no {}", command.name()),
        format!(
            "it came with {since}; change cniVersion of the network configuration, or the runtime"
        ),
    ))
}

/// ADD and CHECK of a pod.
fn verdict(
    command: Command,
    config: &Config,
    target: &Target,
    pod: &PodRef,
) -> Result<Performed, Refusal> {
    let addresses = config.addresses()?;
    // Held open until the agent has answered: it opens it by our number.
    let (_held, netns) = open_netns(target.netns.as_deref().unwrap_or_default())?;
    if command == Command::Check {
        let asked = ask::ask(&config.entry, pod, paths::CHECK, |_left| CheckRequest {
            pod: pod.clone(),
            container_id: target.container_id.clone(),
            ifname: target.ifname.clone(),
            network: config.network.clone(),
            netns: netns.clone(),
            addresses: addresses.clone(),
        });
        return Ok(conclude(
            command,
            config,
            asked,
            |reply: CheckReply| match reply.problem {
                None if reply.enrolled => Ok(("steered as it should be".to_owned(), None)),
                None => Ok(("not of the mesh".to_owned(), None)),
                Some(problem) => Err(Refusal::for_good(
                    code::NOT_STEERED,
                    format!("pod {pod} is not steered as it should be: {problem}"),
                    "the agent repairs it by itself; its log says what it does",
                )),
            },
        ));
    }
    let asked = ask::ask(&config.entry, pod, paths::ADD, |left| AddRequest {
        pod: pod.clone(),
        container_id: target.container_id.clone(),
        ifname: target.ifname.clone(),
        network: config.network.clone(),
        netns: netns.clone(),
        addresses: addresses.clone(),
        budget_ms: left.as_millis().try_into().unwrap_or(u64::MAX),
    });
    Ok(conclude(command, config, asked, |reply: AddReply| {
        let what = if reply.enrolled {
            "enrolled"
        } else {
            "not enrolled"
        };
        Ok((format!("{what}: {}", reply.reason), Some(reply.timings)))
    }))
}

/// Turns what the agent said, or did not, into an answer and a note.
fn conclude<T>(
    command: Command,
    config: &Config,
    asked: Asked<T>,
    judge: impl FnOnce(T) -> Result<(String, Option<Timings>), Refusal>,
) -> Performed {
    let Asked {
        verdict,
        attempts,
        away,
    } = asked;
    let result = verdict.and_then(|verdict| match verdict {
        Verdict::Told(reply) => {
            let (message, timings) = judge(reply)?;
            let level = if attempts > 1 {
                Level::Warn
            } else {
                Level::Info
            };
            Ok(Note {
                timings,
                ..Note::new(level, message)
            })
        }
        Verdict::Alone { reason, failure } => Ok(Note {
            away,
            ..Note::new(
                Level::Warn,
                format!("let go without the agent: {reason} ({failure})"),
            )
        }),
    });
    let (result, mut note) = match result {
        Ok(note) => (Ok(output(command, config)), note),
        Err(refusal) => {
            let note = Note::new(Level::Error, refusal.to_string());
            (Err(refusal), Note { away, ..note })
        }
    };
    if attempts > 1 {
        note.message = format!("{} (after {attempts} attempts)", note.message);
    }
    (result, Some(note))
}

/// Never fails for the agent's sake: the kernel lets a pod's namespace go with all that is in it, and the agent sees it.
fn del(config: &Config, target: &Target) -> Performed {
    let request = DelRequest {
        pod: target.pod.clone(),
        container_id: target.container_id.clone(),
        ifname: target.ifname.clone(),
        network: config.network.clone(),
    };
    (
        Ok(String::new()),
        Some(hand_over(config, paths::DEL, &request)),
    )
}

fn gc(config: &Config) -> Performed {
    // Taking none for an empty list would throw away all.
    let Some(valid) = config.valid.clone() else {
        return failed(Refusal::for_good(
            code::INVALID_CONFIG,
            "a GC without cni.dev/valid-attachments",
            "the container runtime lists there what is still alive",
        ));
    };
    let network = config.network.clone();
    let request = GcRequest { network, valid };
    (
        Ok(String::new()),
        Some(hand_over(config, paths::GC, &request)),
    )
}

fn hand_over(config: &Config, path: &str, request: &impl Serialize) -> Note {
    let deadline = Instant::now() + DELETE_TIME;
    match client::post::<serde::de::IgnoredAny>(&config.entry.socket, path, request, deadline) {
        Ok(_) => Note::new(Level::Info, "done"),
        Err(Failure::Refused(refusal)) => {
            Note::new(Level::Warn, format!("the agent did not take it: {refusal}"))
        }
        Err(failure) => Note {
            away: matches!(failure, Failure::Away { .. }),
            ..Note::new(
                Level::Warn,
                format!("the agent was not told, and will see for itself: {failure}"),
            )
        },
    }
}

/// Fails only when the agent says that the installation is broken: a failing STATUS makes the node NotReady.
fn status(config: &Config) -> Performed {
    let deadline = Instant::now() + STATUS_TIME;
    match client::get::<StatusReply>(&config.entry.socket, paths::STATUS, deadline) {
        Ok(StatusReply {
            broken: Some(problem),
            ..
        }) => failed(Refusal::for_good(
            code::NOT_AVAILABLE,
            format!("culvert cannot capture pods on this node: {problem}"),
            "look at the log of culvert's agent on this node",
        )),
        _ => (Ok(String::new()), None),
    }
}

/// What a command that went well prints.
fn output(command: Command, config: &Config) -> String {
    match command {
        Command::Add => config.result(),
        _ => String::new(),
    }
}

/// Opens the pod's network namespace and names it as the agent sees it, in whatever mount namespace that is.
fn open_netns(path: &str) -> Result<(File, String), Refusal> {
    let wrong = |what: String| {
        Refusal::for_good(
            code::INVALID_ENVIRONMENT,
            format!("CNI_NETNS is {path:?}: {what}"),
            "the container runtime sets it to the path of the pod's network namespace",
        )
    };
    // Namespaces are regular files; opening a pipe would wait for its writer.
    let data = fs::metadata(Path::new(path)).map_err(|error| wrong(error.to_string()))?;
    if !data.is_file() {
        return Err(wrong("that is no namespace".to_owned()));
    }
    let file = File::open(path).map_err(|error| wrong(error.to_string()))?;
    let name = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    Ok((file, name))
}

fn versions(version: &str) -> Answer {
    let answer = serde_json::json!({"cniVersion": version, "supportedVersions": VERSIONS});
    Answer {
        stdout: answer.to_string(),
        success: true,
    }
}

/// The error object of the specification.
fn error(version: &str, refusal: &Refusal) -> Answer {
    let mut object =
        serde_json::json!({"cniVersion": version, "code": refusal.code, "msg": refusal.message});
    if let Some(object) = object.as_object_mut().filter(|_| !refusal.cure.is_empty()) {
        object.insert("details".to_owned(), refusal.cure.clone().into());
    }
    Answer {
        stdout: object.to_string(),
        success: false,
    }
}

/// To the file, and to the agent what it cannot know by itself. Nothing that goes wrong here matters to the pod.
fn write_down(
    command: Command,
    about: Option<&Target>,
    config: &Config,
    started: Instant,
    note: &Note,
) {
    let time = humantime::format_rfc3339_millis(SystemTime::now()).to_string();
    let record = LogRecord {
        time,
        level: note.level,
        command: command.name().to_owned(),
        pod: about.and_then(|target| target.pod.clone()),
        container_id: about
            .map(|target| target.container_id.clone())
            .unwrap_or_default(),
        ifname: about
            .map(|target| target.ifname.clone())
            .unwrap_or_default(),
        message: note.message.clone(),
        took_us: started.elapsed().as_micros().try_into().unwrap_or(u64::MAX),
        timings: note.timings,
    };
    let entry = &config.entry;
    if !entry.log_file.as_os_str().is_empty() {
        let _logged: io::Result<()> = log::append(&entry.log_file, &record);
    }
    if note.level > Level::Info && !note.away {
        let deadline = Instant::now() + LOG_TIME;
        let _told =
            client::post::<serde::de::IgnoredAny>(&entry.socket, paths::LOG, &record, deadline);
    }
}
