//! What the API server says that agents have asked it: its audit log, read on from where it was.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use serde_json::Value;

/// One request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) node: String,
    /// Verb and resource.
    pub(super) what: String,
    /// Of a watch: after how many seconds it asked to be ended.
    watch: Option<u32>,
    over: bool,
}

/// The log so far.
#[derive(Debug)]
pub(super) struct Audit {
    path: PathBuf,
    read: u64,
    requests: HashMap<String, Request>,
}

impl Audit {
    pub(super) fn new(path: PathBuf) -> Self {
        Self {
            path,
            read: 0,
            requests: HashMap::new(),
        }
    }

    /// Requests that were not there at the last look.
    pub(super) fn news(&mut self) -> Result<Vec<Request>> {
        let mut file = File::open(&self.path)
            .with_context(|| format!("reading what was asked in {}", self.path.display()))?;
        file.seek(SeekFrom::Start(self.read))?;
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        // The last line may be half written.
        let whole = text.rfind('\n').map_or(0, |at| at + 1);
        self.read += u64::try_from(whole)?;
        self.take(&text[..whole])
    }

    fn take(&mut self, text: &str) -> Result<Vec<Request>> {
        let mut news = Vec::new();
        for line in text.lines() {
            let entry: Value = serde_json::from_str(line).context("a line of the audit log")?;
            let id = entry["auditID"].as_str().context("no auditID")?;
            let over = entry["stage"] == "ResponseComplete" || entry["stage"] == "Panic";
            if let Some(known) = self.requests.get_mut(id) {
                known.over |= over;
                continue;
            }
            let request = request(&entry, over);
            self.requests.insert(id.to_owned(), request.clone());
            news.push(request);
        }
        Ok(news)
    }

    /// How often a minute the watches of a node's agent that go on by now are asked for again: each ends when it asked to.
    pub(super) fn renewals(&self, node: &str) -> f64 {
        let ours = self.requests.values().filter(|one| one.node == node);
        let open = ours.filter(|one| !one.over).filter_map(|one| one.watch);
        open.map(|seconds| 60.0 / f64::from(seconds.max(1))).sum()
    }
}

impl Request {
    pub(super) fn is_watch(&self) -> bool {
        self.watch.is_some()
    }
}

/// How many there were of each kind.
pub(super) fn by_kind(requests: &[Request]) -> BTreeMap<String, usize> {
    let mut kinds = BTreeMap::new();
    for request in requests {
        *kinds.entry(request.what.clone()).or_default() += 1;
    }
    kinds
}

fn request(entry: &Value, over: bool) -> Request {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (verb, object) = (text(&entry["verb"]), &entry["objectRef"]);
    let mut what = format!("{verb} {}", text(&object["resource"]));
    if let Some(sub) = object["subresource"].as_str() {
        what = format!("{what}/{sub}");
    }
    let timeout = || -> Option<u32> {
        let (_, rest) = entry["requestURI"]
            .as_str()?
            .split_once("timeoutSeconds=")?;
        rest.split('&').next()?.parse().ok()
    };
    Request {
        node: text(&entry["user"]["extra"]["authentication.kubernetes.io/node-name"][0]),
        what,
        // One that does not say when it ends is ended by the server, after half an hour at the earliest.
        watch: (verb == "watch").then(|| timeout().unwrap_or(1800)),
        over,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(id: &str, stage: &str, verb: &str, uri: &str) -> String {
        let entry = serde_json::json!({
            "auditID": id, "stage": stage, "verb": verb, "requestURI": uri,
            "user": {"extra": {"authentication.kubernetes.io/node-name": ["node1"]}},
            "objectRef": {"resource": "pods", "subresource": if verb == "patch" { "status" } else { "" }},
        });
        format!("{entry}\n").replace(r#","subresource":"""#, "")
    }

    #[test]
    fn a_request_counts_once_and_a_watch_as_long_as_it_goes_on() {
        let mut audit = Audit::new(PathBuf::new());
        let watch = |stage| {
            line(
                "1",
                stage,
                "watch",
                "/api/v1/pods?timeoutSeconds=240&watch=true",
            )
        };
        let news =
            audit.take(&(watch("ResponseStarted") + &line("2", "ResponseComplete", "patch", "/x")));
        let kinds = by_kind(&news.unwrap());
        assert_eq!(
            kinds,
            BTreeMap::from([("patch pods/status".into(), 1), ("watch pods".into(), 1)])
        );
        assert!((audit.renewals("node1") - 0.25).abs() < 1e-9);
        assert!(audit.renewals("node2").abs() < 1e-9);
        assert_eq!(audit.take(&watch("ResponseComplete")).unwrap(), []);
        assert!(audit.renewals("node1").abs() < 1e-9);
    }
}
