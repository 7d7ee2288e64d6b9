//! The node, its three pods and what runs on them. Says who is there; what is played on it is in the steps.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use culvert_lab::{Child, CulvertOutput, Family, Lab, Ns, Zds, Ztunnel, ZtunnelOptions};
use serde_json::Value;

use crate::access_log::AccessLog;
use crate::{interrupt, programs, report};

/// What Culvert may change in a namespace besides addresses, rules and routes.
const SYSCTLS: [&str; 3] = [
    "net/ipv4/tcp_fwmark_accept",
    "net/ipv4/fwmark_reflect",
    "net/ipv6/fwmark_reflect",
];
/// ztunnel's ports that pods' connections are steered to: outbound, inbound, DNS.
const LISTENERS: usize = 3;

/// All of it. Its fields go in this order: programs before the namespaces they are in.
#[derive(Debug)]
pub(crate) struct Stage {
    /// `None` while it is away.
    ztunnel: Option<Ztunnel>,
    options: ZtunnelOptions,
    pub(crate) zds: Zds,
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
        let zds = Zds::start(&lab)?;
        let options = ZtunnelOptions::new().hbone(&client).hbone(&web);
        let ztunnel = Ztunnel::start(&lab, &zds, &options)?;
        interrupt::check()?;
        Ok(Self {
            ztunnel: Some(ztunnel),
            options,
            zds,
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
                "ztunnel (a stand-in for it that is part of the tests)",
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

    /// Starts another ztunnel, which is told of no pod yet.
    pub(crate) fn start_ztunnel(&mut self) -> Result<u32> {
        for pod in [&self.client, &self.web] {
            self.zds.del(pod.name())?;
        }
        let ztunnel = Ztunnel::start(&self.lab, &self.zds, &self.options)?;
        let pid = ztunnel.pid();
        self.ztunnel = Some(ztunnel);
        Ok(pid)
    }

    /// Enrols a pod the way the agent does: `culvert netns attach`, which also says which process is ztunnel, and only
    /// then ztunnel itself; before, it would be refused its own mark. Returns what `culvert` printed.
    pub(crate) fn enrol(&self, pod: &Ns) -> Result<Value> {
        let pid = self.ztunnel()?.pid().to_string();
        let printed = first_pod(self.lab.attach(pod, &["--ztunnel", &pid, "-o", "json"])?)?;
        self.zds.add_pod(pod)?;
        self.wait_for_listeners(pod)?;
        Ok(printed)
    }

    /// `culvert netns detach` of a pod. Returns what it printed.
    pub(crate) fn detach(&self, pod: &Ns, args: &[&str]) -> Result<Value> {
        let path = pod.path().display().to_string();
        let mut all = vec!["-o", "json", "netns", "detach", "--netns", &path];
        all.extend(args);
        first_pod(self.lab.culvert(&all)?)
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

fn first_pod(output: CulvertOutput) -> Result<Value> {
    let printed = output.ok()?.json()?;
    printed["pods"]
        .get(0)
        .cloned()
        .with_context(|| format!("culvert names no pod: {printed}"))
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
