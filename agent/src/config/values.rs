//! The kinds of values there are: each parsed from one text, whatever source it came from, and shown as such again.
//!
//! Says what is wrong with one value; what two values mean together is `check`'s business.

use std::{
    collections::BTreeSet, fmt, net::IpAddr, num::NonZeroUsize, path::PathBuf, time::Duration,
};

use serde::Serialize;

use crate::plan::membership::parse_selectors;

/// A kind of value.
pub trait Value: Sized + Clone {
    /// What values look like, for help and error texts.
    const SHAPE: &'static str;
    /// As a flag it may stand without a value, which then is `true`.
    const SWITCH: bool = false;

    /// From text; the error says what is wrong with it.
    fn parse(text: &str) -> Result<Self, String>;

    /// As text that [`Value::parse`] takes.
    fn show(&self) -> String;
}

/// Text of somebody else's that means the same to us.
pub(super) fn same(text: &str) -> Result<String, String> {
    Ok(text.to_owned())
}

/// A bare port to an address to listen on.
pub(super) fn port_to_listen(text: &str) -> Result<String, String> {
    text.trim()
        .parse::<u16>()
        .map(|port| format!(":{port}"))
        .map_err(|_| format!("`{text}` is no port number"))
}

/// `LEVEL` or `SCOPE:LEVEL,...`, with scopes that are not ours: the scope `default` counts, and so does a bare level.
pub(super) fn istio_log_level(text: &str) -> Result<String, String> {
    let mut level = None;
    for part in text.split(',').map(str::trim) {
        match part.split_once(':') {
            None => level = Some(part),
            Some(("default", word)) => level = Some(word),
            Some(_) => {}
        }
    }
    let word = level.ok_or_else(|| format!("`{text}` names no level of the scope `default`"))?;
    Ok(match word {
        "none" => "off",
        "fatal" => "error",
        other => other,
    }
    .to_owned())
}

impl Value for bool {
    const SHAPE: &'static str = "true|false";
    const SWITCH: bool = true;

    /// As Go's `strconv.ParseBool`, which is what charts and scripts of the field are written for.
    fn parse(text: &str) -> Result<Self, String> {
        match text {
            "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
            "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
            _ => Err(format!("`{text}` is neither true nor false")),
        }
    }

    fn show(&self) -> String {
        self.to_string()
    }
}

impl Value for String {
    const SHAPE: &'static str = "NAME";

    fn parse(text: &str) -> Result<Self, String> {
        match text.trim() {
            "" => Err("it is empty".to_owned()),
            text => Ok(text.to_owned()),
        }
    }

    fn show(&self) -> String {
        self.clone()
    }
}

impl Value for PathBuf {
    const SHAPE: &'static str = "PATH";

    fn parse(text: &str) -> Result<Self, String> {
        let path = Self::from(text);
        if text.is_empty() {
            Err("it is empty".to_owned())
        } else if text.contains('\0') {
            Err("it contains a zero byte".to_owned())
        } else if path.is_relative() {
            Err(format!("`{text}` is not an absolute path"))
        } else {
            Ok(path)
        }
    }

    fn show(&self) -> String {
        self.display().to_string()
    }
}

/// What may be left out.
impl<T: Value> Value for Option<T> {
    const SHAPE: &'static str = T::SHAPE;

    fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            Ok(None)
        } else {
            T::parse(text).map(Some)
        }
    }

    fn show(&self) -> String {
        self.as_ref().map_or_else(String::new, Value::show)
    }
}

impl Value for NonZeroUsize {
    const SHAPE: &'static str = "NUMBER";

    fn parse(text: &str) -> Result<Self, String> {
        text.parse()
            .map_err(|_| format!("`{text}` is no number of at least 1"))
    }

    fn show(&self) -> String {
        self.to_string()
    }
}

impl Value for Duration {
    const SHAPE: &'static str = "DURATION";

    fn parse(text: &str) -> Result<Self, String> {
        if let Ok(seconds) = text.parse() {
            return Ok(Self::from_secs(seconds));
        }
        humantime::parse_duration(text).map_err(|e| {
            format!("`{text}` is no duration such as 5s, 250ms or a number of seconds ({e})")
        })
    }

    fn show(&self) -> String {
        humantime::format_duration(*self).to_string()
    }
}

/// Names of Kubernetes namespaces.
impl Value for BTreeSet<String> {
    const SHAPE: &'static str = "NAME,...";

    fn parse(text: &str) -> Result<Self, String> {
        let names: Self = list(text)?.into_iter().collect();
        match names.iter().find(|n| !is_dns_label(n)) {
            Some(wrong) => Err(format!("`{wrong}` can be no namespace's name")),
            None => Ok(names),
        }
    }

    fn show(&self) -> String {
        self.iter().cloned().collect::<Vec<_>>().join(",")
    }
}

/// Names, or beginnings of names followed by `*`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Patterns(pub Vec<String>);

impl Value for Patterns {
    const SHAPE: &'static str = "NAME|PREFIX*,...";

