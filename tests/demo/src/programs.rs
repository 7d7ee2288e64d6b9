//! The programs of the demonstration as Debian ships them: how they are called and what they print. No word of a mesh is
//! in any of their settings.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use culvert_lab::{Child, Family, Lab, Ns};
use serde_json::Value;

use crate::interrupt;

/// How long a program may take; none comes near it.
const PATIENCE: Duration = Duration::from_secs(30);
/// How many seconds iperf3 sends.
const IPERF_SECONDS: &str = "1";

/// Where nginx writes whom it has served.
pub(crate) fn access_log(lab: &Lab) -> PathBuf {
    lab.scratch().join("nginx/access.log")
}

/// Starts nginx on port 80 of a pod, both families, with all its files in the lab's scratch directory.
pub(crate) fn nginx(lab: &Lab, ns: &Ns) -> Result<Child> {
    let dir = lab.scratch().join("nginx");
    fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
    let conf = dir.join("nginx.conf");
    fs::write(&conf, nginx_conf(&dir)).with_context(|| format!("writing {}", conf.display()))?;
    let mut command = program("nginx")?;
    command
        .arg("-p")
        .arg(&dir)
        .arg("-c")
        .arg(&conf)
        .arg("-e")
        .arg(dir.join("error.log"));
    let nginx = ns.spawn(command)?;
    for family in Family::BOTH {
        wait_for_port(&nginx, ns, ns.at(family, 80)?)?;
    }
    Ok(nginx)
}

fn nginx_conf(dir: &Path) -> String {
    let dir = dir.display();
    // One process: a master's workers would outlive a demonstration that is killed.
    format!(
        "daemon off;\n\
         master_process off;\n\
         pid {dir}/nginx.pid;\n\
         error_log {dir}/error.log;\n\
         events {{ worker_connections 256; }}\n\
         http {{\n\
         \x20 log_format whom '$remote_addr $remote_port $connection $connection_requests $status $request_uri';\n\
         \x20 access_log {dir}/access.log whom;\n\
         \x20 client_body_temp_path {dir}/body;\n\
         \x20 proxy_temp_path {dir}/proxy;\n\
         \x20 fastcgi_temp_path {dir}/fastcgi;\n\
         \x20 uwsgi_temp_path {dir}/uwsgi;\n\
         \x20 scgi_temp_path {dir}/scgi;\n\
         \x20 keepalive_requests 1000000;\n\
         \x20 keepalive_timeout 1h;\n\
         \x20 default_type text/plain;\n\
         \x20 server {{\n\
         \x20   listen 80;\n\
         \x20   listen [::]:80;\n\
         \x20   location / {{ return 200 \"this is $request_uri\\n\"; }}\n\
         \x20 }}\n\
         }}\n"
    )
}

/// Starts an iperf3 server on a pod, both families.
pub(crate) fn iperf3_server(ns: &Ns) -> Result<Child> {
    let mut command = program("iperf3")?;
    command.args(["--server", "--forceflush"]);
    let server = ns.spawn(command)?;
    server.wait_for_output("Server listening", PATIENCE)?;
    Ok(server)
}

/// What an iperf3 client measured: bits per second that arrived.
pub(crate) fn iperf3(from: &Ns, to: &Ns, family: Family) -> Result<f64> {
    let mut command = program("iperf3")?;
    let to = to.ip(family)?.to_string();
    command.args(["--client", &to, "--time", IPERF_SECONDS, "--json"]);
    let client = from.spawn(command)?;
    let status = finish(&client)?;
    let printed: Value = serde_json::from_str(&client.stdout())
        .with_context(|| format!("iperf3 ({status}) printed no JSON: {}", client.stderr()))?;
    let rate = printed["end"]["sum_received"]["bits_per_second"].as_f64();
    ensure!(
        status.success(),
        "iperf3 failed ({status}): {}",
        printed["error"]
    );
    rate.with_context(|| format!("iperf3 printed no rate: {printed}"))
}

/// A page that curl has fetched, or is fetching.
#[derive(Debug)]
pub(crate) struct Fetch {
    child: Child,
    uri: String,
}

/// Starts curl. The path of the page is what to look for on the wire and in nginx's log.
pub(crate) fn start_curl(from: &Ns, to: &Ns, family: Family, uri: &str) -> Result<Fetch> {
    let mut command = curl()?;
    command
        .args(["--write-out", "%{http_code} %{time_total}"])
        .arg(url(to.at(family, 80)?, uri));
    Ok(Fetch {
        child: from.spawn(command)?,
        uri: uri.to_owned(),
    })
}

