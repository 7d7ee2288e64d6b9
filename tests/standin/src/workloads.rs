//! Which addresses speak HBONE, and who answers there: what ztunnel would learn from its control plane.
//!
//! Owns the table, from the command line or from a file that is read again when it changes. It must not open connections.

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, RwLock};
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use serde::Deserialize;

use crate::identity::SpiffeId;

/// How soon a changed file is noticed.
const POLL: Duration = Duration::from_millis(100);

/// One peer, as the file gives it: `{"10.0.0.2": {"identity": "spiffe://cluster.local/ns/a/sa/b", "hbone": true}}`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Peer {
    /// The SPIFFE identity its certificate must carry.
    pub identity: SpiffeId,
    /// Whether it is reached through HBONE at all.
    #[serde(default = "yes")]
    pub hbone: bool,
    /// Whether it is spoken to in the mesh alone: plaintext for it is refused, as a policy of ztunnel's would.
    #[serde(default)]
    pub strict: bool,
}

fn yes() -> bool {
    true
}

/// `ADDR=SPIFFE_ID`, from the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerArg(IpAddr, Peer);

impl FromStr for PeerArg {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let (addr, identity) = text.split_once('=').context(
            "expected ADDR=SPIFFE_ID, for instance 10.0.0.2=spiffe://cluster.local/ns/a/sa/b",
        )?;
        let addr: IpAddr = addr
            .parse()
            .with_context(|| format!("{addr} is not an IP address"))?;
        let identity = identity.parse()?;
        Ok(Self(
            addr.to_canonical(),
            Peer {
                identity,
                hbone: true,
                strict: false,
            },
        ))
    }
}

type Table = HashMap<IpAddr, Peer>;

/// The table of peers, shared by all pods.
#[derive(Clone, Debug, Default)]
pub struct Workloads {
    fixed: Table,
    read: Arc<RwLock<Table>>,
}

impl Workloads {
    /// Peers from the command line, and a file that is followed as long as the runtime lives.
    ///
    /// # Errors
    /// When the file is there but cannot be understood. A file that is not there yet is an empty table.
    pub fn new(fixed: Vec<PeerArg>, file: Option<PathBuf>) -> anyhow::Result<Self> {
        let workloads = Self {
            fixed: fixed
                .into_iter()
                .map(|PeerArg(addr, peer)| (addr, peer))
                .collect(),
            ..Self::default()
        };
        if let Some(file) = file {
            let stamp = stamp(&file);
            if stamp.is_some() {
                workloads.replace(load(&file)?);
            }
            tokio::spawn(workloads.clone().follow(file, stamp));
        }
        Ok(workloads)
    }

    /// The peer to be reached through HBONE at this address, if there is one.
    #[must_use]
    pub fn hbone_peer(&self, addr: IpAddr) -> Option<Peer> {
        self.peer(addr).filter(|peer| peer.hbone)
    }

    /// Whether plaintext for this address is to be refused.
    #[must_use]
    pub fn strict(&self, addr: IpAddr) -> bool {
        self.peer(addr).is_some_and(|peer| peer.strict)
    }

    fn peer(&self, addr: IpAddr) -> Option<Peer> {
        let read = self
            .read
            .read()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let addr = addr.to_canonical();
        read.get(&addr).or_else(|| self.fixed.get(&addr)).cloned()
    }

    fn replace(&self, table: Table) {
        *self
            .read
            .write()
            .unwrap_or_else(std::sync::PoisonError::into_inner) = table;
    }

    async fn follow(self, file: PathBuf, mut seen: Option<Stamp>) {
        loop {
            tokio::time::sleep(POLL).await;
            let now = stamp(&file);
            if now == seen {
                continue;
            }
            match load(&file) {
                Ok(table) => {
                    tracing::info!(file = %file.display(), peers = table.len(), "peers read again");
                    self.replace(table);
                }
                // Half-written, most likely: the next look finds it whole.
                Err(error) => tracing::warn!(
                    error = format!("{error:#}"),
                    "keeping the peers known so far"
                ),
            }
            seen = now;
        }
    }
}

/// Changes whenever the file does, also when it is replaced within one tick of the clock.
type Stamp = (SystemTime, u64, u64);

fn stamp(file: &Path) -> Option<Stamp> {
    use std::os::unix::fs::MetadataExt as _;
    let meta = std::fs::metadata(file).ok()?;
    Some((meta.modified().ok()?, meta.len(), meta.ino()))
}

fn load(file: &Path) -> anyhow::Result<Table> {
    let text = std::fs::read(file)
        .with_context(|| format!("cannot read peers from {}", file.display()))?;
    let table: Table = serde_json::from_slice(&text)
        .with_context(|| format!("{} is not of the form {{\"ADDR\": {{\"identity\": \"spiffe://..\", \"hbone\": true}}}}", file.display()))?;
    Ok(table
        .into_iter()
        .map(|(addr, peer)| (addr.to_canonical(), peer))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn argument() {
        let PeerArg(addr, peer) = "::ffff:10.0.0.2=spiffe://cluster.local/ns/a/sa/b"
            .parse()
            .unwrap();
        assert_eq!(addr, "10.0.0.2".parse::<IpAddr>().unwrap());
        assert_eq!(peer.identity.as_str(), "spiffe://cluster.local/ns/a/sa/b");
        for bad in ["10.0.0.2", "x=spiffe://a", "10.0.0.2=cluster.local"] {
            assert!(bad.parse::<PeerArg>().is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn file_is_followed() {
        let file = std::env::temp_dir().join(format!("standin-peers-{}.json", std::process::id()));
        std::fs::write(&file, r#"{"10.0.0.2": {"identity": "spiffe://a/x"}, "10.0.0.3": {"identity": "spiffe://b/x", "hbone": false, "strict": true}}"#).unwrap();
        let workloads = Workloads::new(Vec::new(), Some(file.clone())).unwrap();
        let two = "10.0.0.2".parse().unwrap();
        assert_eq!(
            workloads.hbone_peer(two).unwrap().identity.as_str(),
            "spiffe://a/x"
        );
        assert!(workloads.hbone_peer("10.0.0.3".parse().unwrap()).is_none());
        assert!(!workloads.strict(two));
        assert!(workloads.strict("::ffff:10.0.0.3".parse().unwrap()));

        std::fs::write(&file, "{").unwrap();
        tokio::time::sleep(POLL * 3).await;
        assert!(
            workloads.hbone_peer(two).is_some(),
            "a broken file must not empty the table"
        );

        std::fs::write(&file, "{}").unwrap();
        for _ in 0..50 {
            if workloads.hbone_peer(two).is_none() {
                std::fs::remove_file(&file).unwrap();
                return;
            }
            tokio::time::sleep(POLL).await;
        }
        panic!("the changed file was not read");
    }
}
