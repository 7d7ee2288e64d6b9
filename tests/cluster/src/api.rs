//! etcd and an API server, wherever they are to listen: how they are started and stopped, and the credentials for them.
//! Whose they are and what goes with them is decided by [`ControlPlane`](crate::ControlPlane) and
//! `Cluster`.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::Kubectl;
use crate::kubeconfig::{self, Proof};
use crate::mesh::AGENT;
use crate::parts::{Part, Parts};
use crate::pki::{MASTERS, Pair, Pki};
use crate::server::{Lifetime, Server};

/// Generous: a dozen of them may start at once on two processors.
const START: Duration = Duration::from_secs(120);
/// How long a client waits for an answer to the question whether the server is ready.
const ASK: Duration = Duration::from_secs(5);
/// The shortest life the API server gives a token.
const TOKEN: Duration = Duration::from_secs(600);

/// The ranges of Services, in every cluster.
pub(crate) const SERVICES: &str = "10.96.0.0/16,fd96::/112";
/// The API server's own Service.
const OWN_SERVICE: &str = "10.96.0.1";

/// Where an API server is to be, and how much is around it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Spec {
    pub(crate) dir: PathBuf,
    pub(crate) address: Ipv4Addr,
    pub(crate) port: u16,
    pub(crate) etcd_ports: [u16; 2],
    /// Controllers and nodes go with it.
    pub(crate) whole: bool,
    pub(crate) lifetime: Lifetime,
}

/// The servers, when they run.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Running {
    etcd: Option<Server>,
    api: Option<Server>,
}

impl Running {
    /// What runs, in the order in which it is to end: without etcd the API server would fill its log.
    pub(crate) fn servers(&self) -> impl Iterator<Item = &Server> {
        self.api.iter().chain(&self.etcd)
    }
}

/// An API server with its etcd, and the authority that both trust. Dropping it ends nothing.
#[derive(Debug)]
pub struct Api {
    parts: Parts,
    spec: Spec,
    pki: Pki,
    admin: Kubectl,
    running: Mutex<Running>,
    serial: AtomicU32,
}

impl Api {
    /// Makes keys; starts nothing.
    pub(crate) fn create(spec: Spec) -> Result<Self> {
        let pki = Pki::create(&spec.dir.join("pki"))?;
        let api = Self::with(spec, pki, Running::default())?;
        let admin = api.pki.issue("admin", "admin", MASTERS, &[])?;
        api.write_kubeconfig(api.admin.kubeconfig(), &Proof::Certificate(admin))?;
        Ok(api)
    }

    /// Takes up what another process has started.
    pub(crate) fn open(spec: Spec, running: Running) -> Result<Self> {
        let pki = Pki::open(&spec.dir.join("pki"))?;
        Self::with(spec, pki, running)
    }

    fn with(spec: Spec, pki: Pki, running: Running) -> Result<Self> {
        Ok(Self {
            parts: Parts::find()?,
            admin: Kubectl::new(spec.dir.join("admin.kubeconfig")),
            spec,
            pki,
            running: Mutex::new(running),
            serial: AtomicU32::new(0),
        })
    }

    pub(crate) fn parts(&self) -> &Parts {
        &self.parts
    }

    pub(crate) fn pki(&self) -> &Pki {
        &self.pki
    }

    pub(crate) fn spec(&self) -> &Spec {
        &self.spec
    }

