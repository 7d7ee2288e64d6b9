//! `culvert events`: decisions as they happen.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Context as _;
use culvert::kernel::{Netns, Node, events::Events};

use super::{Global, output::Format};

/// Print decisions as they happen, until interrupted. The programs record only while somebody watches.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only this namespace.
    #[arg(long, value_name = "PATH")]
    netns: Option<PathBuf>,
    /// Stop after this many seconds.
    #[arg(long, value_name = "N")]
    seconds: Option<u64>,
}

pub(crate) fn run(global: &Global, args: &Args) -> anyhow::Result<ExitCode> {
    let node = Node::open(&global.bpffs)?.with_context(|| {
        format!(
            "nothing is loaded at {}: run `culvert load` first",
            global.bpffs.display()
        )
    })?;
    let only = args
        .netns
        .as_deref()
        .map(Netns::open)
        .transpose()?
        .map(|n| n.cookie().0);
    let mut events = Events::open(&node)?;
    let end = args
        .seconds
        .map(|s| std::time::Instant::now() + Duration::from_secs(s));
    while end.is_none_or(|end| std::time::Instant::now() < end) {
        for e in events.next(Duration::from_millis(200))? {
            if only.is_some_and(|cookie| cookie != e.cookie) {
                continue;
            }
            match global.output {
                Format::Json | Format::Yaml => println!("{}", serde_json::to_string(&e)?),
                Format::Table => println!(
                    "{:>12.6}  pod {}  {:<8}  {:<22}  {} -> {}",
                    e.time_ns as f64 / 1e9,
                    e.cookie,
                    e.direction,
                    e.verdict,
                    std::net::SocketAddr::new(e.source, e.source_port),
                    std::net::SocketAddr::new(e.destination, e.destination_port),
                ),
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}
