//! `ztunnel-standin`: command line, logging, signals. Everything else is in the library.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;
use ztunnel_standin::config::{Config, DnsListen};
use ztunnel_standin::dns::{Dns, NameArg};
use ztunnel_standin::identity::Ca;
use ztunnel_standin::manager::Manager;
use ztunnel_standin::stats;
use ztunnel_standin::workloads::{PeerArg, Workloads};

/// Stands in for ztunnel in Culvert's demo and tests: same sockets, marks and protocols, no control plane.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    /// Where `gen-ca` wrote the CA; without it, only pods of this process trust one another.
    #[arg(long, value_name = "DIR")]
    ca_dir: Option<PathBuf>,
    /// The node agent's ZDS socket (SOCK_SEQPACKET).
    #[arg(
        long,
        value_name = "PATH",
        default_value = "/var/run/ztunnel/ztunnel.sock"
    )]
    zds: PathBuf,
    /// A peer that is reached through HBONE.
    #[arg(long = "hbone-peer", value_name = "ADDR=SPIFFE_ID")]
    hbone_peers: Vec<PeerArg>,
    /// A file of peers: {"ADDR": {"identity": "spiffe://..", "hbone": true}}; read again when it changes.
    #[arg(long, value_name = "FILE")]
    workloads: Option<PathBuf>,
    /// Answers every connection on this unix socket with one line of JSON: what happened in each pod.
    #[arg(long, value_name = "PATH")]
    stats: Option<PathBuf>,
    /// A name that is answered to pods without asking anyone; repeat for more names and addresses.
    #[arg(long = "dns-name", value_name = "NAME=IP")]
    dns_names: Vec<NameArg>,
    /// The resolver that pods' other names are asked of, reached from inside each pod.
    #[arg(long, value_name = "IP:PORT")]
    dns_upstream: Option<SocketAddr>,
    /// On which loopback addresses lookups are answered.
    #[arg(long, value_enum, default_value_t = DnsListen::Both)]
    dns_listen: DnsListen,
    /// How long connections may go on after SIGTERM, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 5)]
    drain: u64,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Makes a CA that several stand-ins can share.
    GenCa {
        /// Where to write it.
        #[arg(long, value_name = "DIR")]
        dir: PathBuf,
    },
}

fn main() -> ExitCode {
    let args = Args::parse();
    let filter =
        tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_writer(std::io::stderr)
        .init();
    raise_descriptor_limit();
    let outcome = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")
        .and_then(|runtime| runtime.block_on(run(args)));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Every pod takes eight descriptors and every connection two; the usual soft limit ends at a hundred pods.
fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}

async fn run(args: Args) -> anyhow::Result<()> {
    if let Some(Command::GenCa { dir }) = args.command {
        return Ca::generate()?.write(&dir);
    }
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let config = Config {
        ca: args.ca_dir.as_deref().map_or_else(Ca::generate, Ca::load)?,
        workloads: Workloads::new(args.hbone_peers, args.workloads)?,
        dns: Dns::new(args.dns_names, args.dns_upstream),
        dns_listen: args.dns_listen,
        drain: Duration::from_secs(args.drain),
    };
    let mut manager = Manager::new(Arc::new(config));
    if let Some(path) = &args.stats {
        tokio::spawn(stats::serve(stats::bind(path)?, manager.pods()));
    }

    let stop = CancellationToken::new();
    tokio::select! {
        ended = manager.run(&args.zds, &stop) => return Ok(ended?),
        () = either(&mut terminate, &mut interrupt) => tracing::info!("draining"),
    }
    tokio::select! {
        () = manager.drain() => tracing::info!("drained"),
        () = either(&mut terminate, &mut interrupt) => tracing::warn!("told twice, leaving at once"),
    }
    if let Some(path) = &args.stats {
        // Leaving it behind is harmless: the next start takes it away.
        let _ = std::fs::remove_file(path);
    }
    Ok(())
}

async fn either(one: &mut Signal, other: &mut Signal) {
    tokio::select! {
        _ = one.recv() => {}
        _ = other.recv() => {}
    }
}
