//! `culvert install` and `culvert uninstall`: the plugin's place on this host, by hand.

use std::{
    collections::BTreeSet,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use culvert::{
    install::{Cause, Installer, Mode, Options, Plan, beside_us, entry},
    kernel::{Netns, Node, inspect, node, pod},
};
use culvert_cni::config::Entry as Keys;
use serde_json::json;

use super::{Global, output::print};

/// Where the host keeps plugins and their configuration.
#[derive(Debug, clap::Args)]
pub(crate) struct Place {
    /// Directory in which the container runtime looks for CNI plugins.
    #[arg(
        long,
        env = "CULVERT_CNI_BIN_DIR",
        default_value = "/opt/cni/bin",
        value_name = "DIR"
    )]
    cni_bin_dir: PathBuf,
    /// Directory in which it looks for CNI configurations [default: $MOUNTED_CNI_NET_DIR or /etc/cni/net.d].
    #[arg(long, env = "CULVERT_CNI_CONF_DIR", value_name = "DIR")]
    cni_conf_dir: Option<PathBuf>,
}

/// Put the CNI plugin in its place: copy the binary, then add its entry to the configuration that pods start with.
///
/// That is the first valid of *.conf, *.conflist and *.json by name, as for container runtimes. Beside Cilium, which writes
/// its file anew at every start, the entry goes into a list of our own, with a copy of Cilium's plugins, that sorts before
/// it. Running it again changes only what has changed since. An agent on this node does all this itself and keeps it so.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  culvert install --dry-run                 show what would change, as a diff
  culvert install --chained                 into the cluster CNI's own file, beside Cilium too
  culvert install --own-list                into a list of our own, whatever the CNI
  culvert install --standalone              a configuration of its own, for Multus to call
  culvert uninstall                         take all of it away")]
pub(crate) struct Args {
    #[command(flatten)]
    place: Place,
    /// The plugin to copy [default: culvert-cni beside this program].
    #[arg(long, env = "CULVERT_PLUGIN_BINARY", value_name = "FILE")]
    plugin_binary: Option<PathBuf>,
    /// Add the entry to the active configuration, whoever writes it [default, except beside Cilium].
    #[arg(long, conflicts_with_all = ["own_list", "standalone"])]
    chained: bool,
    /// Write a list of our own that sorts before the active configuration [default beside Cilium; $ISTIO_OWNED_CNI_CONFIG].
    #[arg(long, conflicts_with = "standalone")]
    own_list: bool,
    /// Write a configuration of our plugin alone, for those who call it themselves [$CHAINED_CNI_PLUGIN=false].
    #[arg(long)]
    standalone: bool,
    /// Name of the active configuration, instead of looking for it [$CNI_CONF_NAME].
    #[arg(long, value_name = "NAME")]
    conf_name: Option<String>,
    /// Name of our own list; it has to sort before the active one [default: 00-culvert.conflist;
    /// $ISTIO_OWNED_CNI_CONFIG_FILENAME].
    #[arg(long, value_name = "NAME")]
    own_name: Option<String>,
    /// Files of ours may be read by their group: mode 0640 instead of 0600 [$CNI_CONF_GROUP_READ].
    #[arg(long)]
    group_read: bool,
    /// Namespaces whose pods start even while the agent is away [default: kube-system; $EXCLUDE_NAMESPACES].
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    exclude_namespaces: Option<Vec<String>>,
    /// The agent's socket.
    #[arg(long, env = "CULVERT_AGENT_SOCKET", value_name = "FILE")]
    socket: Option<PathBuf>,
    /// Print what would change, and change nothing.
    #[arg(long)]
    dry_run: bool,
}

