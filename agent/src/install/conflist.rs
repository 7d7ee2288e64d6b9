//! Our entry in a CNI configuration: put in, brought up to date, taken out again.
//!
//! Pure: bytes in, text or a named error out. Everything that is not ours keeps its bytes, so that taking the entry out
//! gives back exactly what was there before it was put in. Opens no file and knows no directory.

mod error;

use std::{fmt::Write as _, ops::Range};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

pub use error::Error;

use super::json::{self, Member};
use culvert_cni::config::VERSIONS;

/// `type` of our entry and name of the binary.
pub const PLUGIN: &str = "culvert-cni";
/// Larger files are refused: no network needs them, and the agent has little memory.
pub const MAX_BYTES: usize = 1 << 20;
/// Key of our entry that says how it came to where it is. The plugin does not read it.
const ORIGIN: &str = "origin";

/// Our entry, without what the installer notes in it.
pub type Entry = Map<String, Value>;

/// How our entry came to where it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Origin {
    /// The whole file is ours: a copy of the plugins of this one.
    CopyOf(String),
    /// The list is ours and holds, byte for byte, what was a lone configuration.
    Wrapped(Wrapped),
    /// The file is ours and nobody else's: a lone configuration of our plugin.
    Standalone,
}

/// What a lone configuration was before it became a list.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Wrapped {
    /// Its file name.
    pub name: String,
    /// What stood before its opening brace.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub head: String,
    /// What stood behind its closing brace.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub tail: String,
    /// Where it pointed to, if it was a symbolic link.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link: Option<String>,
}

/// What is left of a configuration without us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Released {
    /// It has no entry of ours.
    NotOurs,
    /// The same file, without our entry.
    Edited(String),
    /// The file goes; this one comes back.
    Unwrapped(Wrapped, String),
    /// The file goes: all of it was ours.
    Nothing,
}

/// A configuration that was read and found good enough to edit.
#[derive(Debug)]
pub struct Conf<'a> {
    text: &'a str,
    members: Vec<Member>,
    /// Where the plugins are; none for a lone configuration.
    plugins: Option<Vec<Range<usize>>>,
    types: Vec<String>,
}

/// Whether the file of this name holds a list. Runtimes go by the name alone.
#[must_use]
pub fn is_list(name: &str) -> bool {
    name.ends_with(".conflist")
}

/// Whether this type of plugin is istio-cni's, of whatever revision.
#[must_use]
pub fn is_istio(plugin: &str) -> bool {
    plugin == "istio-cni" || plugin.starts_with("istio-cni-")
}

impl<'a> Conf<'a> {
    /// Reads the content of the file called `name`.
    pub fn parse(name: &str, bytes: &'a [u8]) -> Result<Self, Error> {
        let (text, value) = read(bytes)?;
        let members = json::members(text, json::whole(text));
        for (i, m) in members.iter().enumerate() {
            if members.iter().take(i).any(|other| other.key == m.key) {
                return Err(Error::DuplicateKey(m.key.clone()));
            }
        }
        let named = |key: &str| {
            value
                .get(key)
                .and_then(Value::as_str)
                .is_some_and(|s| !s.is_empty())
        };
        let (plugins, types) = if is_list(name) {
            let at = members.iter().find(|m| m.key == "plugins");
            let Some((at, Some(Value::Array(values)))) = at.map(|m| (m, value.get("plugins")))
            else {
                return Err(Error::NoPlugins);
            };
            if values.is_empty() {
                return Err(Error::NoPlugins);
            }
            let found = json::elements(text, at.value.clone());
            let types = (1..)
                .zip(values)
                .map(|(i, v)| plugin_type(i, v))
                .collect::<Result<Vec<_>, _>>()?;
            for at in &found {
                unambiguous(text, at.clone())?;
            }
            (Some(found), types)
        } else {
            match value.get("type").and_then(Value::as_str) {
                Some(t) if !t.is_empty() => (None, vec![t.to_owned()]),
                _ if value.contains_key("plugins") => return Err(Error::ListInConf),
                _ => return Err(Error::NoType("the configuration".to_owned())),
            }
        };
        if !named("name") {
            return Err(Error::NoName);
        }
        version(&value)?;
        Ok(Self {
            text,
            members,
            plugins,
            types,
        })
    }

