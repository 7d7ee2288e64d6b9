//! What a test needs outside its own namespace: pods that go with the value, and labels of namespaces that are taken away
//! with it. What is to be known about a failure is written down before that.

use serde_json::Value;

use crate::bed::Bed;

/// What undoes it.
pub(crate) struct Elsewhere<'a> {
    bed: &'a Bed,
    undo: Vec<String>,
}

impl<'a> Elsewhere<'a> {
    /// A pod in another namespace.
    pub(crate) fn pod(bed: &'a Bed, namespace: &str, mut pod: Value) -> Self {
        pod["metadata"]["namespace"] = namespace.into();
        let name = pod["metadata"]["name"].as_str().unwrap();
        let undo = [
            "delete",
            "pod",
            name,
            "-n",
            namespace,
            "--ignore-not-found",
            "--wait=false",
        ];
        let elsewhere = Self::undone_by(bed, &undo);
        bed.cluster.apply(&pod.to_string()).unwrap();
        elsewhere
    }

    /// A label of another namespace that is not there without it.
    pub(crate) fn label(bed: &'a Bed, namespace: &str, label: &str) -> Self {
        let (key, _) = label.split_once('=').unwrap();
        let args = ["label", "namespace", namespace, "--overwrite"];
        let elsewhere = Self::undone_by(bed, &[&args[..], &[&format!("{key}-")]].concat());
        bed.cluster
            .kubectl(&[&args[..], &[label]].concat())
            .unwrap();
        elsewhere
    }

    fn undone_by(bed: &'a Bed, undo: &[&str]) -> Self {
        let undo = undo.iter().map(|word| (*word).to_owned()).collect();
        Self { bed, undo }
    }
}

impl Drop for Elsewhere<'_> {
    fn drop(&mut self) {
        self.bed.keep_if_failing();
        let undo: Vec<&str> = self.undo.iter().map(String::as_str).collect();
        if let Err(error) = self.bed.cluster.kubectl(&undo) {
            eprintln!("{error:#}");
        }
    }
}
