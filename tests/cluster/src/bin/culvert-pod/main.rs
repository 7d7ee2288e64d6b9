//! What runs in the pods of tests: a server that says who asked it, a connection that is kept up, and new connections one
//! after another. Command line only; it knows nothing of Kubernetes or of Culvert, and judges nothing but its own echo.

mod grpc;
mod serve;
mod talk;

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Parser;

/// A program for the pods of tests.
#[derive(Parser)]
#[command(name = "culvert-pod")]
enum Args {
    /// Answer: to a GET by whoever runs this and who asked, to anything else by an echo of its lines
    Serve {
        /// TCP port, both families
        #[arg(long, default_value_t = 8080)]
        port: u16,
        /// Where gRPC's health service answers, if anywhere
        #[arg(long)]
        grpc: Option<u16>,
    },
    /// Keep one connection up and send a line again and again; ends with an error when an echo does not come back
    Talk {
        /// Whom to talk to
        to: SocketAddr,
    },
    /// Open one connection after another; say each that failed, and once a second how many there were
    Load {
        /// Whom to ask, in turn
        #[arg(required = true)]
        to: Vec<SocketAddr>,
        /// Between two connections, in milliseconds
        #[arg(long, default_value_t = 20)]
        pause: u64,
    },
    /// Send one line on a new connection, again and again until it is echoed; the first packet leaves at once
    Send {
        /// To whom
        to: SocketAddr,
        /// What
        line: String,
    },
}

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    // The first process of a container is spared the signals that it has no handler for.
    let terminated = async {
        let kind = tokio::signal::unix::SignalKind::terminate();
        match tokio::signal::unix::signal(kind) {
            Ok(mut signal) => drop(signal.recv().await),
            Err(_none_to_be_had) => std::future::pending().await,
        }
    };
    runtime.block_on(async {
        tokio::select! {
            () = terminated => Ok(()),
            result = work(args) => result,
        }
    })
}

async fn work(args: Args) -> Result<()> {
    match args {
        Args::Serve { port, grpc } => serve::run(port, grpc).await,
        Args::Talk { to } => talk::keep(to).await,
        Args::Load { to, pause } => talk::load(&to, Duration::from_millis(pause)).await,
        Args::Send { to, line } => talk::send(to, &line).await,
    }
}