/// Take the plugin away: our entry out of every configuration, files as they were, then the binary.
///
/// Pods that run stay captured, and their mTLS goes on: their programs are in the kernel and ztunnel serves them. Only
/// --unenrol-pods lets them go: from then on their new connections are plaintext.
#[derive(Debug, clap::Args)]
pub(crate) struct UninstallArgs {
    #[command(flatten)]
    place: Place,
    /// Let all enrolled pods go too, and unload the node programs.
    #[arg(long)]
    unenrol_pods: bool,
    /// With --unenrol-pods: wait this long for connections that still go through ztunnel.
    #[arg(long, default_value_t = 5, value_name = "SECONDS")]
    wait: u64,
    /// Even while an agent runs on this node, which puts everything back at once.
    #[arg(long)]
    force: bool,
    /// The agent's socket: how it is noticed.
    #[arg(long, env = "CULVERT_AGENT_SOCKET", default_value = culvert_cni::api::SOCKET, value_name = "FILE")]
    socket: PathBuf,
    /// Where the host's root is mounted: it goes before all these paths and --bpffs. /host in a pod of `kubectl debug node`.
    #[arg(long, default_value = "/", value_name = "DIR")]
    host_root: PathBuf,
    /// Print what would change, and change nothing.
    #[arg(long)]
    dry_run: bool,
}

impl UninstallArgs {
    /// A path of the host's as it is found from here.
    fn on_host(&self, path: &Path) -> PathBuf {
        self.host_root.join(path.strip_prefix("/").unwrap_or(path))
    }

    fn options(&self) -> Options {
        let options = self.place.options();
        Options {
            bin_dir: self.on_host(&options.bin_dir),
            conf_dir: self.on_host(&options.conf_dir),
            ..options
        }
    }
}

/// A variable of istio-cni's that means the same here; empty counts as unset.
fn istio(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|v| !v.is_empty())
}

fn istio_switch(name: &str) -> anyhow::Result<Option<bool>> {
    let Some(value) = istio(name) else {
        return Ok(None);
    };
    // As Go's strconv.ParseBool.
    match value.as_str() {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(Some(true)),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(Some(false)),
        _ => anyhow::bail!("{name} is `{value}`: set it to true or false"),
    }
}

impl Place {
    fn conf_dir(&self) -> PathBuf {
        let named = || istio("MOUNTED_CNI_NET_DIR").map(PathBuf::from);
        self.cni_conf_dir
            .clone()
            .or_else(named)
            .unwrap_or_else(|| "/etc/cni/net.d".into())
    }

    fn options(&self) -> Options {
        Options {
            bin_dir: self.cni_bin_dir.clone(),
            conf_dir: self.conf_dir(),
            ..Options::default()
        }
    }
}

impl Args {
    fn options(&self) -> anyhow::Result<Options> {
        let mode = if self.standalone {
            Mode::Standalone
        } else if self.own_list {
            Mode::OwnList
        } else if self.chained {
            Mode::Chained
        } else if istio_switch("CHAINED_CNI_PLUGIN")? == Some(false) {
            Mode::Standalone
        } else {
            match istio_switch("ISTIO_OWNED_CNI_CONFIG")? {
                Some(true) => Mode::OwnList,
                Some(false) => Mode::Chained,
                None => Mode::Auto,
            }
        };
        let mut keys = Keys {
            excluded_namespaces: BTreeSet::from(["kube-system".to_owned()]),
            ..Keys::default()
        };
        if let Some(names) = &self.exclude_namespaces {
            keys.excluded_namespaces = names.iter().cloned().collect();
        } else if let Some(names) = istio("EXCLUDE_NAMESPACES") {
            keys.excluded_namespaces = names
                .split(',')
                .map(|n| n.trim().to_owned())
                .filter(|n| !n.is_empty())
                .collect();
        }
        if let Some(socket) = &self.socket {
            keys.socket.clone_from(socket);
        }
        Ok(Options {
            plugin: self.plugin_binary.clone().unwrap_or_else(beside_us),
            mode,
            conf_name: self.conf_name.clone().or_else(|| istio("CNI_CONF_NAME")),
            own_name: self
                .own_name
                .clone()
                .or_else(|| istio("ISTIO_OWNED_CNI_CONFIG_FILENAME")),
            group_read: self.group_read || istio_switch("CNI_CONF_GROUP_READ")? == Some(true),
            entry: entry(&keys),
            ..self.place.options()
        })
    }
}