    /// The plugins' types, in order.
    #[must_use]
    pub fn types(&self) -> &[String] {
        &self.types
    }

    /// Our entry and what it says of its origin.
    #[must_use]
    pub fn ours(&self) -> Option<(Entry, Option<Origin>)> {
        let i = self.types.iter().position(|t| t == PLUGIN)?;
        let at = match &self.plugins {
            Some(plugins) => plugins.get(i)?.clone(),
            None => json::whole(self.text),
        };
        let entry: Entry = serde_json::from_str(self.text.get(at)?).ok()?;
        let origin = origin(entry.get(ORIGIN));
        Some((entry, origin))
    }

    /// The list with our entry in it: in its place if it is there, else last. No entry of istio-cni's stays in a list
    /// that is written anew; a list that already has ours as it should be comes back as it is.
    pub fn chain(&self, entry: &Entry) -> Result<String, Error> {
        let origin = match self.ours() {
            // What the list was before we wrapped it has to outlive an update.
            Some((_, Some(origin @ Origin::Wrapped(_)))) => Some(origin),
            _ => None,
        };
        self.with_entry(&marked(entry, origin.as_ref()))
    }

    /// A list of our own that carries a copy of the plugins of this configuration, which is called `name`.
    pub fn own_list(&self, name: &str, entry: &Entry) -> Result<String, Error> {
        let origin = Origin::CopyOf(name.to_owned());
        let entry = marked(entry, Some(&origin));
        match &self.plugins {
            Some(_) => self.with_entry(&entry),
            None => self.as_list(&entry),
        }
    }

    /// The list that takes the place of this lone configuration, which is called `name` and may be a link to `link`.
    pub fn wrap(&self, name: &str, link: Option<String>, entry: &Entry) -> Result<String, Error> {
        let whole = json::whole(self.text);
        let origin = Origin::Wrapped(Wrapped {
            name: name.to_owned(),
            head: self.text.get(..whole.start).unwrap_or_default().to_owned(),
            tail: self.text.get(whole.end..).unwrap_or_default().to_owned(),
            link,
        });
        self.as_list(&marked(entry, Some(&origin)))
    }

    fn with_entry(&self, entry: &Entry) -> Result<String, Error> {
        let ours: Vec<usize> = self.positions(|t| t == PLUGIN);
        if let [_] = ours[..]
            && self.ours().is_some_and(|(there, _)| there == *entry)
        {
            return Ok(self.text.to_owned());
        }
        let Some(plugins) = &self.plugins else {
            return self.as_list(entry);
        };
        if self.types.iter().all(|t| t == PLUGIN || is_istio(t)) {
            return Err(Error::OnlyOurs);
        }
        let mut text = self.text.to_owned();
        // From the back, so that what is in front keeps its place.
        let superfluous = self
            .positions(is_istio)
            .into_iter()
            .chain(ours.iter().copied().skip(1));
        let mut superfluous: Vec<usize> = superfluous.collect();
        superfluous.sort_unstable();
        for i in superfluous.iter().rev() {
            text = without(&text, *i);
        }
        let before = |i: usize| superfluous.iter().filter(|s| **s < i).count();
        let list = elements_of(&text);
        match ours.first() {
            Some(i) => {
                let Some(at) = list.get(i - before(*i)) else {
                    return Err(Error::NoPlugins);
                };
                let blank = blank_before(&text, at.start);
                let new = render(entry, blank);
                text.replace_range(at.clone(), &new);
            }
            None => {
                debug_assert_eq!(list.len() + superfluous.len(), plugins.len());
                let Some(last) = list.last() else {
                    return Err(Error::NoPlugins);
                };
                let blank = blank_before(&text, last.start).to_owned();
                // A list in one line gets its blank as people write it.
                let blank = if blank.is_empty() && list.len() == 1 {
                    " ".to_owned()
                } else {
                    blank
                };
                let new = format!(",{blank}{}", render(entry, &blank));
                text.insert_str(last.end, &new);
            }
        }
        Ok(text)
    }

