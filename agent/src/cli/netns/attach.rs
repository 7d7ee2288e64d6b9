//! `culvert netns attach`.

use std::{
    net::IpAddr,
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use culvert::kernel::{
    Netns, Node, kubelet, listeners,
    pod::{self, Attached, Dns, Policy},
};
use culvert_ebpf::abi::{PROBES_KUBELET, PROBES_NODE, PROBES_NONE};
use ipnet::IpNet;
use serde_json::json;

use super::{report_failures, table};
use crate::cli::{Global, output::print};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Namespace file: /run/netns/NAME, /proc/PID/ns/net. Repeat for several.
    #[arg(long, required = true, value_name = "PATH")]
    netns: Vec<PathBuf>,
    /// Leave connections to this network alone.
    #[arg(long, value_name = "CIDR", value_parser = cidr)]
    exclude_outbound_cidr: Vec<IpNet>,
    /// Leave connections to this port alone.
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    exclude_outbound_port: Vec<u16>,
    /// Leave connections to this port of the pod alone.
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    exclude_inbound_port: Vec<u16>,
    /// Leave all inbound plaintext alone.
    #[arg(long)]
    bypass_inbound: bool,
    /// Capture what is sent from behind this interface too (a VM's tap or bridge).
    #[arg(long, value_name = "NAME")]
    virtual_interface: Vec<String>,
    /// How long new connections wait for a ztunnel that is away before they are refused: seconds or "forever".
    #[arg(long, default_value = "10", value_name = "SECONDS", value_parser = hold)]
    hold: Hold,
    /// Process id of ztunnel: only its sockets may pass for ztunnel's. Without, the mark alone decides, which
    /// a process with CAP_NET_RAW can forge.
    #[arg(long, value_name = "PID")]
    ztunnel: Vec<u32>,
    /// Let ztunnel answer lookups (port 53, UDP and TCP).
    #[arg(long)]
    dns: bool,
    /// With --dns: only lookups that ask this resolver. Repeat for several.
    #[arg(long, value_name = "ADDRESS", requires = "dns")]
    dns_resolver: Vec<IpAddr>,
    /// With --dns: which lookups.
    #[arg(long, value_enum, default_value_t = DnsScope::All, conflicts_with = "dns_resolver", value_name = "SCOPE")]
    dns_scope: DnsScope,
    /// Which processes may probe enrolled pods without passing through ztunnel (for the whole node).
    #[arg(long, value_enum, value_name = "SOURCE")]
    probe_source: Option<ProbeSource>,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum ProbeSource {
    /// The kubelet alone, as long as `culvert netns watch` (or the agent) runs and follows it.
    Kubelet,
    /// Every process in the node's network namespace.
    Node,
    /// Nobody.
    None,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum DnsScope {
    /// All to port 53.
    All,
    /// Those to the resolvers in the pod's own resolv.conf.
    ResolvConf,
}

#[derive(Clone, Copy, Debug)]
struct Hold(Option<Duration>);

fn hold(text: &str) -> Result<Hold, String> {
    if text == "forever" {
        return Ok(Hold(None));
    }
    let seconds: f64 = text
        .parse()
        .map_err(|_| format!("`{text}` is neither seconds nor \"forever\""))?;
    Duration::try_from_secs_f64(seconds)
        .map(|d| Hold(Some(d)))
        .map_err(|e| e.to_string())
}

fn cidr(text: &str) -> Result<IpNet, String> {
    let net = text
        .parse::<IpNet>()
        .or_else(|_| text.parse::<std::net::IpAddr>().map(IpNet::from));
    net.map_err(|_| format!("`{text}` is not a network: write 10.0.0.0/8 or fd00::/8"))
}

/// Captures namespaces, or changes how those are treated that are captured.
pub(super) fn run(global: &Global, args: &Args) -> anyhow::Result<ExitCode> {
    // Everything that can be wrong with the arguments comes before the first change.
    let namespaces = args
        .netns
        .iter()
        .map(|p| Netns::open(p))
        .collect::<Result<Vec<_>, _>>()?;
    let mut options = global.load_options();
    options.probe_source = args.probe_source.map(|s| match s {
        ProbeSource::Kubelet => PROBES_KUBELET,
        ProbeSource::Node => PROBES_NODE,
        ProbeSource::None => PROBES_NONE,
    });
    let home = Netns::current()?.cookie();
    for netns in &namespaces {
        anyhow::ensure!(
            netns.cookie() != home,
            "cannot enrol {}: this is the node's own network namespace; give the namespace of a pod, hostNetwork pods \
             cannot be captured",
            netns.path().display()
        );
    }
    for pid in &args.ztunnel {
        listeners::check_process(*pid)?;
    }
    if matches!(args.probe_source, Some(ProbeSource::Kubelet)) {
        kubelet::check()?;
    }
    let policy = Policy {
        exclude_outbound_cidrs: args.exclude_outbound_cidr.clone(),
        exclude_outbound_ports: args.exclude_outbound_port.clone(),
        exclude_inbound_ports: args.exclude_inbound_port.clone(),
        bypass_inbound: args.bypass_inbound,
        virtual_interfaces: args.virtual_interface.clone(),
        hold: args.hold.0,
        dns: match (args.dns, args.dns_scope) {
            (false, _) => Dns::Off,
            (true, _) if !args.dns_resolver.is_empty() => Dns::Resolvers(args.dns_resolver.clone()),
            (true, DnsScope::All) => Dns::All,
            (true, DnsScope::ResolvConf) => Dns::ResolvConf,
        },
        named_ztunnel: !args.ztunnel.is_empty(),
        ipv6: true,
    };
    policy.check()?;
    let (node, _) = Node::load(&options)?;
    pod::collect(&node)?;
    for pid in &args.ztunnel {
        listeners::name_process(&node, *pid)?;
    }
    let mut done = Vec::new();
    let mut failed = Vec::new();
    for netns in &namespaces {
        let started = Instant::now();
        let attached =
            pod::attach(&node, netns, &policy).map(|outcome| (outcome, started.elapsed()));
        let fetched = |(outcome, took)| {
            let counts = args
                .ztunnel
                .iter()
                .map(|pid| listeners::fetch(&node, netns, *pid));
            Ok((
                outcome,
                took,
                counts.sum::<culvert::kernel::Result<usize>>()?,
            ))
        };
        match attached.and_then(fetched) {
            Ok((outcome, took, fetched)) => done.push(json!({
                "netns": netns.path(),
                "cookie": netns.cookie(),
                "result": match outcome { Attached::Enrolled => "enrolled", Attached::Updated => "updated" },
                "listeners_fetched": fetched,
                "took_us": u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
            })),
            // One pod that fails does not hold up the rest.
            Err(error) => failed.push(error),
        }
    }
    print(global.output, &json!({ "pods": done }), |_| {
        table(&done, &["netns", "cookie", "result", "took_us"])
    })?;
    if args.ztunnel.is_empty() {
        tracing::info!("ztunnel is told by its mark alone; name its process with --ztunnel PID");
    }
    report_failures(global, failed)
}
