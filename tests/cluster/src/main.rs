//! `culvert-cluster`: the verbs behind `cargo xtask cluster`, which sees to packages and to this binary itself. This file
//! parses the command line; the work is the library's.

use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use culvert_cluster::{Cluster, Cni, Options, Part, Parts};

/// A real Kubernetes on this machine, for tests and for a look.
#[derive(Parser)]
#[command(name = "cargo xtask cluster", bin_name = "cargo xtask cluster")]
struct Args {
    /// Which cluster; several may be up side by side
    #[arg(long, global = true, default_value = "dev")]
    name: String,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(clap::Subcommand)]
enum Verb {
    /// Build what a cluster is made of, once (minutes)
    Build {
        /// Only etcd and the API server
        #[arg(long)]
        control_plane: bool,
        /// Cilium too, which takes some minutes more
        #[arg(long, conflicts_with = "control_plane")]
        cilium: bool,
        /// The newest container runtime and plugins too
        #[arg(long, conflicts_with = "control_plane")]
        newest: bool,
    },
    /// Start a cluster and wait until its nodes are ready
    Up {
        /// How many nodes
        #[arg(long, default_value_t = 2)]
        nodes: u8,
        /// Which network
        #[arg(long, value_enum, default_value_t = Cni::Bridge)]
        cni: Cni,
    },
    /// End a cluster and remove all traces of it, also of one that was killed
    Down,
    /// Say what runs and what does not
    Status {
        /// As JSON
        #[arg(short, long, value_parser = ["json"])]
        output: Option<String>,
    },
    /// A shell in the namespaces of a node, or a command there
    Shell {
        /// Which node
        node: String,
        /// What to run instead of a shell
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// kubectl as the cluster's administrator
    Kubectl {
        /// Handed to kubectl as they are
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
}

fn main() -> ExitCode {
    let Args { name, verb } = Args::parse();
    let result = match verb {
        Verb::Build {
            control_plane: true,
            ..
        } => Parts::find().and_then(|parts| parts.build(&Part::CONTROL_PLANE)),
        Verb::Build { cilium, newest, .. } => build(cilium, newest),
        Verb::Up { nodes, cni } => up(&name, nodes, cni),
        Verb::Down => Cluster::remove(&name),
        Verb::Status { output } => status(&name, output.is_some()),
        Verb::Shell { node, command } => shell(&name, &node, command),
        Verb::Kubectl { arguments } => kubectl(&name, &arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn build(cilium: bool, newest: bool) -> Result<()> {
    let parts = Parts::find()?;
    parts.build(&Part::ALL)?;
    if cilium {
        parts.build(&Part::CILIUM)?;
    }
    if newest {
        parts.build(&Part::NEWEST)?;
    }
    Ok(())
}

fn up(name: &str, nodes: u8, cni: Cni) -> Result<()> {
    build(cni == Cni::Cilium, cni == Cni::Newest)?;
    if let Ok(cluster) = Cluster::attach(name) {
        let (there, wanted) = ((cluster.nodes().len(), cluster.cni()), (nodes.into(), cni));
        ensure!(
            there == wanted,
            "cluster {name} is up with {} nodes and CNI {:?}: take it down first, or start another with --name",
            there.0,
            there.1
        );
        eprintln!("cluster {name} is up already");
        say_kubeconfig(&cluster);
        return Ok(());
    }
    let started = Instant::now();
    let cluster = Cluster::up(&Options {
        name: name.to_owned(),
        nodes,
        cni,
        on_its_own: true,
    })?;
    eprintln!("up in {:.1} s", started.elapsed().as_secs_f64());
    say_kubeconfig(&cluster);
    Ok(())
}

fn say_kubeconfig(cluster: &Cluster) {
    println!("export KUBECONFIG={}", cluster.admin_kubeconfig().display());
}

fn status(name: &str, json: bool) -> Result<()> {
    let cluster = Cluster::attach(name)?;
    let status = cluster.status();
    if json {
        println!("{status:#}");
        return Ok(());
    }
    for key in ["name", "cni", "api", "kubeconfig", "directory"] {
        println!("{key:<11} {}", status[key].as_str().unwrap_or_default());
    }
    for (server, state) in status["servers"].as_object().into_iter().flatten() {
        println!("{server:<24} {}", state.as_str().unwrap_or_default());
    }
    print!("{}", cluster.kubectl(&["get", "nodes", "-o", "wide"])?);
    Ok(())
}

fn shell(name: &str, node: &str, mut command: Vec<String>) -> Result<()> {
    let cluster = Cluster::attach(name)?;
    if command.is_empty() {
        command = vec!["bash".to_owned(), "--norc".to_owned()];
    }
    let node = cluster.node(node)?;
    let mut command = cluster.command_on(&node, &command)?;
    command
        .env("PS1", format!("{} \\w # ", node.name()))
        .env("KUBECONFIG", cluster.admin_kubeconfig());
    become_it(command)
}

fn kubectl(name: &str, arguments: &[String]) -> Result<()> {
    become_it(Cluster::attach(name)?.admin().command(arguments))
}

/// So that signals and the terminal are the program's.
fn become_it(mut command: Command) -> Result<()> {
    let error = command.exec();
    Err(error).with_context(|| format!("starting {command:?}"))
}