    fn as_list(&self, entry: &Entry) -> Result<String, Error> {
        if self.types.iter().all(|t| t == PLUGIN || is_istio(t)) {
            return Err(Error::OnlyOurs);
        }
        let mut text = "{\n".to_owned();
        for m in &self.members {
            // The runtime hands these on to every plugin of the list, as it did with the lone one's.
            if matches!(m.key.as_str(), "cniVersion" | "cniVersions" | "name") {
                let value = self.text.get(m.value.clone()).unwrap_or_default();
                let _ = writeln!(text, "  \"{}\": {value},", m.key);
            }
        }
        let whole = self.text.get(json::whole(self.text)).unwrap_or_default();
        let _ = write!(
            text,
            "  \"plugins\": [\n    {whole},\n    {}\n  ]\n}}\n",
            render(entry, "\n    ")
        );
        Ok(text)
    }

    fn positions(&self, wanted: impl Fn(&str) -> bool) -> Vec<usize> {
        let hits = self.types.iter().enumerate().filter(|(_, t)| wanted(t));
        hits.map(|(i, _)| i).collect()
    }
}

/// A lone configuration of our plugin, for those who call it themselves (Multus).
#[must_use]
pub fn standalone(entry: &Entry) -> String {
    let mut conf = Map::new();
    conf.insert("cniVersion".to_owned(), "1.0.0".into());
    conf.insert("name".to_owned(), PLUGIN.into());
    conf.extend(marked(entry, Some(&Origin::Standalone)));
    format!("{}\n", render(&conf, "\n"))
}

/// The content of the file called `name` without us.
///
/// Works on more than [`Conf::parse`] takes: what we put in has to come out of a file that has since become wrong for
/// other reasons.
pub fn release(name: &str, bytes: &[u8]) -> Result<Released, Error> {
    let (text, value) = read(bytes)?;
    let list = is_list(name.strip_suffix(".cilium_bak").unwrap_or(name));
    if !list {
        // One that somebody else wrote for our plugin is not ours to remove.
        let ours = value.get("type").and_then(Value::as_str) == Some(PLUGIN)
            && origin(value.get(ORIGIN)) == Some(Origin::Standalone);
        return Ok(if ours {
            Released::Nothing
        } else {
            Released::NotOurs
        });
    }
    let Some(Value::Array(plugins)) = value.get("plugins") else {
        return Ok(Released::NotOurs);
    };
    let is_ours = |p: &Value| p.get("type").and_then(Value::as_str) == Some(PLUGIN);
    let Some(ours) = plugins.iter().find(|p| is_ours(p)) else {
        return Ok(Released::NotOurs);
    };
    let others = plugins.iter().filter(|p| !is_ours(p)).count();
    match ours.get(ORIGIN).and_then(|o| Origin::deserialize(o).ok()) {
        Some(Origin::CopyOf(_) | Origin::Standalone) => return Ok(Released::Nothing),
        // If somebody has chained another plugin since, the list has to stay one.
        Some(Origin::Wrapped(wrapped)) if others == 1 => {
            if let Some(at) = plugins.iter().position(|p| !is_ours(p))
                && let Some(was) = elements_of(text).get(at).and_then(|r| text.get(r.clone()))
            {
                let whole = format!("{}{was}{}", wrapped.head, wrapped.tail);
                return Ok(Released::Unwrapped(wrapped, whole));
            }
        }
        _ => {}
    }
    if others == 0 {
        return Ok(Released::Nothing);
    }
    let mut text = text.to_owned();
    for i in (0..plugins.len()).rev() {
        if plugins.get(i).is_some_and(is_ours) {
            text = without(&text, i);
        }
    }
    Ok(Released::Edited(text))
}

/// What an entry says of its origin; of what a later release says, nothing is known.
fn origin(noted: Option<&Value>) -> Option<Origin> {
    Origin::deserialize(noted?).ok()
}

/// The text and its top object.
fn read(bytes: &[u8]) -> Result<(&str, Map<String, Value>), Error> {
    if bytes.len() > MAX_BYTES {
        return Err(Error::TooLarge(bytes.len() as u64));
    }
    if bytes.starts_with(b"\xef\xbb\xbf") {
        return Err(Error::ByteOrderMark);
    }
    let text = std::str::from_utf8(bytes).map_err(|e| Error::NotUtf8(e.valid_up_to()))?;
    if text.trim().is_empty() {
        return Err(Error::Empty);
    }
    match serde_json::from_str(text) {
        Ok(Value::Object(value)) => Ok((text, value)),
        Ok(_) => Err(Error::NotAnObject),
        Err(e) if e.is_eof() => Err(Error::CutOff(e.line())),
        Err(e) => Err(Error::NotJson(e.to_string())),
    }
}

