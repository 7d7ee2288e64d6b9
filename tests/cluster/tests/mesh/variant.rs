//! Agents beside the one of the DaemonSet, each changed in one respect that keeps it from working: pods made from the
//! DaemonSet's template, and what they leave behind when they end.

use culvert_cluster::{AGENT, IN_TIME};
use serde_json::{Value, json};

use crate::bed::Bed;

/// The DaemonSet as it is installed.
pub(crate) fn daemonset(bed: &Bed) -> Value {
    let args = ["daemonset", AGENT.0, "-n", AGENT.1];
    bed.cluster.admin().get(&args).unwrap()
}

/// A pod of that template on a node. It is not started again when it ends, and it is not the DaemonSet's.
pub(crate) fn agent_pod(daemonset: &Value, name: &str, node: &str) -> Value {
    let mut spec = daemonset["spec"]["template"]["spec"].clone();
    spec["nodeName"] = node.into();
    spec["restartPolicy"] = "Never".into();
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": AGENT.1},
        "spec": spec,
    })
}

/// The same on node 1, beside another agent: it takes whatever ports are free.
pub(crate) fn second_agent(daemonset: &Value, name: &str) -> Value {
    let mut pod = agent_pod(daemonset, name, "node1");
    let agent = pod["spec"]["containers"][0].as_object_mut().unwrap();
    for part in ["ports", "startupProbe", "livenessProbe", "readinessProbe"] {
        agent.remove(part);
    }
    let args = agent["args"].as_array_mut().unwrap();
    args.push("--metrics-address=127.0.0.1:0".into());
    args.push("--health-address=127.0.0.1:0".into());
    // Of a run directory only one agent has the use.
    args.push(format!("--run-dir=/run/culvert/{name}").into());
    pod
}

/// Pods of these objects, which go with the value.
pub(crate) struct Variants<'a> {
    bed: &'a Bed,
    names: Vec<String>,
}

impl<'a> Variants<'a> {
    pub(crate) fn start(bed: &'a Bed, pods: &[Value]) -> Self {
        let name = |pod: &Value| pod["metadata"]["name"].as_str().unwrap().to_owned();
        let variants = Self {
            bed,
            names: pods.iter().map(name).collect(),
        };
        // What a run that was cut short has left.
        variants.delete(true);
        let list = json!({"apiVersion": "v1", "kind": "List", "items": pods});
        bed.cluster.apply(&list.to_string()).unwrap();
        variants
    }

    pub(crate) fn delete(&self, wait: bool) {
        let wait = format!("--wait={wait}");
        let delete = [
            "-n",
            AGENT.1,
            "delete",
            "pod",
            "--ignore-not-found",
            "--now",
            &wait,
            IN_TIME,
        ];
        let names: Vec<&str> = self.names.iter().map(String::as_str).collect();
        let deleted = self.bed.cluster.kubectl(&[&delete[..], &names].concat());
        // As well while a test fails.
        if let Err(error) = deleted {
            eprintln!("{error:#}");
        }
    }

    pub(crate) fn pod(&self, name: &str) -> Value {
        let args = ["pod", name, "-n", AGENT.1];
        self.bed.cluster.admin().get(&args).unwrap()
    }

    /// Events about it: reason and text of each.
    pub(crate) fn events(&self, name: &str) -> Vec<(String, String)> {
        let uid = self.pod(name)["metadata"]["uid"]
            .as_str()
            .unwrap()
            .to_owned();
        let field = format!("--field-selector=involvedObject.uid={uid}");
        let args = ["events", "-n", AGENT.1, &field];
        let events = self.bed.cluster.admin().get(&args).unwrap();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let events = events["items"].as_array().unwrap().iter();
        events
            .map(|one| (text(&one["reason"]), text(&one["message"])))
            .collect()
    }

    pub(crate) fn log(&self, name: &str) -> String {
        let log = ["-n", AGENT.1, "logs", name, "--tail=-1"];
        self.bed.cluster.kubectl(&log).unwrap()
    }

    /// Waits until it has ended, and sees to it that whoever looks at it is told the same everywhere: by its last line of
    /// log, by its container's last state, by an event. Returns that text.
    pub(crate) fn ended(&self, name: &str) -> String {
        self.bed.until(&format!("{name} has ended"), || {
            self.pod(name)["status"]["phase"] == "Failed"
        });
        let log = self.log(name);
        let said = log.lines().last().unwrap_or_default().to_owned();
        let why = said
            .strip_prefix("error: ")
            .unwrap_or_else(|| panic!("{name}: {log}"));
        let status = &self.pod(name)["status"]["containerStatuses"][0];
        assert_eq!(status["ready"], false);
        let message = status["state"]["terminated"]["message"].as_str().unwrap();
        assert!(message.trim_end().ends_with(&said), "{name}: {message}");
        // It was written before the end.
        let events = self.events(name);
        let told = |(reason, note): &(String, String)| {
            reason == "CulvertAgentFailed" && why.starts_with(note.as_str())
        };
        assert!(events.iter().any(told), "{name}: {why}: {events:?}");
        why.to_owned()
    }
}

impl Drop for Variants<'_> {
    fn drop(&mut self) {
        self.delete(false);
    }
}
