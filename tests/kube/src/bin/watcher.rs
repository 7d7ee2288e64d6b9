//! The watch in a process of its own, so that its memory can be measured: `watcher KUBECONFIG`. For each line on stdin it
//! prints one of JSON with what it knows and what it weighs.

use std::path::Path;

use anyhow::{Context as _, Result};
use culvert::watch::client;
use culvert_kube_tests::{logs, watch_with};
use serde_json::json;
use tokio::io::{AsyncBufReadExt as _, BufReader};

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<()> {
    logs();
    let kubeconfig = std::env::args()
        .nth(1)
        .context("usage: watcher KUBECONFIG")?;
    let config = client::config(Some(Path::new(&kubeconfig))).await?;
    let watcher = watch_with(client::connect(&config)?);
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    while lines.next_line().await?.is_some() {
        let cluster = watcher.cluster.borrow();
        println!(
            "{}",
            json!({
                "listed": cluster.listed && cluster.opted_in_listed,
                "pods": cluster.pods.len(),
                "namespaces": cluster.namespaces.len(),
                "opted_in": cluster.opted_in.values().sum::<usize>(),
                "objects": watcher.api.stats().objects.get(),
                "rss_kib": memory("VmRSS:")?,
                "anonymous_kib": memory("RssAnon:")?,
                "peak_kib": memory("VmHWM:")?,
            })
        );
    }
    Ok(())
}

fn memory(line: &str) -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let mut lines = status.lines();
    let value = lines
        .find_map(|l| l.strip_prefix(line))
        .context("no such line")?;
    let number = value.trim().strip_suffix(" kB").context("not in kB")?;
    number.trim().parse().context("not a number")
}
