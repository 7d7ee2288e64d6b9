//! Objects as kustomize and helm render them, made comparable.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, Output};

use culvert_cluster::{Part, Parts};
use serde_json::Value;

/// Kind, namespace and name of an object.
pub(crate) type Key = (String, String, String);

/// The directory of what a cluster gets.
pub(crate) fn deploy() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../deploy")
}

/// The overlays there are.
pub(crate) fn overlays() -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(deploy().join("overlays"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert!(names.len() >= 7, "{names:?}");
    names
}

#[expect(
    clippy::disallowed_methods,
    reason = "the real helm and the real kustomize are what is tested"
)]
fn program(path: impl AsRef<std::ffi::OsStr>) -> Command {
    Command::new(path)
}

/// The real helm, with files of its own.
pub(crate) fn helm(args: &[&str]) -> Command {
    let mut helm = program(Parts::find().unwrap().get(Part::Helm).unwrap());
    let own = std::env::temp_dir().join(format!("culvert-helm-{}", std::process::id()));
    for (name, place) in [
        ("HELM_CACHE_HOME", "cache"),
        ("HELM_CONFIG_HOME", "config"),
        ("HELM_DATA_HOME", "data"),
    ] {
        helm.env(name, own.join(place));
    }
    helm.env_remove("HELM_NAMESPACE").args(args);
    helm
}

/// What it printed; failing is a failure of the test.
pub(crate) fn done(mut command: Command) -> String {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// `helm template` with some values.
pub(crate) fn template(values: &[&str]) -> Output {
    let chart = deploy().join("chart");
    let chart = chart.to_str().unwrap();
    // Built from its module, helm takes itself for one of an old Kubernetes.
    let mut args = vec![
        "template",
        "culvert",
        chart,
        "--namespace",
        crate::HOME,
        "--kube-version",
        "1.36.3",
    ];
    for value in values {
        // Written otherwise, an empty list is one empty string.
        let flag = match value.ends_with("=[]") {
            true => "--set-json",
            false => "--set",
        };
        args.extend([flag, value]);
    }
    helm(&args).output().unwrap()
}

/// The chart's objects.
pub(crate) fn chart(values: &[&str]) -> BTreeMap<Key, Value> {
    let output = template(values);
    assert!(
        output.status.success(),
        "{values:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    objects(&String::from_utf8(output.stdout).unwrap())
}

/// The objects of a kustomization below `deploy/`.
pub(crate) fn kustomize(dir: &str) -> BTreeMap<Key, Value> {
    let mut command = program("kubectl");
    command.arg("kustomize").arg(deploy().join(dir));
    objects(&done(command))
}

/// Without what says who has rendered them, and lists in which order means nothing in one order.
pub(crate) fn objects(text: &str) -> BTreeMap<Key, Value> {
    let documents: Vec<Option<Value>> = serde_saphyr::from_multiple(text).unwrap();
    let mut found = BTreeMap::new();
    for mut object in documents.into_iter().flatten() {
        if let Some(labels) = object["metadata"]["labels"].as_object_mut() {
            labels.retain(|key, _| {
                !key.starts_with("helm.sh/")
                    && !["instance", "version", "managed-by"]
                        .iter()
                        .any(|part| key.as_str() == format!("app.kubernetes.io/{part}"))
            });
        }
        if let Some(volumes) = object.pointer_mut("/spec/template/spec/volumes") {
            let volumes = volumes.as_array_mut().unwrap();
            volumes.sort_by_key(|volume| volume["name"].to_string());
        }
        let of = |pointer: &str| {
            let value = object.pointer(pointer).and_then(Value::as_str);
            value.unwrap_or_default().to_owned()
        };
        let key = (of("/kind"), of("/metadata/namespace"), of("/metadata/name"));
        assert!(
            found.insert(key.clone(), sorted(&object)).is_none(),
            "{key:?} is there twice"
        );
    }
    found
}

/// Order of keys means nothing either, and `serde_json` compares without it only where it keeps none.
fn sorted(value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            let sorted: BTreeMap<String, Value> = map
                .iter()
                .map(|(key, value)| (key.clone(), sorted(value)))
                .collect();
            serde_json::to_value(sorted).unwrap()
        }
        Value::Array(list) => list.iter().map(sorted).collect(),
        other => other.clone(),
    }
}
