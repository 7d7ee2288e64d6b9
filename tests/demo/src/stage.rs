//! The node, its three pods and what runs on them. Says who is there; what is played on it is in the steps.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use culvert_lab::{Agent, AgentOptions, Child, Family, Lab, Ns, Ztunnel, ZtunnelOptions};
use serde_json::{Value, json};

use crate::access_log::AccessLog;
use crate::{interrupt, programs, report};

/// What Culvert may change in a namespace besides addresses, rules and routes.
const SYSCTLS: [&str; 3] = [
    "net/ipv4/tcp_fwmark_accept",
    "net/ipv4/fwmark_reflect",
    "net/ipv6/fwmark_reflect",
];
/// The Kubernetes namespace of all three pods.
const NAMESPACE: &str = "default";
/// A name that only ztunnel knows: `web`'s address.
pub(crate) const MESH_NAME: &str = "web.mesh";
/// ztunnel's ports that pods' connections are steered to: outbound, inbound, DNS.
const LISTENERS: usize = 3;

/// All of it. Its fields go in this order: programs before the namespaces they are in.
#[derive(Debug)]
pub(crate) struct Stage {
    /// `None` while it is away.
    ztunnel: Option<Ztunnel>,
    /// `None` before it is started and after it was stopped.
    agent: Option<Agent>,
    peers: ZtunnelOptions,
    pub(crate) options: AgentOptions,
    _servers: [Child; 2],
    pub(crate) log: AccessLog,
    pub(crate) client: Ns,
    pub(crate) web: Ns,
    pub(crate) legacy: Ns,
    pub(crate) lab: Lab,
}

/// How the namespaces look: addresses, rules, routes, sysctls.
pub(crate) type Picture = BTreeMap<String, Vec<String>>;

impl Stage {
    pub(crate) fn set() -> Result<Self> {
        let lab = Lab::new("demo")?;
        interrupt::check()?;
        let client = lab.pod("client")?;
        let web = lab.pod("web")?;
        let legacy = lab.pod("legacy")?;
        let servers = [programs::nginx(&lab, &web)?, programs::iperf3_server(&web)?];
        let peers = ZtunnelOptions::new()
            .hbone(&client)
            .hbone(&web)
            .arg("--dns-name")
            .arg(&format!("{MESH_NAME}={}", web.v4()?));
        // There is no kubelet here whose probes could be told from other connections of the node.
        let options = AgentOptions::new(&lab).arg("--probe-source=node");
        options.namespace(NAMESPACE, None)?;
        for pod in [&client, &web] {
            options.pod(pod, &json!({}), &json!({}))?;
        }
        let out = json!({"istio.io/dataplane-mode": "none"});
        options.pod(&legacy, &out, &json!({}))?;
        interrupt::check()?;
        Ok(Self {
            ztunnel: None,
            agent: None,
            peers,
            options,
            _servers: servers,
            log: AccessLog::at(programs::access_log(&lab)),
            client,
            web,
            legacy,
            lab,
        })
    }

    /// Who is who.
    pub(crate) fn bill(&self) -> Result<String> {
        let roles = [
            (
                self.lab.node(),
                "the agent; ztunnel (a stand-in for it that is part of the tests)",
            ),
            (&self.client, "curl, iperf3"),
            (&self.web, "nginx on port 80, iperf3"),
            (&self.legacy, "curl; stays outside the mesh"),
        ];
        let mut text = String::new();
        for (ns, role) in roles {
            let (v4, v6) = (ns.v4()?.to_string(), ns.v6()?.to_string());
            text.push_str(&format!("   {:<8}{v4:<12}{v6:<9}{role}\n", ns.name()));
        }
        Ok(text)
    }

    /// Every name it has in the file system.
    pub(crate) fn places(&self) -> Vec<PathBuf> {
        let lab = &self.lab;
        let mut places = vec![
            lab.bpffs().into(),
            lab.cgroup().into(),
            lab.scratch().into(),
        ];
        let all = [lab.node(), &self.client, &self.web, &self.legacy];
        places.extend(all.map(|ns| ns.path().to_path_buf()));
        places
    }

    /// The two pods that become part of the mesh.
    pub(crate) fn members(&self) -> [&Ns; 2] {
        [&self.client, &self.web]
    }

    pub(crate) fn ztunnel(&self) -> Result<&Ztunnel> {
        self.ztunnel.as_ref().context("ztunnel is away")
    }

    /// Kills ztunnel.
    pub(crate) fn kill_ztunnel(&mut self) -> Result<u32> {
        let ztunnel = self.ztunnel.take().context("ztunnel is away")?;
        ztunnel.kill()?;
        Ok(ztunnel.pid())
    }

    /// Starts another ztunnel, and waits until the agent has told it of both pods.
    pub(crate) fn start_ztunnel(&mut self) -> Result<u32> {
        let ztunnel = Ztunnel::launch_at(&self.lab, &self.options.zds(), &self.peers)?;
        let pid = ztunnel.pid();
        self.ztunnel = Some(ztunnel);
        interrupt::wait_for(report::PATIENCE, || {
            let status = self.agent()?.status()?;
            let known = status["ztunnels"].as_array().map(Vec::as_slice);
            let mut known = known.unwrap_or_default().iter();
            Ok(
                if known.any(|z| z["pid"] == pid && z["snapshot_sent"] == true) {
                    Ok(())
                } else {
                    Err(format!(
                        "the agent knows these ztunnels: {}",
                        status["ztunnels"]
                    ))
                },
            )
        })?;
        Ok(pid)
    }

