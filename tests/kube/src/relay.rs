//! From a lab's network namespace to the API server on the machine's loopback: a relay, and a kubeconfig that goes by it.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use anyhow::{Context as _, Result};
use culvert_lab::{Family, Ns};

use crate::Bed;

/// Carries connections from the lab's node to the API server, byte for byte.
pub struct Relay {
    /// Where it listens.
    pub at: SocketAddr,
    /// Ports of the clients, in order of arrival.
    clients: Arc<Mutex<Vec<u16>>>,
    /// Bytes that clients have sent.
    pub sent: Arc<AtomicU64>,
}

impl Relay {
    /// Listens in the lab's node.
    pub fn start(node: &Ns, bed: &Bed) -> Result<Self> {
        let to: SocketAddr = bed.plane.url().trim_start_matches("https://").parse()?;
        let address = node.ip(Family::V4)?;
        let listener = node.run(move || TcpListener::bind((address, 0)))?;
        let relay = Self {
            at: listener.local_addr()?,
            clients: Arc::default(),
            sent: Arc::default(),
        };
        let (clients, sent) = (Arc::clone(&relay.clients), Arc::clone(&relay.sent));
        // Out of the lab's namespace again: sockets opened here reach the machine's loopback.
        thread::spawn(move || {
            while let Ok((client, from)) = listener.accept() {
                clients
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(from.port());
                let Ok(server) = TcpStream::connect(to) else {
                    continue;
                };
                let (Ok(c), Ok(s)) = (client.try_clone(), server.try_clone()) else {
                    continue;
                };
                let sent = Arc::clone(&sent);
                thread::spawn(move || carry(&c, &s, Some(&sent)));
                thread::spawn(move || carry(&server, &client, None));
            }
        });
        Ok(relay)
    }

    /// Ports of the clients so far.
    pub fn ports(&self) -> Vec<u16> {
        self.clients
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// A kubeconfig with the relay in place of the server, in directory `to`.
    pub fn kubeconfig(&self, bed: &Bed, to: &Path) -> Result<PathBuf> {
        let text = fs::read_to_string(&bed.kubeconfig)?;
        let url = bed.plane.url();
        let host: SocketAddr = url.trim_start_matches("https://").parse()?;
        let server = format!("https://{}", self.at);
        let text = text.replace(&url, &server);
        // The certificate is the server's, not the relay's.
        let name = format!("\"tls-server-name\":\"{}\",", host.ip());
        let text = if text.trim_start().starts_with('{') {
            text.replacen("\"server\":", &format!("{name}\"server\":"), 1)
        } else {
            let line = text.lines().find(|l| l.contains(&server));
            let line = line.context("the kubeconfig names no server")?;
            let indent = &line[..line.len() - line.trim_start().trim_start_matches("- ").len()];
            let more = format!(
                "{line}\n{}tls-server-name: {}",
                indent.replace('-', " "),
                host.ip()
            );
            text.replacen(line, &more, 1)
        };
        let path = to.join("kubeconfig");
        fs::write(&path, text)?;
        Ok(path)
    }
}

fn carry(mut from: &TcpStream, mut to: &TcpStream, count: Option<&AtomicU64>) {
    let mut buffer = vec![0; 65536];
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        if let Some(count) = count {
            count.fetch_add(n as u64, Ordering::Relaxed);
        }
        if to.write_all(&buffer[..n]).is_err() {
            break;
        }
    }
    let _gone = to.shutdown(Shutdown::Write);
}
