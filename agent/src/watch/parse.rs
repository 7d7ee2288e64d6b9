//! Manifests as text: YAML of several documents, or JSON, to pods and namespaces.
//!
//! A document that cannot be read spoils its whole file, since half a file may be one still being written.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Deserialize;
use serde_saphyr::Spanned;

use super::objects;
use crate::model::{Namespace, Pod, keys};

/// What a file says.
#[derive(Clone, Debug, Default)]
pub(super) struct Content {
    pub(super) pods: Vec<Pod>,
    pub(super) namespaces: Vec<(String, Namespace)>,
    /// What is wrong without spoiling the rest.
    pub(super) hints: Vec<Fault>,
}

/// What is wrong, and in which line (0: not about one).
#[derive(Clone, Debug)]
pub(super) struct Fault {
    pub(super) line: u64,
    pub(super) what: String,
}

/// A manifest of any kind; of other kinds than a pod's, `spec` and `status` are read and not used.
#[derive(Deserialize)]
struct Document {
    kind: Option<Spanned<String>>,
    #[serde(default, deserialize_with = "objects::meta")]
    metadata: ObjectMeta,
    #[serde(default)]
    spec: objects::Spec,
    #[serde(default)]
    status: objects::Status,
    #[serde(default)]
    items: Vec<Document>,
}

/// Reads a file's text.
pub(super) fn content(text: &str) -> Result<Content, Fault> {
    let documents: Vec<Document> = serde_saphyr::from_multiple(text).map_err(|e| Fault {
        line: e.location().map_or(0, |l| l.line()),
        what: e.without_snippet().to_string(),
    })?;
    if documents.is_empty() && text.trim().is_empty() {
        return Err(fault(
            0,
            "the file is empty: remove it, or put a comment into it",
        ));
    }
    let mut content = Content::default();
    for document in documents {
        content.add(document)?;
    }
    Ok(content)
}

impl Content {
    fn add(&mut self, document: Document) -> Result<(), Fault> {
        let Document {
            kind,
            mut metadata,
            spec,
            status,
            items,
        } = document;
        let Some(kind) = kind else {
            let what = "a document without kind: write kind: Pod or kind: Namespace";
            return Err(fault(0, what));
        };
        let line = kind.referenced.line();
        let nameless = || fault(line, "no metadata.name: give it one");
        match kind.value.as_str() {
            "Pod" => {
                let namespace = metadata.namespace.unwrap_or_else(|| "default".into());
                let name = metadata.name.ok_or_else(nameless)?;
                let uid = metadata.uid.take();
                metadata.uid = Some(uid.unwrap_or_else(|| stable_uid(&namespace, &name)));
                metadata.namespace = Some(namespace);
                metadata.name = Some(name);
                let pod = objects::Pod {
                    metadata,
                    spec,
                    status,
                };
                let pod = objects::pod(pod).ok_or_else(nameless)?;
                self.hint(&pod, line);
                self.pods.push(pod);
            }
            "Namespace" => {
                let namespace = objects::namespace(metadata).ok_or_else(nameless)?;
                self.namespaces.push(namespace);
            }
            "List" | "PodList" | "NamespaceList" => {
                for item in items {
                    self.add(item)?;
                }
            }
            other => self.hints.push(fault(
                line,
                format!("kind {other} is left out: only Pod, Namespace and List count here"),
            )),
        }
        Ok(())
    }

    fn hint(&mut self, pod: &Pod, line: u64) {
        let mut lacks = |what: &str| {
            let text = format!(
                "pod {} lacks {what}: it cannot be enrolled",
                pod.reference()
            );
            self.hints.push(fault(line, text));
        };
        if pod.host_network {
            return;
        }
        if pod.addresses.is_empty() {
            lacks("status.podIPs");
        }
        if !pod.annotations.contains_key(keys::NETNS) {
            lacks("annotation culvert.dev/netns, the path of its network namespace");
        }
    }
}

fn fault(line: u64, what: impl Into<String>) -> Fault {
    let what = what.into();
    Fault { line, what }
}

/// In the form of a UUID, and the same for the same name for ever: FNV-1a over "namespace/name".
fn stable_uid(namespace: &str, name: &str) -> String {
    const OFFSET: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    let bytes = namespace.bytes().chain([b'/']).chain(name.bytes());
    let hash = bytes.fold(OFFSET, |h, b| (h ^ u128::from(b)).wrapping_mul(PRIME));
    let hex = format!("{hash:032x}");
    let parts = [
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..],
    ];
    parts.join("-")
}
