//! An API server for one test: an address nobody else derives, a directory of its own, an end with the value.

use std::net::{Ipv4Addr, TcpListener};
use std::ops::Deref;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result, bail};

use crate::api::{Api, Spec};
use crate::place::Scratch;
use crate::server::Lifetime;
use crate::sweep;

static SERIAL: AtomicU32 = AtomicU32::new(0);

/// An etcd and an API server of one's own, on a loopback address of its own. Both end with the value.
///
/// There are no controllers: a namespace gets no service account `default` (so pods are admitted without one), a deleted
/// namespace stays, a deleted pod that has a node waits for its kubelet unless the grace period is 0, and nothing makes
/// pods of a Deployment.
#[derive(Debug)]
pub struct ControlPlane {
    api: Api,
    // Last: servers end before their files go.
    _scratch: Scratch,
}

impl ControlPlane {
    /// Starts one. Several may run side by side, of one name too.
    ///
    /// # Errors
    /// When a program has not been built (the error says how to) or does not start (the error holds its log).
    pub fn start(name: &str) -> Result<Self> {
        sweep::leftovers()?;
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let scratch = Scratch::create(name, serial)?;
        let address = loopback(std::process::id());
        let [client, peer, port] = free_ports(address, serial)?;
        let plane = Self {
            api: Api::create(Spec {
                dir: scratch.path().to_path_buf(),
                address,
                port,
                etcd_ports: [client, peer],
                whole: false,
                lifetime: Lifetime::WithUs,
            })?,
            _scratch: scratch,
        };
        plane.start_etcd()?;
        plane.start_api_server()?;
        Ok(plane)
    }
}

impl Deref for ControlPlane {
    type Target = Api;

    fn deref(&self) -> &Api {
        &self.api
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.api.tail());
        }
        if let Err(error) = self.api.stop() {
            eprintln!("{error:#}");
        }
    }
}
/// A loopback address that no other live process derives: what listens there does not get into anybody's way.
fn loopback(pid: u32) -> Ipv4Addr {
    // Process numbers have 22 bits at most; 127.0.0.0/10 is left to everybody else.
    let [_, high, middle, low] = (pid & 0x3f_ffff).to_be_bytes();
    Ipv4Addr::new(127, 0x40 | high, middle, low)
}

/// Three ports on our own address. Tried, because a server that was killed may not be gone yet.
fn free_ports(address: Ipv4Addr, serial: u32) -> Result<[u16; 3]> {
    for attempt in 0..50 {
        let base = u16::try_from(20_000 + (serial + attempt * 100) % 3_000 * 3)
            .context("a port out of range")?;
        let ports = [base, base + 1, base + 2];
        if ports
            .iter()
            .all(|port| TcpListener::bind((address, *port)).is_ok())
        {
            return Ok(ports);
        }
    }
    bail!("no free ports on {address}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_process_has_a_loopback_address_of_its_own() {
        assert_eq!(loopback(1), Ipv4Addr::new(127, 64, 0, 1));
        assert_eq!(loopback(0x3f_ffff), Ipv4Addr::new(127, 127, 255, 255));
        assert_ne!(loopback(0x01_0000), loopback(0x02_0000));
        for pid in [1, 300, 70_000, 4_194_303] {
            assert!(loopback(pid).is_loopback());
        }
    }
}
