//! What passes a pod's wire, seen from the node: the proof that a request went in plaintext, in TLS, or not at all.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use culvert_lab::{Capture, Family, Ns, Packet};

use crate::stage::Stage;
use crate::steady::Steady;

/// HBONE's port.
const HBONE: u16 = 15008;
const PATIENCE: Duration = Duration::from_secs(10);
/// A TLS record that carries a handshake, of any version there is.
const TLS_HANDSHAKE: [u8; 2] = [22, 3];

/// A running capture of a pod's interface.
#[derive(Debug)]
pub(crate) struct Wire {
    capture: Capture,
    pod: Ns,
}

impl Wire {
    pub(crate) fn of(stage: &Stage, pod: &Ns) -> Result<Self> {
        Ok(Self {
            capture: Capture::outside(stage.lab.node(), pod)?,
            pod: pod.clone(),
        })
    }

    /// Fails unless the request was sent for all to read, from the pod straight to the server.
    pub(crate) fn plaintext(&self, to: &Ns, family: Family, uri: &str) -> Result<()> {
        let (from, to) = (self.pod.ip(family)?, to.at(family, 80)?);
        let request = format!("GET {uri} ");
        let is_it = |packet: &Packet| {
            packet.is_tcp()
                && packet.src.ip() == from
                && packet.dst == to
                && packet.payload.starts_with(request.as_bytes())
        };
        self.capture.wait_for(is_it, PATIENCE).map(drop)
    }

    /// Fails unless all TCP but the known older connections is TLS on HBONE's port, and no request can be read in any
    /// packet. Returns how many connections and bytes that were.
    pub(crate) fn only_tls(&self, older: &Steady, uris: &[&str]) -> Result<(usize, usize)> {
        self.hides(uris)?;
        let packets = self.capture.packets()?;
        let others: Vec<_> = packets
            .iter()
            .filter(|p| p.is_tcp() && !older.owns(p.src, p.dst))
            .collect();
        if let Some(stray) = others.iter().find(|packet| !packet.has_port(HBONE)) {
            bail!(
                "seen on the wire: {} -> {}, flags {:?}",
                stray.src,
                stray.dst,
                stray.flags
            );
        }
        let opened = self.capture.connections()?;
        ensure!(!opened.is_empty(), "no connection was opened");
        for (a, b) in &opened {
            for (from, to) in [(a, b), (b, a)] {
                let first = first_bytes(&others, *from, *to)?;
                ensure!(
                    first.starts_with(&TLS_HANDSHAKE),
                    "{from} began to talk to {to} with {:?}",
                    String::from_utf8_lossy(first)
                );
            }
        }
        Ok((
            opened.len(),
            others.iter().map(|packet| packet.payload.len()).sum(),
        ))
    }

    /// Fails if the pod opened any connection or sent any byte, but on the known older connections; what closes
    /// connections that ztunnel had is no matter.
    pub(crate) fn silent(&self, older: &Steady, uris: &[&str]) -> Result<()> {
        self.hides(uris)?;
        self.capture.none(|packet| {
            packet.is_tcp()
                && !older.owns(packet.src, packet.dst)
                && (packet.flags.syn() || !packet.payload.is_empty() || !packet.has_port(HBONE))
        })
    }

    fn hides(&self, uris: &[&str]) -> Result<()> {
        for uri in uris {
            ensure!(
                !self.capture.contains(uri.as_bytes())?,
                "{uri} can be read on the wire"
            );
        }
        Ok(())
    }
}

fn first_bytes<'a>(packets: &[&'a Packet], from: SocketAddr, to: SocketAddr) -> Result<&'a [u8]> {
    packets
        .iter()
        .find(|packet| packet.src == from && packet.dst == to && !packet.payload.is_empty())
        .map(|packet| packet.payload.as_slice())
        .with_context(|| format!("{from} said nothing to {to}"))
}