    pub(crate) fn running(&self) -> Running {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the API server listens.
    pub fn url(&self) -> String {
        format!("https://{}:{}", self.spec.address, self.spec.port)
    }

    /// The authority that has signed the API server's certificate (PEM).
    pub fn ca(&self) -> PathBuf {
        self.pki.ca()
    }

    /// Where a whole cluster's API server writes, as one line of JSON each, what Culvert's agents have asked it.
    pub fn audit_log(&self) -> PathBuf {
        self.spec.dir.join("audit.log")
    }

    /// A directory that goes with the cluster.
    pub fn scratch(&self) -> &Path {
        &self.spec.dir
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
        self.token_for_long(namespace, account, TOKEN)
    }

    pub(crate) fn token_for_long(
        &self,
        namespace: &str,
        account: &str,
        life: Duration,
    ) -> Result<String> {
        let duration = format!("--duration={}s", life.as_secs());
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
        let path = self.new_kubeconfig(&format!("{namespace}-{account}"));
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
        let path = self.new_kubeconfig(&file);
        let stem = path
            .file_stem()
            .map_or(file, |stem| stem.to_string_lossy().into_owned());
        let pair = self.pki.issue(&stem, user, group, &[])?;
        self.write_kubeconfig(&path, &Proof::Certificate(pair))?;
        Ok(path)
    }

    fn new_kubeconfig(&self, name: &str) -> PathBuf {
        let (pid, serial) = (
            std::process::id(),
            self.serial.fetch_add(1, Ordering::Relaxed),
        );
        let name = format!("{name}-{pid}-{serial}.kubeconfig");
        self.spec.dir.join(name)
    }

    pub(crate) fn write_kubeconfig(&self, path: &Path, proof: &Proof) -> Result<()> {
        kubeconfig::write(path, &self.url(), &self.pki.ca(), proof)
    }

    /// Starts etcd, which must not run.
    pub(crate) fn start_etcd(&self) -> Result<()> {
        let etcd = Server::start(
            &self.spec.dir,
            Part::Etcd.name(),
            self.etcd_command()?,
            self.spec.lifetime,
        )?;
        self.lock().etcd = Some(etcd.clone());
        let at = SocketAddr::from((self.spec.address, self.spec.etcd_ports[0]));
        etcd.wait_until("it listens", START, || listens(at))
    }

    /// Kills the API server; etcd keeps what it knew.
    ///
    /// # Errors
    /// When it does not end.
    pub fn stop_api_server(&self) -> Result<()> {
        match self.lock().api.take() {
            Some(server) => server.kill(),
            None => Ok(()),
        }
    }

    /// Makes etcd forget what has been, as it does by itself after minutes: who wants to go on from an earlier resource
    /// version is refused and has to list anew.
    ///
    /// # Errors
    /// When etcd does not answer.
    pub fn forget_history(&self) -> Result<()> {
        let now = self.ask_etcd("range", &json!({"key": "AA==", "count_only": true}))?;
        let revision = &now["header"]["revision"];
        self.ask_etcd(
            "compaction",
            &json!({"revision": revision, "physical": true}),
        )?;
        Ok(())
    }

    /// One request to etcd's JSON gateway.
    fn ask_etcd(&self, verb: &str, body: &Value) -> Result<Value> {
        let at = SocketAddr::from((self.spec.address, self.spec.etcd_ports[0]));
        let body = body.to_string();
        let mut stream = TcpStream::connect(at).context("connecting to etcd")?;
        write!(
            stream,
            "POST /v3/kv/{verb} HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no answer")?;
        ensure!(head.contains(" 200 "), "etcd, {verb}: {answer}");
        serde_json::from_str(body).with_context(|| format!("etcd, {verb}: {answer}"))
    }

    /// Starts the API server again, at the same address, and waits until it is ready.
    ///
    /// # Errors
    /// When it runs already or does not start.
    pub fn start_api_server(&self) -> Result<()> {
        if self.lock().api.as_ref().is_some_and(Server::alive) {
            bail!("the API server runs: stop it first");
        }
        let server = Server::start(
            &self.spec.dir,
            Part::KubeApiserver.name(),
            self.api_server_command()?,
            self.spec.lifetime,
        )?;
        self.lock().api = Some(server.clone());
        let at = SocketAddr::from((self.spec.address, self.spec.port));
        server.wait_until("it listens", START, || listens(at))?;
        let timeout = format!("--request-timeout={}s", ASK.as_secs());
        server.wait_until("it is ready", START, || {
            self.admin.run(&["get", "--raw=/readyz", &timeout]).is_ok()
        })
    }

    /// Ends both, the API server first: without etcd it would fill its log.
    pub(crate) fn stop(&self) -> Result<()> {
        let api = self.stop_api_server();
        let etcd = match self.lock().etcd.take() {
            Some(server) => server.kill(),
            None => Ok(()),
        };
        api.and(etcd)
    }

    /// The end of the API server's log.
    pub(crate) fn tail(&self) -> String {
        self.lock()
            .api
            .as_ref()
            .map(Server::tail)
            .unwrap_or_default()
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "starting servers is what this is for"
    )]
    fn etcd_command(&self) -> Result<Command> {
        let [client, peer] = self
            .spec
            .etcd_ports
            .map(|port| format!("http://{}:{port}", self.spec.address));
        let mut command = Command::new(self.parts.get(Part::Etcd)?);
        command
            .arg("--data-dir")
            .arg(self.spec.dir.join("etcd"))
            .args(["--name", "etcd", "--log-level", "warn"])
            .args(["--listen-client-urls", &client])
            .args(["--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer])
            .args(["--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("etcd={peer}")])
            // Nothing of it is to survive the machine.
            .arg("--unsafe-no-fsync");
        Ok(command)
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "starting servers is what this is for"
    )]
    fn api_server_command(&self) -> Result<Command> {
        let spec = &self.spec;
        let sans = [
            spec.address.to_string(),
            OWN_SERVICE.to_owned(),
            "localhost".to_owned(),
            "kubernetes".to_owned(),
            "kubernetes.default.svc".to_owned(),
            "kubernetes.default.svc.cluster.local".to_owned(),
        ];
        let serving = self.pki.issue("apiserver", "kube-apiserver", "", &sans)?;
        let accounts = self.pki.service_accounts();
        let mut command = Command::new(self.parts.get(Part::KubeApiserver)?);
        command.args([
            format!(
                "--etcd-servers=http://{}:{}",
                spec.address, spec.etcd_ports[0]
            ),
            format!("--bind-address={}", spec.address),
            format!("--secure-port={}", spec.port),
            flag("tls-cert-file", &serving.certificate),
            flag("tls-private-key-file", &serving.key),
            flag("client-ca-file", &self.pki.ca()),
            flag("service-account-key-file", &accounts.certificate),
            flag("service-account-signing-key-file", &accounts.key),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            "--authorization-mode=Node,RBAC".to_owned(),
            "--anonymous-auth=false".to_owned(),
            "--allow-privileged".to_owned(),
            format!("--service-cluster-ip-range={SERVICES}"),
            "--enable-admission-plugins=NodeRestriction".to_owned(),
            "--shutdown-delay-duration=0s".to_owned(),
            "--profiling=false".to_owned(),
        ]);
        if spec.whole {
            let Pair { certificate, key } =
                self.pki
                    .issue("kubelet-client", "kube-apiserver", MASTERS, &[])?;
            let policy = spec.dir.join("audit.json");
            std::fs::write(&policy, audit_policy().to_string())
                .with_context(|| format!("writing {}", policy.display()))?;
            command.args([
                flag("audit-policy-file", &policy),
                flag("audit-log-path", &self.audit_log()),
                format!("--advertise-address={}", spec.address),
                flag("kubelet-client-certificate", &certificate),
                flag("kubelet-client-key", &key),
                flag("kubelet-certificate-authority", &self.pki.ca()),
                "--kubelet-preferred-address-types=InternalIP".to_owned(),
            ]);
        } else {
            command.args([
                // A loopback address can be no endpoint.
                "--endpoint-reconciler-type=none",
                // Nobody makes `default` accounts here.
                "--disable-admission-plugins=ServiceAccount",
            ]);
        }
        Ok(command)
    }
}

/// Requests of Culvert's agents, and of nobody else: to log all would cost what others are measured by.
fn audit_policy() -> Value {
    let agents = format!("system:serviceaccounts:{}", AGENT.1);
    json!({
        "apiVersion": "audit.k8s.io/v1",
        "kind": "Policy",
        "omitStages": ["RequestReceived"],
        "rules": [{"level": "Metadata", "userGroups": [agents]}, {"level": "None"}],
    })
}

/// `--name=path`.
pub(crate) fn flag(name: &str, path: &Path) -> String {
    format!("--{name}={}", path.display())
}

fn listens(at: SocketAddr) -> bool {
    TcpStream::connect_timeout(&at, ASK).is_ok()
}