pub(crate) fn install(global: &Global, args: &Args) -> anyhow::Result<ExitCode> {
    let installer = Installer::new(args.options()?);
    let end = Instant::now() + Duration::from_secs(5);
    let plan = loop {
        let plan = installer.plan()?;
        if args.dry_run {
            break plan;
        }
        match installer.apply(&plan) {
            // Somebody wrote the file since it was read: the change has to be worked out anew.
            Err(e) if matches!(e.cause, Cause::Changed) && Instant::now() < end => {}
            other => {
                other?;
                break plan;
            }
        }
    };
    show(global, &plan, args.dry_run)?;
    if args.dry_run {
        return Ok(ExitCode::SUCCESS);
    }
    match &plan.waiting {
        Some(why) => anyhow::bail!(
            "not installed: {why}; run it again once there is one, or run the agent, which waits for it"
        ),
        None => Ok(ExitCode::SUCCESS),
    }
}

fn show(global: &Global, plan: &Plan, dry_run: bool) -> anyhow::Result<()> {
    print(
        global.output,
        &json!({ "dry_run": dry_run, "plan": plan }),
        |_| {
            let mut text: String = plan.operations.iter().map(|o| o.describe()).collect();
            for note in &plan.notes {
                text.push_str(&format!("note: {note}\n"));
            }
            if let Some(why) = &plan.waiting {
                text.push_str(&format!("waiting: {why}\n"));
            }
            text.push_str(match (plan.operations.is_empty(), dry_run) {
                (true, _) if plan.waiting.is_none() => "nothing to change\n",
                (true, _) => "",
                (false, true) => "dry run: nothing was changed\n",
                (false, false) => "done\n",
            });
            text
        },
    )
}

pub(crate) fn uninstall(global: &Global, args: &UninstallArgs) -> anyhow::Result<ExitCode> {
    let installer = Installer::new(args.options());
    let socket = args.on_host(&args.socket);
    if args.dry_run {
        show(global, &installer.plan_uninstall()?, true)?;
        return Ok(ExitCode::SUCCESS);
    }
    anyhow::ensure!(
        args.force || UnixStream::connect(&socket).is_err(),
        "an agent runs on this node (it answers at {}) and would put everything back at once: delete its DaemonSet, or keep it \
         off this node by its node selector, and the agent takes the plugin away itself; or stop it first; --force does not \
         wait for that",
        socket.display()
    );
    let mut failed: Vec<anyhow::Error> = Vec::new();
    match installer.uninstall() {
        Ok(plan) => show(global, &plan, false)?,
        Err(errors) => failed.extend(errors.into_iter().map(Into::into)),
    }
    // New pods have to stop coming first.
    if args.unenrol_pods && failed.is_empty() {
        failed.extend(unenrol(
            &args.on_host(&global.bpffs),
            Duration::from_secs(args.wait),
        )?);
    }
    let code = if failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    };
    for error in failed {
        super::output::error(global.output, &error);
    }
    Ok(code)
}

/// A namespace in which no process is seen for this long is not one of a pod that is just being made.
const APPEARING: Duration = Duration::from_secs(2);

/// Lets every pod go and unloads; what could not be done.
fn unenrol(bpffs: &Path, wait: Duration) -> anyhow::Result<Vec<anyhow::Error>> {
    let Some(node) = Node::open(bpffs)? else {
        return Ok(Vec::new());
    };
    let started = Instant::now();
    let mut failed = Vec::new();
    let mut detached = BTreeSet::new();
    // Old connections keep a pod's rules until they end; collecting also takes what namespaces left that are gone.
    loop {
        for pod in inspect::list(&node)? {
            match &pod.path {
                Some(path) => {
                    if detached.insert(pod.cookie)
                        && let Err(error) =
                            Netns::open(path).and_then(|netns| pod::detach(&node, &netns))
                    {
                        failed.push(error.into());
                    }
                }
                // A pod that ended while no agent could tell ztunnel, whose sockets are all that keeps its namespace.
                None if started.elapsed() >= wait.min(APPEARING) => {
                    pod::forget(&node, pod.cookie)?;
                }
                None => {}
            }
        }
        pod::collect(&node)?;
        if inspect::list(&node)?.is_empty() || started.elapsed() >= wait {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    let left = inspect::list(&node)?.len();
    if left > 0 {
        failed.push(anyhow::anyhow!(
            "{left} pods still have connections through ztunnel, which keep their rules and our programs; new connections go \
             direct. Run it again once those have ended, or with a longer --wait"
        ));
        return Ok(failed);
    }
    node::unload(bpffs, false)?;
    Ok(failed)
}