    fn parse(text: &str) -> Result<Self, String> {
        let words: Vec<String> = list(text)?;
        let wrong = |word: &&String| {
            let name = word.strip_suffix('*').unwrap_or(word);
            let name = name.strip_suffix('-').unwrap_or(name);
            !is_dns_subdomain(name)
        };
        match words.iter().find(wrong) {
            Some(word) => Err(format!(
                "`{word}` is neither a name nor the beginning of one with a * behind it"
            )),
            None => Ok(Self(words)),
        }
    }

    fn show(&self) -> String {
        self.0.join(",")
    }
}

/// Words between commas, or a list as a file has it.
fn list(text: &str) -> Result<Vec<String>, String> {
    let words: Vec<String> = if text.trim_start().starts_with('[') {
        serde_json::from_str(text).map_err(|_| format!("`{text}` is no list of names"))?
    } else {
        text.split(',').map(str::to_owned).collect()
    };
    let words = words.iter().map(|n| n.trim().to_owned());
    Ok(words.filter(|n| !n.is_empty()).collect())
}

/// RFC 1123 label: what a namespace may be called.
pub(super) fn is_dns_label(name: &str) -> bool {
    (1..=63).contains(&name.len())
        && name
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-')
}

/// RFC 1123 subdomain: what nodes and most other objects may be called.
pub(super) fn is_dns_subdomain(name: &str) -> bool {
    name.len() <= 253 && name.split('.').all(is_dns_label)
}

/// An address to listen on; without an IP address on all of them, IPv4 and IPv6.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Listen {
    /// None = every address of both families.
    pub ip: Option<IpAddr>,
    /// 0 = one that is free.
    pub port: u16,
}

impl Listen {
    /// Every address.
    #[must_use]
    pub const fn any(port: u16) -> Self {
        Self { ip: None, port }
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.ip {
            None => write!(f, ":{}", self.port),
            Some(ip) => std::net::SocketAddr::new(ip, self.port).fmt(f),
        }
    }
}

impl Value for Listen {
    const SHAPE: &'static str = "[ADDRESS]:PORT";

    fn parse(text: &str) -> Result<Self, String> {
        if let Ok(port) = text.strip_prefix(':').unwrap_or(text).parse() {
            return Ok(Self::any(port));
        }
        text.parse::<std::net::SocketAddr>()
            .map(|at| Self {
                ip: Some(at.ip()),
                port: at.port(),
            })
            .map_err(|_| {
                format!("`{text}` is no address such as :15014, 10.0.0.1:15014 or [::1]:15014")
            })
    }

    fn show(&self) -> String {
        self.to_string()
    }
}

/// For how long an absent ztunnel is waited for; none = for ever.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Grace(pub Option<Duration>);

impl Value for Grace {
    const SHAPE: &'static str = "DURATION|forever";

    fn parse(text: &str) -> Result<Self, String> {
        if text == "forever" {
            return Ok(Self(None));
        }
        match Duration::parse(text) {
            Ok(wait) => Ok(Self(Some(wait))),
            Err(why) => Err(format!("{why}, nor `forever`")),
        }
    }

    fn show(&self) -> String {
        self.0.map_or_else(|| "forever".to_owned(), |d| d.show())
    }
}

/// A filter of log events, in the words of `tracing_subscriber::EnvFilter`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LogLevel(String);

impl LogLevel {
    /// The default.
    #[must_use]
    pub fn info() -> Self {
        Self("info".to_owned())
    }

    /// As text that makes a filter.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Value for LogLevel {
    const SHAPE: &'static str = "LEVEL|FILTER";

    fn parse(text: &str) -> Result<Self, String> {
        const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
        let text = text.trim().to_lowercase();
        let wrong = || {
            format!(
                "`{text}` is neither one of {} nor filters such as info,culvert::zds=debug",
                LEVELS.join(", ")
            )
        };
        // A bare word that is no level would be taken for the name of a module.
        let level_of = |part: &str| {
            part.rsplit('=')
                .next()
                .map(str::trim)
                .unwrap_or_default()
                .to_owned()
        };
        if text.is_empty()
            || !text
                .split(',')
                .all(|part| LEVELS.contains(&level_of(part).as_str()))
        {
            return Err(wrong());
        }
        tracing_subscriber::EnvFilter::try_new(&text).map_err(|_| wrong())?;
        Ok(Self(text))
    }

    fn show(&self) -> String {
        self.0.clone()
    }
}

/// Who belongs to the mesh, as it was written; `None` = by label.
#[derive(Clone, PartialEq, Debug, Default, Serialize)]
#[serde(transparent)]
pub struct EnablementSelectors(pub Option<serde_json::Value>);

impl Value for EnablementSelectors {
    const SHAPE: &'static str = "YAML";

    fn parse(text: &str) -> Result<Self, String> {
        let value: serde_json::Value =
            serde_saphyr::from_str(text).map_err(|e| format!("it is no YAML: {e}"))?;
        match &value {
            serde_json::Value::Null => Ok(Self(None)),
            serde_json::Value::Array(list) if list.is_empty() => Ok(Self(None)),
            serde_json::Value::Array(_) => {
                parse_selectors(&value.to_string())?;
                Ok(Self(Some(value)))
            }
            _ => Err("it is no list of {podSelector, namespaceSelector}".to_owned()),
        }
    }

    fn show(&self) -> String {
        self.0
            .as_ref()
            .map_or_else(String::new, ToString::to_string)
    }
}
