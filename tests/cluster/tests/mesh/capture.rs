//! What passes the wires of a node: every interface in its network namespace, the node's ends of pods' cables among them.
//! A capture that may have missed a packet gives no answer.

use std::io::{BufRead as _, BufReader, Read as _};
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Command, Stdio};

use culvert_cluster::{Cluster, Node};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

pub(crate) struct Capture {
    what: String,
    file: PathBuf,
    tcpdump: Child,
    said: BufReader<ChildStderr>,
}

impl Capture {
    /// Starts one on every node. Every packet after the return is recorded.
    pub(crate) fn start(cluster: &Cluster, name: &str) -> Vec<Self> {
        let nodes = cluster.nodes();
        nodes.iter().map(|node| Self::on(node, name)).collect()
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "a program of the machine looks into the node from outside"
    )]
    fn on(node: &Node, name: &str) -> Self {
        let file = node.dir().join(format!("{name}.pcap"));
        let mut tcpdump = Command::new("nsenter")
            .arg(format!("--net=/run/netns/{}", node.netns()))
            .args(["tcpdump", "-Z", "root", "-i", "any", "-n", "-U"])
            .args(["-B", "65536", "-s", "0", "-w"])
            .arg(&file)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(tcpdump.stderr.take().unwrap());
        let mut line = String::new();
        while !line.contains("listening on") {
            line.clear();
            assert!(said.read_line(&mut line).unwrap() > 0, "tcpdump has ended");
        }
        Self {
            what: node.name(),
            file,
            tcpdump,
            said,
        }
    }

    /// Ends it and returns all bytes that were seen.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        let pid = Pid::from_raw(self.tcpdump.id().try_into().unwrap());
        kill(pid, Signal::SIGINT).unwrap();
        let mut summary = String::new();
        self.said.read_to_string(&mut summary).unwrap();
        self.tcpdump.wait().unwrap();
        assert!(
            summary.contains("\n0 packets dropped by kernel"),
            "{}: {summary}",
            self.what
        );
        std::fs::read(&self.file).unwrap()
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        // Ended already, unless a test has failed.
        let _ended = self.tcpdump.kill();
        let _reaped = self.tcpdump.wait();
    }
}

/// On how many nodes these bytes were seen, and ends the captures.
pub(crate) fn seen_on(captures: Vec<Capture>, needles: &[&str]) -> Vec<usize> {
    let tapes: Vec<_> = captures.into_iter().map(Capture::finish).collect();
    let seen = |needle: &str, tape: &[u8]| {
        tape.windows(needle.len())
            .any(|window| window == needle.as_bytes())
    };
    let count = |needle: &&str| tapes.iter().filter(|tape| seen(needle, tape)).count();
    needles.iter().map(count).collect()
}