fn plugin_type(number: usize, plugin: &Value) -> Result<String, Error> {
    let Value::Object(plugin) = plugin else {
        return Err(Error::PluginNotAnObject(number));
    };
    match plugin.get("type").and_then(Value::as_str) {
        Some(t) if !t.is_empty() => Ok(t.to_owned()),
        _ => Err(Error::NoType(format!("plugin {number}"))),
    }
}

/// Which plugin runs must not depend on who reads.
fn unambiguous(text: &str, plugin: Range<usize>) -> Result<(), Error> {
    let types = json::members(text, plugin);
    if types.iter().filter(|m| m.key == "type").count() > 1 {
        return Err(Error::DuplicateKey("type".to_owned()));
    }
    Ok(())
}

fn version(value: &Map<String, Value>) -> Result<(), Error> {
    let spoken = |v: &Value| v.as_str().is_some_and(|v| VERSIONS.contains(&v));
    // A list may offer several, of which the runtime takes the highest that it knows itself.
    if let Some(Value::Array(several)) = value.get("cniVersions")
        && several.iter().any(spoken)
    {
        return Ok(());
    }
    match value.get("cniVersion") {
        Some(v) if spoken(v) => Ok(()),
        Some(Value::String(v)) => Err(Error::Version(format!("\"{v}\""))),
        Some(v) => Err(Error::Version(v.to_string())),
        None => Err(Error::Version("is missing, which means 0.1.0".to_owned())),
    }
}

fn marked(entry: &Entry, origin: Option<&Origin>) -> Entry {
    let mut entry = entry.clone();
    entry.remove(ORIGIN);
    let mut out = Map::new();
    out.insert("type".to_owned(), PLUGIN.into());
    out.extend(entry.into_iter().filter(|(k, _)| k != "type"));
    if let Some(origin) = origin.and_then(|o| serde_json::to_value(o).ok()) {
        out.insert(ORIGIN.to_owned(), origin);
    }
    out
}

/// The plugins of a list's text.
fn elements_of(text: &str) -> Vec<Range<usize>> {
    let members = json::members(text, json::whole(text));
    // The last of several is the one `serde_json` and Go take.
    let plugins = members.iter().rfind(|m| m.key == "plugins");
    plugins.map_or_else(Vec::new, |m| json::elements(text, m.value.clone()))
}

/// The text without plugin `i` and the comma and blanks that came with it.
fn without(text: &str, i: usize) -> String {
    let list = elements_of(text);
    let mut text = text.to_owned();
    let previous = i.checked_sub(1).and_then(|p| list.get(p));
    match (previous, list.get(i), list.get(i + 1)) {
        (Some(previous), Some(at), _) => text.replace_range(previous.end..at.end, ""),
        (None, Some(at), Some(next)) => text.replace_range(at.start..next.start, ""),
        (None, Some(at), None) => text.replace_range(at.clone(), ""),
        (_, None, _) => {}
    }
    text
}

/// The blanks in front of an element.
fn blank_before(text: &str, at: usize) -> &str {
    let front = text.get(..at).unwrap_or_default();
    front
        .get(front.trim_end_matches([' ', '\t', '\r', '\n']).len()..)
        .unwrap_or_default()
}

/// The entry as text: on lines of its own, indented like its neighbours, where these have lines of their own.
fn render(entry: &Entry, blank: &str) -> String {
    let Some(newline) = blank.rfind('\n') else {
        return serde_json::to_string(entry).unwrap_or_default();
    };
    let indent = blank.get(newline + 1..).unwrap_or_default();
    let step: &[u8] = if indent.starts_with('\t') {
        b"\t"
    } else {
        b"  "
    };
    let mut out = Vec::new();
    let format = serde_json::ser::PrettyFormatter::with_indent(step);
    let mut writer = serde_json::Serializer::with_formatter(&mut out, format);
    // A map of JSON values cannot fail to become JSON.
    let _ = entry.serialize(&mut writer);
    String::from_utf8(out)
        .unwrap_or_default()
        .replace('\n', &format!("\n{indent}"))
}
