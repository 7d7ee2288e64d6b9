//! The parameters of a call: the `CNI_*` variables, and the pod in `CNI_ARGS`.
//!
//! Parses and checks; it looks at nothing but what it is given.

use crate::api::{PodRef, Refusal, code};

/// Longest `CNI_CONTAINERID` taken.
const MAX_ID: usize = 1024;

/// Longest name of an interface the kernel takes.
const MAX_IFNAME: usize = 15;

/// What the runtime wants.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Command {
    /// A container is about to start.
    Add,
    /// A container is gone.
    Del,
    /// Is a container as it should be?
    Check,
    /// Only these are still alive.
    Gc,
    /// Could an ADD succeed?
    Status,
    /// Which versions?
    Version,
}

impl Command {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Add,
        Self::Del,
        Self::Check,
        Self::Gc,
        Self::Status,
        Self::Version,
    ];

    /// As `CNI_COMMAND` spells it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
            Self::Check => "CHECK",
            Self::Gc => "GC",
            Self::Status => "STATUS",
            Self::Version => "VERSION",
        }
    }
}

/// The sandbox and interface a call is about.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Target {
    /// `CNI_CONTAINERID`.
    pub container_id: String,
    /// `CNI_IFNAME`.
    pub ifname: String,
    /// `CNI_NETNS`; not part of every DEL.
    pub netns: Option<String>,
    /// The pod in `CNI_ARGS`; none: the runtime is not working for Kubernetes.
    pub pod: Option<PodRef>,
}

/// How the variables are read, so that tests need none.
pub trait Variables {
    /// The value of one; none if it is not set, or empty.
    ///
    /// # Errors
    ///
    /// When it is not UTF-8.
    fn get(&self, name: &str) -> Result<Option<String>, Refusal>;
}

/// Those of this process.
#[derive(Clone, Copy, Debug)]
pub struct Process;

impl Variables for Process {
    fn get(&self, name: &str) -> Result<Option<String>, Refusal> {
        match std::env::var(name) {
            Ok(value) => Ok(Some(value).filter(|value| !value.is_empty())),
            Err(std::env::VarError::NotPresent) => Ok(None),
            Err(std::env::VarError::NotUnicode(_)) => Err(invalid(
                format!("{name} is not UTF-8"),
                "the container runtime sets it",
            )),
        }
    }
}

/// Reads `CNI_COMMAND`.
///
/// # Errors
///
/// When it is missing or not a command.
pub fn command(variables: &impl Variables) -> Result<Command, Refusal> {
    let name = require(variables, "CNI_COMMAND")?;
    Command::ALL
        .into_iter()
        .find(|command| command.name() == name)
        .ok_or_else(|| {
            invalid(
                format!("CNI_COMMAND is {}", quoted(&name)),
                "ADD, DEL, CHECK, GC, STATUS and VERSION are known",
            )
        })
}

/// Reads what ADD, DEL and CHECK are about. All but DEL need a network namespace.
///
/// # Errors
///
/// When a variable is missing or cannot be meant, and when `CNI_ARGS` names half a pod: a pod that we cannot place must
/// not start.
pub fn target(variables: &impl Variables, command: Command) -> Result<Target, Refusal> {
    let container_id = require(variables, "CNI_CONTAINERID")?;
    let well_formed = container_id.starts_with(|c: char| c.is_ascii_alphanumeric())
        && container_id
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c));
    if !well_formed || container_id.len() > MAX_ID {
        return Err(invalid(
            format!("CNI_CONTAINERID is {}", quoted(&container_id)),
            "the specification allows letters, digits, `_`, `.` and `-`, beginning with a letter or digit",
        ));
    }
    let ifname = require(variables, "CNI_IFNAME")?;
    let no_name = matches!(ifname.as_str(), "." | "..")
        || ifname.contains(|c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control());
    if no_name || ifname.len() > MAX_IFNAME {
        return Err(invalid(
            format!("CNI_IFNAME is {}", quoted(&ifname)),
            "the kernel takes 1 to 15 bytes without `/`, `:` and blanks",
        ));
    }
    let netns = match command {
        Command::Del => variables.get("CNI_NETNS")?,
        _ => Some(require(variables, "CNI_NETNS")?),
    };
    let pod = match pod(&variables.get("CNI_ARGS")?.unwrap_or_default()) {
        // A sandbox must go even if nobody knows any more whose it was.
        Err(_) if command == Command::Del => None,
        pod => pod?,
    };
    Ok(Target {
        container_id,
        ifname,
        netns,
        pod,
    })
}

/// Reads the pod in `CNI_ARGS`: `KEY=VALUE;KEY=VALUE`. Keys of others are none of our business, with or without
/// `IgnoreUnknown`.
///
/// # Errors
///
/// When it is not made of pairs, says one thing twice differently, or names half a pod.
pub fn pod(arguments: &str) -> Result<Option<PodRef>, Refusal> {
    let (mut namespace, mut name, mut uid) = (None, None, None);
    for pair in arguments.split(';').filter(|pair| !pair.is_empty()) {
        let Some((key, value)) = pair.split_once('=') else {
            return Err(invalid(
                format!("CNI_ARGS holds {}, which is not KEY=VALUE", quoted(pair)),
                "the container runtime sets it",
            ));
        };
        let place = match key {
            "K8S_POD_NAMESPACE" => &mut namespace,
            "K8S_POD_NAME" => &mut name,
            "K8S_POD_UID" => &mut uid,
            _ => continue,
        };
        if value.is_empty() {
            continue;
        }
        if !is_name(value) {
            return Err(invalid(
                format!("{key} in CNI_ARGS is {}", quoted(value)),
                "Kubernetes names are at most 253 lower-case letters, digits, `-` and `.`",
            ));
        }
        if place.replace(value).is_some_and(|before| before != value) {
            return Err(invalid(
                format!("CNI_ARGS says {key} twice, and differently"),
                "the container runtime sets it",
            ));
        }
    }
    match (namespace, name) {
        (Some(namespace), Some(name)) => Ok(Some(PodRef {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            uid: uid.map(str::to_owned),
        })),
        (None, None) if uid.is_none() => Ok(None),
        _ => Err(invalid(
            "CNI_ARGS names half a pod".to_owned(),
            "a runtime for Kubernetes sets K8S_POD_NAMESPACE and K8S_POD_NAME, both",
        )),
    }
}

/// As Kubernetes' DNS subdomains, or a UID.
fn is_name(value: &str) -> bool {
    value.len() <= 253
        && value
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.')
}

fn require(variables: &impl Variables, name: &str) -> Result<String, Refusal> {
    variables.get(name)?.ok_or_else(|| {
        invalid(
            format!("{name} is not set"),
            "this program is a CNI plugin: a container runtime runs it, and sets its environment",
        )
    })
}

fn invalid(message: String, cure: &str) -> Refusal {
    Refusal::for_good(code::INVALID_ENVIRONMENT, message, cure)
}

/// A value from outside as part of a message: on one line, and not without end.
fn quoted(value: &str) -> String {
    let short: String = value.chars().take(80).collect();
    let dots = if short.len() < value.len() { "..." } else { "" };
    format!("{short:?}{dots}")
}