    /// Starts the agent on the directory of manifests.
    pub(crate) fn start_agent(&mut self) -> Result<u32> {
        let agent = self.options.start(&self.lab)?;
        let pid = agent.pid();
        self.agent = Some(agent);
        Ok(pid)
    }

    /// Stops the agent as Kubernetes does, by SIGTERM.
    pub(crate) fn stop_agent(&mut self) -> Result<()> {
        self.agent.take().context("the agent is away")?.stop()
    }

    pub(crate) fn agent(&self) -> Result<&Agent> {
        self.agent.as_ref().context("the agent is away")
    }

    /// Labels the namespace of all pods, or takes the label away.
    pub(crate) fn label(&self, mode: Option<&str>) -> Result<()> {
        self.options.namespace(NAMESPACE, mode)
    }

    /// Waits until the agent says so of a pod; `none` is said of one that has nothing to do with the mesh.
    pub(crate) fn wait_for_state(&self, pod: &Ns, wanted: &str) -> Result<()> {
        interrupt::wait_for(report::PATIENCE, || {
            let state = self.agent()?.state(pod)?;
            Ok(if state == wanted {
                Ok(())
            } else {
                Err(format!(
                    "{} is {state} and not {wanted}; the agent says:\n{}",
                    pod.name(),
                    self.agent()?.process().stderr()
                ))
            })
        })
    }

    /// Waits until the agent has enrolled a pod, and all of ztunnel's listeners in it are known.
    pub(crate) fn wait_until_enrolled(&self, pod: &Ns) -> Result<()> {
        self.wait_for_state(pod, "enrolled")?;
        self.wait_for_listeners(pod)
    }

    /// Waits until all of ztunnel's listeners in a pod are known and `culvert` calls the pod whole.
    fn wait_for_listeners(&self, pod: &Ns) -> Result<()> {
        let path = pod.path().display().to_string();
        interrupt::wait_for(report::PATIENCE, || {
            let shown = self
                .lab
                .culvert(&["-o", "json", "netns", "show", "--netns", &path])?
                .ok()?
                .json()?;
            // One without an address is a dead ztunnel's.
            let listeners = shown["listeners"].as_array().map(Vec::as_slice);
            let lives = |listener: &&Value| listener["local"].is_string();
            let known = listeners.unwrap_or_default().iter().filter(lives).count();
            Ok(if known >= LISTENERS && shown["whole"] == true {
                Ok(())
            } else {
                Err(format!(
                    "{known} listeners in {}, problems {}",
                    pod.name(),
                    shown["problems"]
                ))
            })
        })
    }

    /// One of ztunnel's numbers for a pod.
    pub(crate) fn count(&self, pod: &Ns, name: &str) -> Result<u64> {
        self.ztunnel()?.pod_stats(pod.name())?[name]
            .as_u64()
            .with_context(|| format!("ztunnel counts no {name}"))
    }

    /// Waits until one of ztunnel's numbers has grown by as much, and fails if it has grown by more.
    pub(crate) fn counted(&self, pod: &Ns, name: &str, before: u64, more: u64) -> Result<()> {
        let now = interrupt::wait_for(report::PATIENCE, || {
            let now = self.count(pod, name)?;
            Ok(if now >= before + more {
                Ok(now)
            } else {
                Err(format!(
                    "ztunnel's {name} for {} is {now}, was {before}",
                    pod.name()
                ))
            })
        })?;
        ensure!(
            now == before + more,
            "ztunnel's {name} for {} went from {before} to {now}",
            pod.name()
        );
        Ok(())
    }

    /// How all namespaces look now.
    pub(crate) fn picture(&self) -> Result<Picture> {
        let all = [self.lab.node(), &self.client, &self.web, &self.legacy];
        all.into_iter()
            .map(|ns| Ok((ns.name().to_owned(), ns.picture(&SYSCTLS)?)))
            .collect()
    }
}

/// `before` against `now`, in words; nothing if they are the same.
pub(crate) fn differences(before: &Picture, now: &Picture) -> Vec<String> {
    let mut found = Vec::new();
    for (ns, lines) in before {
        let Some(now) = now.get(ns) else { continue };
        let missing = lines.iter().filter(|line| !now.contains(line));
        let new = now.iter().filter(|line| !lines.contains(line));
        found.extend(missing.map(|line| format!("{ns}: gone: {line}")));
        found.extend(new.map(|line| format!("{ns}: new: {line}")));
    }
    found
}

/// The families as a person says them.
pub(crate) fn both(addr: impl Fn(Family) -> Result<String>) -> Result<String> {
    Ok(format!("{} and {}", addr(Family::V4)?, addr(Family::V6)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_and_what_went_is_named() {
        let picture = |lines: &[&str]| -> Picture {
            let lines = lines.iter().map(|line| (*line).to_owned()).collect();
            [("web".to_owned(), lines)].into()
        };
        assert!(differences(&picture(&["a", "b"]), &picture(&["a", "b"])).is_empty());
        assert_eq!(
            differences(&picture(&["a", "b"]), &picture(&["b", "c"])),
            ["web: gone: a", "web: new: c"]
        );
    }
}
