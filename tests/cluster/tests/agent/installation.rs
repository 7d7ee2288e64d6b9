//! What there is of Culvert: on the nodes its plugin and its entry in their CNI configurations, at the API server its agents.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::Stdio;

use culvert_cluster::AGENT;
use serde_json::Value;

use crate::bed::Bed;

/// The configuration of the cluster's own network, on every node.
pub(crate) const FILE: &str = "/etc/cni/net.d/10-bridge.conflist";

/// What the cluster's own network would have in its configuration on a node: all but our plugin.
pub(crate) fn foreign(bed: &Bed, node: &str) -> Value {
    let node = bed.cluster.node(node).unwrap();
    let text = bed.cluster.run_on(&node, &["cat", FILE]).unwrap();
    let mut list: Value = serde_json::from_str(&text).unwrap();
    let plugins = list["plugins"].as_array_mut().unwrap();
    plugins.retain(|plugin| plugin["type"] != "culvert-cni");
    list
}

/// Writes the configuration of a node as the cluster's own network would.
pub(crate) fn write_foreign(bed: &Bed, node: &str, text: &str) {
    let node = bed.cluster.node(node).unwrap();
    // From within the node: its /etc is an overlay, which may not be changed from beneath.
    let script = format!("cat > {FILE}.new && mv {FILE}.new {FILE}");
    let command = ["sh", "-ec", &script];
    let mut command = bed.cluster.command_on(&node, &command).unwrap();
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    input.write_all(text.as_bytes()).unwrap();
    drop(input);
    assert!(child.wait().unwrap().success());
}

/// All that there is of CNI configurations on a node: names, modes, bytes.
pub(crate) fn everything_configured(bed: &Bed, node: &str) -> String {
    let node = bed.cluster.node(node).unwrap();
    let look = "cd /etc/cni/net.d && ls -A && stat -c %a -- $(ls -A) && cat -- $(ls -A)";
    bed.cluster.run_on(&node, &["sh", "-ec", look]).unwrap()
}

/// What the runtime of a node finds in its CNI configurations, all of them.
pub(crate) fn configurations(bed: &Bed, node: &str) -> String {
    let node = bed.cluster.node(node).unwrap();
    let cat = ["sh", "-c", "cat /etc/cni/net.d/*"];
    bed.cluster.run_on(&node, &cat).unwrap()
}

/// Whether plugin and configuration of a node are in place.
pub(crate) fn installed(bed: &Bed, node: &str) -> bool {
    // In the order in which they are taken away: the plugin is there for as long as there is an entry.
    let entry = configurations(bed, node).contains("culvert-cni");
    let plugin = plugin_of(bed, node).exists();
    assert!(
        plugin || !entry || !configurations(bed, node).contains("culvert-cni"),
        "{node}: an entry without a plugin"
    );
    plugin && entry
}

/// Waits until nothing of ours is left on a node, neither plugin nor entry; then all is to be, byte for byte, as it was.
pub(crate) fn is_taken_away(bed: &Bed, node: &str, before: &str) {
    bed.until(&format!("plugin and entry of {node} are gone"), || {
        !configurations(bed, node).contains("culvert-cni") && !plugin_of(bed, node).exists()
    });
    assert_eq!(everything_configured(bed, node), before, "{node}");
}

/// Where the plugin of a node is, if it is.
pub(crate) fn plugin_of(bed: &Bed, node: &str) -> PathBuf {
    let node = bed.cluster.node(node).unwrap();
    node.dir().join("opt/cni/bin/culvert-cni")
}

/// Runs kubectl in the agent's namespace.
pub(crate) fn of_agent(bed: &Bed, args: &[&str]) -> String {
    let namespaced = [&["-n", AGENT.1][..], args].concat();
    bed.cluster.kubectl(&namespaced).unwrap()
}

/// The agents' pods, with what runs in each: the same again if none was started anew.
pub(crate) fn running_agents(bed: &Bed) -> BTreeMap<String, String> {
    let pods = agents(bed).into_iter().map(|pod| {
        let name = pod["metadata"]["name"].as_str().unwrap().to_owned();
        let container = &pod["status"]["containerStatuses"][0]["containerID"];
        (name, container.to_string())
    });
    pods.collect()
}

/// The nodes with an agent's pod that has not been told to end.
pub(crate) fn staying_agents(bed: &Bed) -> Vec<String> {
    let pods = agents(bed).into_iter();
    let staying = pods.filter(|pod| pod["metadata"]["deletionTimestamp"].is_null());
    staying
        .map(|pod| {
            pod["spec"]["nodeName"]
                .as_str()
                .unwrap_or_default()
                .to_owned()
        })
        .collect()
}

fn agents(bed: &Bed) -> Vec<Value> {
    let pods = bed.cluster.admin().get(&["pods", "-n", AGENT.1]).unwrap();
    let pods = pods["items"].as_array().unwrap().iter();
    pods.filter(|pod| pod["metadata"]["ownerReferences"][0]["name"] == AGENT.0)
        .cloned()
        .collect()
}
