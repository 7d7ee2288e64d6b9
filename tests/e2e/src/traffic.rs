//! Talking once and seeing which way it went. Decides nothing about what is right.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use culvert_lab::{Connect, Family, Ns, Server, connect, roundtrip};

use crate::{LONG, Mesh};

/// What a conversation with a pod's own server, or out of the pod, went through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Via {
    /// No listener of ztunnel in that pod.
    Nothing,
    /// ztunnel's 15001.
    Outbound,
    /// ztunnel's 15006.
    Inbound,
}

impl Mesh {
    /// Connects from `from` to an echo server, talks, and says which of ztunnel's listeners in `pod` it went through and
    /// whom the server saw.
    pub fn via(&self, pod: &Ns, from: &Ns, server: &Server) -> Result<(Via, IpAddr)> {
        let before = self.ztunnel.pod_stats(pod.name())?;
        let seen = server.count();
        let talk = || -> Result<()> {
            let stream = Connect::to(server.addr()).timeout(LONG).run(from)?;
            ensure!(
                roundtrip(&stream, b"which way")? == b"which way",
                "another answer"
            );
            Ok(())
        };
        talk().with_context(|| format!("{} to {}", from.name(), server.addr()))?;
        let after = self.ztunnel.pod_stats(pod.name())?;
        // ztunnel counts before it carries anything on, so after an answer the numbers are final.
        let grown = |name: &str| -> Result<u64> {
            let of = |stats: &serde_json::Value| stats[name].as_u64();
            let both = of(&after).zip(of(&before));
            let (after, before) = both.with_context(|| format!("no statistic {name}"))?;
            Ok(after - before)
        };
        let via = match (grown("outbound_accepts")?, grown("inbound_accepts")?) {
            (0, 0) => Via::Nothing,
            (1, 0) => Via::Outbound,
            (0, 1) => Via::Inbound,
            other => anyhow::bail!("one conversation and ztunnel accepted (out, in) {other:?}"),
        };
        let peers = server.peers();
        ensure!(
            peers.len() == seen + 1,
            "the server saw {} connections, not one",
            peers.len() - seen
        );
        let peer = peers.last().context("nobody came")?.ip();
        Ok((via, peer))
    }
}

/// Connects and talks once to an echo server.
pub fn talk(from: &Ns, to: SocketAddr) -> Result<()> {
    let stream =
        connect(from, to, LONG).with_context(|| format!("{} connecting to {to}", from.name()))?;
    roundtrip(&stream, b"a word").with_context(|| format!("{} talking to {to}", from.name()))?;
    Ok(())
}

/// Talks to an echo server, which must see this client.
pub fn talk_as(client: &Ns, server: &Server, seen_as: IpAddr) -> Result<()> {
    let before = server.count();
    let stream = connect(client, server.addr(), LONG)?;
    ensure!(roundtrip(&stream, b"hello")? == b"hello");
    let peers = server.peers();
    ensure!(peers.len() == before + 1, "came as {peers:?}");
    let last = peers.last().context("nobody came")?.ip().to_canonical();
    ensure!(last == seen_as, "seen as {last} instead of {seen_as}");
    Ok(())
}

/// Checks that the pod reaches itself, by loopback and by its own address, in both families.
pub fn local_delivery_works(pod: &Ns) -> Result<()> {
    for family in Family::BOTH {
        let loopback = SocketAddr::new(family.loopback(), 0);
        for addr in [loopback, pod.at(family, 0)?] {
            let server = Server::echo(pod, addr)?;
            talk(pod, server.addr()).context("local delivery")?;
        }
    }
    Ok(())
}

/// An echo server of each family on one port of a namespace.
pub fn servers(ns: &Ns, port: u16) -> Result<Vec<(Family, Server)>> {
    Family::BOTH
        .into_iter()
        .map(|family| Ok((family, Server::echo(ns, ns.at(family, port)?)?)))
        .collect()
}
