//! A node: a network, mount and PID namespace with files of its own, in which programs are started. It knows namespaces,
//! not Kubernetes; which programs run there is decided in [`services`](crate::services).

use std::ffi::OsStr;
use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::plan::Plan;
use crate::server::{Lifetime, Server};
use crate::{cgroups, tool};

const START: Duration = Duration::from_secs(60);

/// What the first process of a node does.
const INIT: &str = include_str!("node.sh");

/// Where a node is, and who it is.
#[derive(Debug, Clone)]
pub struct Node {
    pub(crate) plan: Plan,
    pub(crate) number: u8,
    pub(crate) nodes: u8,
    pub(crate) dir: PathBuf,
}

impl Node {
    /// What Kubernetes calls it.
    pub fn name(&self) -> String {
        Plan::node_name(self.number)
    }

    /// Its addresses.
    pub fn addresses(&self) -> (Ipv4Addr, Ipv6Addr) {
        self.plan.node(self.number)
    }

    /// The ranges of its pods, IPv4 and IPv6.
    pub fn pod_ranges(&self) -> [String; 2] {
        self.plan.pods(self.number)
    }

    /// The name that `ip netns` knows its network namespace by.
    pub fn netns(&self) -> String {
        self.plan.node_id(self.number)
    }

    /// Its own files: `opt`, `etc` (what differs from the machine's), `var/lib`, `var/log`; logs of its servers beside.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub(crate) fn cgroup(&self) -> String {
        self.plan.node_id(self.number)
    }

    /// Makes its network namespace, cable and cgroups. Its bridge must be there.
    pub(crate) fn wire(&self) -> Result<()> {
        let netns = self.netns();
        tool::ip(&["netns", "add", &netns])?;
        tool::ip_batch(None, &self.plan.cable_commands(self.number))?;
        tool::ip_batch(
            Some(&netns),
            &self.plan.node_commands(self.number, self.nodes),
        )?;
        let sysctls = "echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding";
        tool::ip(&["netns", "exec", &netns, "sh", "-ec", sysctls])?;
        cgroups::create(&self.cgroup())
    }

    /// Takes away what [`wire`](Self::wire) made; its processes must have been killed.
    pub(crate) fn unwire(&self) -> Result<()> {
        let netns = self.netns();
        if Path::new("/run/netns").join(&netns).exists() {
            tool::ip(&["netns", "delete", &netns])?;
        }
        // The cable goes with the namespace, but only a moment later.
        let port = self.plan.port(self.number);
        if Path::new("/sys/class/net").join(&port).exists() {
            let _gone_meanwhile = tool::ip(&["link", "delete", &port]);
        }
        cgroups::remove(&self.cgroup())
    }

    /// Starts its first process, with mounts of its own.
    pub(crate) fn boot(&self, lifetime: Lifetime) -> Result<Server> {
        fs::create_dir_all(&self.dir).with_context(|| format!("making {}", self.dir.display()))?;
        let log = self.dir.join("init.log");
        let _first_boot = fs::remove_file(&log);
        let mut command = tool::command("nsenter");
        command
            .arg(format!("--net=/run/netns/{}", self.netns()))
            .args(["unshare", "--mount", "--pid", "--fork", "--kill-child"])
            .args(["--mount-proc", "--propagation", "private"])
            .args(["/bin/sh", "-c", INIT, "node"])
            .arg(&self.dir);
        let outer = Server::start(&self.dir, "init", command, lifetime)?;
        let mut ready = false;
        outer.wait_until("its mounts are made", START, || {
            ready = fs::read_to_string(&log).is_ok_and(|text| text.contains("node is ready"));
            ready
        })?;
        outer.behind()
    }

    /// A command in the node's namespaces; `init` is its first process.
    pub(crate) fn command(init: &Server, args: &[impl AsRef<OsStr>]) -> Command {
        let mut command = tool::command("nsenter");
        command
            .arg(format!("--target={}", init.pid()))
            .args(["--mount", "--net", "--pid", "--"])
            .args(args);
        command
    }
}
