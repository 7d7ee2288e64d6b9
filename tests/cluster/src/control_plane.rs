//! etcd and an API server: the part of a cluster that keeps objects and hands them out. It starts and stops the two and
//! gives credentials for them; controllers, the scheduler and nodes are none of its business.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::Kubectl;
use crate::kubeconfig::{self, Proof};
use crate::parts::{Part, Parts};
use crate::pki::{MASTERS, Pki};
use crate::place::Scratch;
use crate::server::{Lifetime, Server};

/// Generous: a dozen of them may start at once on two processors.
const START: Duration = Duration::from_secs(120);
/// How long a client waits for an answer to the question whether the server is ready.
const ASK: Duration = Duration::from_secs(5);

/// The shortest life the API server gives a token.
const TOKEN: Duration = Duration::from_secs(600);

static SERIAL: AtomicU32 = AtomicU32::new(0);

/// An etcd and an API server of one's own, on a loopback address of its own. Both end with the value.
///
/// There are no controllers: a namespace gets no service account `default` (so pods are admitted without one), a deleted
/// namespace stays, a deleted pod that has a node waits for its kubelet unless the grace period is 0, and nothing makes
/// pods of a Deployment.
#[derive(Debug)]
pub struct ControlPlane {
    parts: Parts,
    address: Ipv4Addr,
    api_port: u16,
    etcd_ports: [u16; 2],
    pki: Pki,
    admin: Kubectl,
    etcd: Server,
    api: Mutex<Option<Server>>,
    serial: AtomicU32,
    // Last: servers end before their files go.
    scratch: Scratch,
}

impl ControlPlane {
    /// Starts one. Several may run side by side, of one name too.
    ///
    /// # Errors
    /// When a program has not been built (the error says how to) or does not start (the error holds its log).
    pub fn start(name: &str) -> Result<Self> {
        let parts = Parts::find()?;
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let scratch = Scratch::create(name, serial)?;
        let address = loopback(std::process::id());
        let ports = free_ports(address, serial)?;
        let pki = Pki::create(&scratch.path().join("pki"))?;
        let etcd = start_etcd(&parts, &scratch, address, [ports[0], ports[1]])?;
        let plane = Self {
            admin: Kubectl::new(scratch.path().join("admin.kubeconfig")),
            parts,
            address,
            api_port: ports[2],
            etcd_ports: [ports[0], ports[1]],
            pki,
            etcd,
            api: Mutex::default(),
            serial: AtomicU32::new(0),
            scratch,
        };
        let admin = plane.pki.issue("admin", "admin", MASTERS, &[])?;
        plane.write_kubeconfig(plane.admin.kubeconfig(), &Proof::Certificate(admin))?;
        plane.start_api_server()?;
        Ok(plane)
    }

    /// Where the API server listens.
    pub fn url(&self) -> String {
        format!("https://{}:{}", self.address, self.api_port)
    }

    /// The authority that has signed the API server's certificate (PEM).
    pub fn ca(&self) -> PathBuf {
        self.pki.ca()
    }

    /// A directory that goes with the cluster.
    pub fn scratch(&self) -> &Path {
        self.scratch.path()
    }

    /// The kubeconfig of somebody who may do everything.
    pub fn admin_kubeconfig(&self) -> &Path {
        self.admin.kubeconfig()
    }

    /// kubectl for somebody who may do everything.
    pub fn admin(&self) -> &Kubectl {
        &self.admin
    }

