//! Arguments and dispatch.

mod agent;
mod events;
mod install;
mod load;
mod netns;
mod output;
mod preflight;
mod status;

use std::{io::IsTerminal as _, path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};
use culvert::{
    config::AgentArgs,
    kernel::{LoadOptions, pins},
};
use output::Format;

/// Carries pods' traffic into the node's own ztunnel with eBPF instead of iptables.
#[derive(Debug, Parser)]
#[command(name = "culvert", version, arg_required_else_help = true)]
pub(crate) struct Args {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Options of every command.
#[derive(Debug, clap::Args)]
pub(crate) struct Global {
    /// Directory on a bpffs where programs and maps are pinned.
    #[arg(long, global = true, env = "CULVERT_BPFFS", default_value = pins::DEFAULT, value_name = "DIR")]
    bpffs: PathBuf,
    /// Directory of the cgroup v2 hierarchy to attach to [default: its root, found by looking].
    #[arg(long, global = true, env = "CULVERT_CGROUP_ROOT", value_name = "DIR")]
    cgroup_root: Option<PathBuf>,
    /// Directory of the cgroup v2 hierarchy that holds all pods, where the DNS programs attach [default: `kubepods`,
    /// found by looking; the root where pods are in no cgroup of their own].
    #[arg(long, global = true, env = "CULVERT_DNS_CGROUP", value_name = "DIR")]
    dns_cgroup: Option<PathBuf>,
    /// How to print.
    #[arg(short, long, global = true, value_enum, default_value_t = Format::Table)]
    output: Format,
    /// Say more: -v what is done, -vv every step.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
}

impl Global {
    fn load_options(&self) -> LoadOptions {
        LoadOptions {
            bpffs: self.bpffs.clone(),
            cgroup_root: self.cgroup_root.clone(),
            dns_cgroup: self.dns_cgroup.clone(),
            probe_source: None,
            at_home: false,
            set_aside: false,
        }
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Keep every pod of this node as its labels say: the daemon of the DaemonSet, or of a host without Kubernetes (--pods).
    Agent(AgentArgs),
    /// Load and pin the node programs, or put this build's in place of those that are there.
    Load,
    /// Remove the node programs and maps from the kernel.
    Unload {
        /// Even while pods are enrolled: their rules stay behind and their traffic is not captured.
        #[arg(long)]
        force: bool,
    },
    Preflight(preflight::Args),
    /// Enrol network namespaces by hand, let them go, look at them.
    #[command(subcommand)]
    Netns(netns::Command),
    /// Print decisions as they happen.
    Events(events::Args),
    /// How the agent and this node's pods stand; without an agent, what the kernel alone says.
    Status(status::Args),
    Install(install::Args),
    Uninstall(install::UninstallArgs),
}

/// Runs the command of the process's arguments.
pub(crate) fn run() -> ExitCode {
    let args = Args::parse();
    let global = &args.global;
    if let Command::Agent(agent) = &args.command {
        // It has a log of its own, whose level can be changed while it runs.
        return exit(global, agent::run(global, agent));
    }
    let level = match args.global.verbose {
        0 => "warn",
        1 => "info",
        _ => "debug",
    };
    let filter =
        tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| level.into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let result = match &args.command {
        Command::Agent(agent) => agent::run(global, agent),
        Command::Load => load::load(global),
        Command::Unload { force } => load::unload(global, *force),
        Command::Preflight(args) => preflight::run(global, args),
        Command::Netns(command) => netns::run(global, command),
        Command::Events(args) => events::run(global, args),
        Command::Status(args) => status::run(global, args),
        Command::Install(args) => install::install(global, args),
        Command::Uninstall(args) => install::uninstall(global, args),
    };
    exit(global, result)
}

fn exit(global: &Global, result: anyhow::Result<ExitCode>) -> ExitCode {
    match result {
        Ok(code) => code,
        Err(error) => {
            output::error(global.output, &error);
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests;