/// Fetches a page and says how long that took.
pub(crate) fn fetch(from: &Ns, to: &Ns, family: Family, uri: &str) -> Result<Duration> {
    start_curl(from, to, family, uri)?.finish()
}

impl Fetch {
    /// Whether curl still waits.
    pub(crate) fn waits(&self) -> bool {
        self.child.status().is_none()
    }

    /// What curl has printed so far, to say what was seen instead.
    pub(crate) fn printed(&self) -> String {
        format!("{}{}", self.child.stdout(), self.child.stderr())
    }

    /// Waits for the page, and fails unless it is the right one with status 200.
    pub(crate) fn finish(self) -> Result<Duration> {
        let status = finish(&self.child)?;
        let printed = self.printed();
        ensure!(status.success(), "curl failed ({status}): {printed}");
        let (page, numbers) = printed.split_once('\n').unwrap_or_default();
        let (code, seconds) = numbers.split_once(' ').unwrap_or_default();
        ensure!(
            page == format!("this is {}", self.uri) && code == "200",
            "curl asked for {} and got: {printed}",
            self.uri
        );
        let seconds: f64 = seconds
            .parse()
            .with_context(|| format!("curl printed {printed:?}"))?;
        Ok(Duration::from_secs_f64(seconds))
    }
}

/// Starts a curl that asks for a page ten times a second, over one connection for as long as that lives.
pub(crate) fn steady_curl(from: &Ns, to: SocketAddr, uri: &str) -> Result<Child> {
    let mut command = curl()?;
    command
        .args(["--rate", "10/s", "--output", "/dev/null"])
        .arg(url(to, &format!("{uri}/[1-100000]")));
    from.spawn(command)
}

/// Asks a resolver for a name with dig, over UDP or TCP; empty when nobody answers. An answer under another address
/// than the resolver's is none to dig.
pub(crate) fn dig(from: &Ns, resolver: IpAddr, name: &str, tcp: bool) -> Result<String> {
    let mut command = program("dig")?;
    let way = if tcp { "+tcp" } else { "+notcp" };
    command.args(["-r", "+short", "+tries=1", "+timeout=2", way]);
    command.arg(format!("@{resolver}")).arg(name);
    let child = from.spawn(command)?;
    // Without an answer it says so in a comment and ends with an error of its own.
    let answered = finish(&child)?.success();
    Ok(if answered {
        child.stdout().trim().to_owned()
    } else {
        String::new()
    })
}

fn curl() -> Result<Command> {
    let mut command = program("curl")?;
    // Nobody's ~/.curlrc and no proxy of the machine; --disable counts only as the first.
    command.args([
        "--disable",
        "--silent",
        "--show-error",
        "--noproxy",
        "*",
        "--max-time",
        "30",
    ]);
    Ok(command)
}

fn url(to: SocketAddr, uri: &str) -> String {
    // Without the port, as people write it: all talk to port 80.
    match to {
        SocketAddr::V4(to) => format!("http://{}{uri}", to.ip()),
        SocketAddr::V6(to) => format!("http://[{}]{uri}", to.ip()),
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "running real programs is what the demonstration is for"
)]
fn program(name: &str) -> Result<Command> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Daemons live in sbin, which a plain user's PATH, and with it sudo's, may lack.
    let found = std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|dir| dir.join(name))
        .find(|file| file.is_file());
    let Some(found) = found else {
        bail!("{name} is not installed: apt-get install nginx curl iperf3");
    };
    let mut command = Command::new(found);
    // Ctrl-C is for the demonstration, which ends them in order.
    command.process_group(0);
    Ok(command)
}

fn finish(child: &Child) -> Result<ExitStatus> {
    interrupt::wait_for(PATIENCE, || {
        Ok(child
            .status()
            .ok_or_else(|| format!("it still runs: {}{}", child.stdout(), child.stderr())))
    })
}

fn wait_for_port(server: &Child, ns: &Ns, addr: SocketAddr) -> Result<()> {
    interrupt::wait_for(PATIENCE, || {
        if let Some(status) = server.status() {
            bail!(
                "the server ended ({status}): {}{}",
                server.stdout(),
                server.stderr()
            );
        }
        match culvert_lab::connect(ns, addr, PATIENCE) {
            Ok(_connected) => Ok(Ok(())),
            Err(error) => Ok(Err(format!("connecting to {addr}: {error}"))),
        }
    })
}