    /// Runs kubectl as somebody who may do everything.
    ///
    /// # Errors
    /// When it fails; the error holds what it said.
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.admin.run(args)
    }

    /// Applies manifests, checked strictly.
    ///
    /// # Errors
    /// When the API server refuses one.
    pub fn apply(&self, manifests: &str) -> Result<String> {
        self.admin.apply(manifests)
    }

    /// A token of a service account, asked of the TokenRequest API, good for ten minutes (the least there is).
    ///
    /// # Errors
    /// When there is no such account.
    pub fn token_for(&self, namespace: &str, account: &str) -> Result<String> {
        let duration = format!("--duration={}s", TOKEN.as_secs());
        let args = ["create", "token", account, "-n", namespace, &duration];
        Ok(self.admin.run(&args)?.trim().to_owned())
    }

    /// A kubeconfig with the token of a service account that is there, and with no right but its own.
    /// The token lies in a file beside it (`.token`), as a pod's does.
    ///
    /// # Errors
    /// When there is no such account.
    pub fn kubeconfig_for(&self, namespace: &str, account: &str) -> Result<PathBuf> {
        let token = self.token_for(namespace, account)?;
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        let path = self
            .scratch
            .path()
            .join(format!("{namespace}-{account}-{serial}.kubeconfig"));
        let file = path.with_extension("token");
        std::fs::write(&file, token).with_context(|| format!("writing {}", file.display()))?;
        self.write_kubeconfig(&path, &Proof::Token(file))?;
        Ok(path)
    }

    /// A kubeconfig of a user known by certificate: a node is `system:node:NAME` in group `system:nodes`.
    ///
    /// # Errors
    /// When files cannot be written.
    pub fn kubeconfig_of_user(&self, user: &str, group: &str) -> Result<PathBuf> {
        let file = user.replace(|c: char| !c.is_ascii_alphanumeric(), "-");
        let pair = self.pki.issue(&file, user, group, &[])?;
        let path = self.scratch.path().join(format!("{file}.kubeconfig"));
        self.write_kubeconfig(&path, &Proof::Certificate(pair))?;
        Ok(path)
    }

    /// Kills the API server; etcd keeps what it knew.
    ///
    /// # Errors
    /// When it does not end.
    pub fn stop_api_server(&self) -> Result<()> {
        let mut api = self.api.lock().unwrap_or_else(PoisonError::into_inner);
        match api.take() {
            Some(server) => server.kill(),
            None => Ok(()),
        }
    }

    /// Starts the API server again, at the same address, and waits until it is ready.
    ///
    /// # Errors
    /// When it runs already or does not start.
    pub fn start_api_server(&self) -> Result<()> {
        let mut api = self.api.lock().unwrap_or_else(PoisonError::into_inner);
        if api.is_some() {
            bail!("the API server runs: stop it first");
        }
        let server = Server::start(
            self.scratch.path(),
            Part::KubeApiserver.name(),
            self.api_server_command()?,
            Lifetime::WithUs,
        )?;
        let at = SocketAddr::from((self.address, self.api_port));
        server.wait_until("it listens", START, || {
            TcpStream::connect_timeout(&at, ASK).is_ok()
        })?;
        let timeout = format!("--request-timeout={}s", ASK.as_secs());
        server.wait_until("it is ready", START, || {
            self.admin.run(&["get", "--raw=/readyz", &timeout]).is_ok()
        })?;
        *api = Some(server);
        Ok(())
    }

    fn write_kubeconfig(&self, path: &Path, proof: &Proof) -> Result<()> {
        kubeconfig::write(path, &self.url(), &self.pki.ca(), proof)
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "starting servers is what this is for"
    )]
    fn api_server_command(&self) -> Result<Command> {
        let sans = [
            self.address.to_string(),
            "localhost".to_owned(),
            "kubernetes.default.svc".to_owned(),
        ];
        let serving = self.pki.issue("apiserver", "kube-apiserver", "", &sans)?;
        let accounts = self.pki.service_accounts();
        let flag = |name: &str, path: &Path| format!("--{name}={}", path.display());
        let mut command = Command::new(self.parts.get(Part::KubeApiserver)?);
        command.args([
            format!(
                "--etcd-servers=http://{}:{}",
                self.address, self.etcd_ports[0]
            ),
            format!("--bind-address={}", self.address),
            format!("--secure-port={}", self.api_port),
            flag("tls-cert-file", &serving.certificate),
            flag("tls-private-key-file", &serving.key),
            flag("client-ca-file", &self.pki.ca()),
            flag("service-account-key-file", &accounts.certificate),
            flag("service-account-signing-key-file", &accounts.key),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            "--authorization-mode=Node,RBAC".to_owned(),
            "--anonymous-auth=false".to_owned(),
            "--allow-privileged".to_owned(),
            "--service-cluster-ip-range=10.96.0.0/16,fd96::/112".to_owned(),
            // A loopback address can be no endpoint.
            "--endpoint-reconciler-type=none".to_owned(),
            // Nobody makes `default` accounts here.
            "--disable-admission-plugins=ServiceAccount".to_owned(),
            "--enable-admission-plugins=NodeRestriction".to_owned(),
            "--shutdown-delay-duration=0s".to_owned(),
            "--profiling=false".to_owned(),
        ]);
        Ok(command)
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let api = self.api.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(api) = &*api {
                eprintln!("{}", api.tail());
            }
        }
        // The API server first: without etcd it would fill its log.
        let ended = self.stop_api_server().and_then(|()| self.etcd.kill());
        if let Err(error) = ended {
            eprintln!("{error:#}");
        }
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "starting servers is what this is for"
)]
fn start_etcd(
    parts: &Parts,
    scratch: &Scratch,
    address: Ipv4Addr,
    [client, peer]: [u16; 2],
) -> Result<Server> {
    let (client_url, peer_url) = (
        format!("http://{address}:{client}"),
        format!("http://{address}:{peer}"),
    );
    let mut command = Command::new(parts.get(Part::Etcd)?);
    command
        .arg("--data-dir")
        .arg(scratch.path().join("etcd"))
        .args(["--name", "etcd", "--log-level", "warn"])
        .args(["--listen-client-urls", &client_url])
        .args(["--advertise-client-urls", &client_url])
        .args(["--listen-peer-urls", &peer_url])
        .args(["--initial-advertise-peer-urls", &peer_url])
        .args(["--initial-cluster", &format!("etcd={peer_url}")])
        // Nothing of it is to survive the machine.
        .arg("--unsafe-no-fsync");
    let etcd = Server::start(scratch.path(), Part::Etcd.name(), command, Lifetime::WithUs)?;
    let at = SocketAddr::from((address, client));
    etcd.wait_until("it listens", START, || {
        TcpStream::connect_timeout(&at, ASK).is_ok()
    })?;
    Ok(etcd)
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
