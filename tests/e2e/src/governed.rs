//! A node under an agent: pods come and go by manifests, a ztunnel is connected to the agent's own socket.
//!
//! Where [`Mesh`](crate::Mesh) enrols pods by hand, here nobody does but the agent.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
};

use anyhow::{Context as _, Result};
use culvert_lab::{Agent, AgentOptions, Lab, Ns, Ztunnel, ZtunnelOptions};
use serde_json::json;

use crate::eventually;

/// The namespace of all pods here.
pub const NAMESPACE: &str = "default";

/// A lab, its agent and its ztunnel.
pub struct Governed {
    /// The ztunnel; none while it is away.
    pub ztunnel: Option<Ztunnel>,
    /// The agent; none while it is away.
    pub agent: Option<Agent>,
    /// How the agent is started, and the manifests it reads.
    pub options: AgentOptions,
    /// What ztunnel is told of peers.
    pub peers: ZtunnelOptions,
    /// Everything else.
    pub lab: Lab,
}

impl Governed {
    /// A lab with an agent, a ztunnel and no pod. The namespace is not in the mesh yet.
    pub fn new(name: &str) -> Result<Self> {
        Self::with(name, |options| options)
    }

    /// The same with an agent that is started in another way.
    pub fn with(name: &str, change: impl FnOnce(AgentOptions) -> AgentOptions) -> Result<Self> {
        let mut node = Self::unserved(name, change)?;
        node.start_ztunnel()?;
        Ok(node)
    }

    /// With no ztunnel yet: `peers` says how it will be started.
    pub fn unserved(name: &str, change: impl FnOnce(AgentOptions) -> AgentOptions) -> Result<Self> {
        let lab = Lab::new(name)?;
        let options = change(AgentOptions::new(&lab));
        options.namespace(NAMESPACE, None)?;
        let agent = options.start(&lab)?;
        Ok(Self {
            ztunnel: None,
            agent: Some(agent),
            options,
            peers: ZtunnelOptions::new(),
            lab,
        })
    }

    /// With these pods, in the mesh by their namespace's label, reaching each other through HBONE.
    pub fn meshed<const N: usize>(name: &str, pods: [&str; N]) -> Result<(Self, [Ns; N])> {
        let mut node = Self::unserved(name, |options| options)?;
        let mut made = Vec::new();
        for pod in pods {
            made.push(node.pod(pod)?);
        }
        let made: [Ns; N] = made
            .try_into()
            .map_err(|_| anyhow::anyhow!("as many pods as names"))?;
        node.peers = made.iter().fold(node.peers, ZtunnelOptions::hbone);
        // It passes on in plaintext, as it should, what goes to peers it does not know yet.
        node.start_ztunnel()?;
        node.label(Some("ambient"))?;
        for pod in &made {
            node.expect_state(pod, "enrolled")?;
        }
        Ok((node, made))
    }

    /// A pod that runs, without labels or annotations.
    pub fn pod(&self, name: &str) -> Result<Ns> {
        let pod = self.lab.pod(name)?;
        self.options.pod(&pod, &json!({}), &json!({}))?;
        Ok(pod)
    }

    /// Labels the namespace of all pods.
    pub fn label(&self, mode: Option<&str>) -> Result<()> {
        self.options.namespace(NAMESPACE, mode)
    }

    /// The agent.
    pub fn agent(&self) -> Result<&Agent> {
        self.agent.as_ref().context("the agent is away")
    }

    /// The ztunnel.
    pub fn ztunnel(&self) -> Result<&Ztunnel> {
        self.ztunnel.as_ref().context("ztunnel is away")
    }

    /// Starts an agent in the place of the one that is gone.
    pub fn start_agent(&mut self) -> Result<()> {
        self.agent = Some(self.options.start(&self.lab)?);
        Ok(())
    }

    /// Starts a ztunnel in the place of the one that is gone, and waits until the agent knows it.
    pub fn start_ztunnel(&mut self) -> Result<()> {
        let ztunnel = Ztunnel::launch_at(&self.lab, &self.options.zds(), &self.peers)?;
        let pid = ztunnel.pid();
        self.ztunnel = Some(ztunnel);
        eventually("ztunnel has had its snapshot", || {
            let status = self.agent()?.status()?;
            let known = status["ztunnels"].as_array().map(Vec::as_slice);
            let mut known = known.unwrap_or_default().iter();
            Ok(known.any(|z| z["pid"] == pid && z["snapshot_sent"] == true))
        })
    }

    /// Waits until the agent says so of the pod.
    pub fn expect_state(&self, pod: &Ns, state: &str) -> Result<()> {
        let agent = self.agent()?;
        eventually(&format!("{} is {state}", pod.name()), || {
            Ok(agent.state(pod)? == state)
        })
        .with_context(|| format!("the agent says:\n{}", agent.process().stderr()))
    }

    /// `culvert netns show` of the pod.
    pub fn show(&self, pod: &Ns) -> Result<serde_json::Value> {
        let path = pod.path().display().to_string();
        self.lab
            .culvert(&["-o", "json", "netns", "show", "--netns", &path])?
            .ok()?
            .json()
    }

    /// One of the agent's metrics, by the whole name of its series.
    pub fn metric(&self, series: &str) -> Result<f64> {
        let text = self.lab.node().run(|| {
            let mut stream = TcpStream::connect(("127.0.0.1", 15014))?;
            stream
                .write_all(b"GET /metrics HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n")?;
            let mut text = String::new();
            stream.read_to_string(&mut text).map(|_| text)
        })?;
        let mut lines = text.lines().filter_map(|l| l.strip_prefix(series));
        let value = lines.find_map(|l| l.strip_prefix(' '));
        value
            .with_context(|| format!("no metric {series}"))?
            .parse()
            .context("its value")
    }

    /// One of the stand-in's numbers for a pod.
    pub fn stat(&self, pod: &Ns, name: &str) -> Result<u64> {
        self.ztunnel()?.pod_stats(pod.name())?[name]
            .as_u64()
            .with_context(|| format!("no statistic {name}"))
    }
}
