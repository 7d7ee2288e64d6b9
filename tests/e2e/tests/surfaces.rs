//! The agent's sockets under attack: by users who have no business there, by masses of connections that say nothing or
//! too much, by requests that nobody's plugin made. Pods go on being added meanwhile.

use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use culvert_e2e::runtime::{Runtime, Sandbox, first_act};
use culvert_e2e::{LONG, eventually, governed::Governed};
use culvert_lab::{Creds, Family, Server};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, send, socket};
use serde_json::{Value, json};

/// A pod is added and talks: what all of this is about still works.
fn adds(node: &Governed, server: &Server, pod: &str) -> Result<()> {
    let runtime = Runtime::alone(node, 20)?;
    node.options.scheduled_pod("default", pod)?;
    let ns = node.lab.pod(pod)?;
    let sandbox = Sandbox::around(ns, &format!("c-{pod}"), "default", pod);
    runtime.add(node, &sandbox)?;
    first_act(&sandbox.ns, server.addr())?;
    runtime.remove(node, sandbox)
}

fn request(path: &str, body: &[u8]) -> Vec<u8> {
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: agent\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

/// Status and body of the answer; none when the connection was closed without.
fn ask(agent: &Path, request: &[u8]) -> Result<Option<(u16, Value)>> {
    let mut stream = UnixStream::connect(agent)?;
    stream.set_read_timeout(Some(LONG))?;
    // It may be closed before all is sent.
    let _cut = stream.write_all(request);
    let mut answer = String::new();
    match stream.read_to_string(&mut answer) {
        Err(error) if error.kind() != ErrorKind::ConnectionReset => return Err(error.into()),
        _ if answer.is_empty() => return Ok(None),
        _ => {}
    }
    let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP")?;
    let status = head.split(' ').nth(1).context("no status")?.parse()?;
    Ok(Some((status, serde_json::from_str(body)?)))
}

fn forged(pod: &str, netns: &str) -> Vec<u8> {
    let body = json!({
        "pod": {"namespace": "default", "name": pod, "uid": pod}, "container_id": "forged", "ifname": "eth0",
        "network": "podnet", "netns": netns, "addresses": [], "budget_ms": 2000,
    });
    request("/v1/cni/add", body.to_string().as_bytes())
}

fn open_files(node: &Governed) -> Result<usize> {
    let dir = PathBuf::from(format!("/proc/{}/fd", node.agent()?.pid()));
    Ok(std::fs::read_dir(dir)?.count())
}

fn zds(node: &Governed) -> Result<std::os::fd::OwnedFd> {
    use std::os::fd::AsRawFd as _;
    let flags = SockFlag::SOCK_CLOEXEC;
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    connect(fd.as_raw_fd(), &UnixAddr::new(&node.options.zds())?)?;
    Ok(fd)
}

#[test]
fn only_root_is_answered() -> Result<()> {
    let (node, [pod, _]) = Governed::meshed("surface-users", ["a", "b"])?;
    let (agent, ztunnel) = (node.options.socket(), node.options.zds());
    for creds in [Creds::Nobody, Creds::NetRawOnly] {
        let denied = pod.run_as(creds, || {
            let plugin = UnixStream::connect(&agent).map(drop);
            let zds = zds(&node).map(drop);
            (plugin.is_err(), zds.is_err())
        });
        ensure!(denied == (true, true), "{creds}: {denied:?}");
    }
    // Even when somebody has opened every door on the way: whoever it is, is asked.
    for path in [&agent, &ztunnel] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666))?;
        for dir in path.ancestors().skip(1) {
            if dir.starts_with(node.lab.scratch()) {
                std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755))?;
            }
        }
    }
    let own = pod.path().display().to_string();
    let body = json!({"container_id": "c-a", "ifname": "eth0", "network": "podnet"});
    let told = pod.run_as(Creds::Nobody, || -> Result<_> {
        let add = ask(&agent, &forged("a", &own))?;
        let del = ask(&agent, &request("/v1/cni/del", body.to_string().as_bytes()))?;
        let status = ask(&agent, b"GET /v1/status HTTP/1.0\r\nhost: agent\r\n\r\n")?;
        Ok((add, del, status))
    })?;
    ensure!(told == (None, None, None), "{told:?}");
    let before = node.agent()?.status()?["ztunnels"].clone();
    pod.run_as(Creds::Nobody, || zds(&node).map(drop))?;
    let ztunnels = node.agent()?.status()?["ztunnels"].clone();
    ensure!(
        ztunnels.as_array().map(Vec::len) == before.as_array().map(Vec::len),
        "{ztunnels}"
    );
    Ok(())
}

#[test]
fn masses_of_connections_do_not_keep_pods_from_starting() -> Result<()> {
    let (node, [pod]) = Governed::meshed("surface-masses", ["server"])?;
    let server = Server::echo(&pod, pod.at(Family::V4, 0)?)?;
    let agent = node.options.socket();
    let before = open_files(&node)?;
    let mut silent = Vec::new();
    for n in 0..1500 {
        let mut stream = UnixStream::connect(&agent)?;
        // Some have begun to say something.
        match n % 3 {
            0 => {}
            1 => stream.write_all(b"POST /v1/cni/add HT")?,
            _ => stream.write_all(b"POST /v1/cni/add HTTP/1.1\r\ncontent-length: 9999\r\n\r\n{")?,
        }
        silent.push(stream);
    }
    let ztunnels = (0..100).map(|_| zds(&node)).collect::<Result<Vec<_>>>()?;
    for fd in ztunnels.iter().step_by(2) {
        use std::os::fd::AsRawFd as _;
        let _gone = send(
            fd.as_raw_fd(),
            &[0xff; 1024],
            nix::sys::socket::MsgFlags::MSG_NOSIGNAL,
        );
    }
    adds(&node, &server, "meanwhile")?;
    // Those that never finish are not waited for for ever.
    eventually("what says nothing to ZDS is let go of", || {
        let known = node.agent()?.status()?["ztunnels"].clone();
        Ok(known.as_array().is_some_and(|known| known.len() == 1))
    })?;
    for mut waiting in silent.drain(..3) {
        waiting.set_read_timeout(Some(Duration::from_secs(40)))?;
        let mut told = String::new();
        waiting
            .read_to_string(&mut told)
            .context("a request that never ends is waited for for ever")?;
    }
    drop((silent, ztunnels));
    eventually("no descriptor is left over", || {
        Ok(open_files(&node)? <= before + 3)
    })?;
    adds(&node, &server, "after")
}

#[test]
fn requests_that_no_plugin_makes_harm_nobody() -> Result<()> {
    let (node, [pod]) = Governed::meshed("surface-forged", ["server"])?;
    let server = Server::echo(&pod, pod.at(Family::V4, 0)?)?;
    let agent = node.options.socket();
    node.options.scheduled_pod("default", "victim")?;
    let pipe = node.lab.scratch().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU)?;
    // More than the agent has threads for what blocks.
    std::thread::scope(|scope| {
        for _ in 0..20 {
            scope.spawn(|| -> Result<()> {
                for _ in 0..30 {
                    ask(&agent, &forged("victim", &pipe.display().to_string()))?;
                }
                Ok(())
            });
        }
    });
    for netns in [
        "/etc/passwd",
        "/proc/1/ns/pid",
        "/nowhere",
        "",
        "/proc/self/fd/0",
    ] {
        let (status, body) = ask(&agent, &forged("victim", netns))?.context("no answer")?;
        ensure!(
            status >= 400 && body["message"].is_string(),
            "{netns}: {status} {body}"
        );
    }
    // The node's own namespace is never captured, whoever asks.
    let own = node.lab.node().path().display().to_string();
    let (status, body) = ask(&agent, &forged("victim", &own))?.context("no answer")?;
    ensure!(
        status == 200 && body["enrolled"] == false,
        "{status} {body}"
    );
    // Too long, too deep, not even text.
    let huge = vec![b' '; 3 << 20];
    let deep = [vec![b'['; 100_000], vec![b']'; 100_000]].concat();
    for body in [&huge[..], &deep, &[0xff; 5000], b"{}", b""] {
        for path in [
            "/v1/cni/add",
            "/v1/cni/del",
            "/v1/cni/check",
            "/v1/cni/gc",
            "/v1/cni/log",
        ] {
            if let Some((status, said)) = ask(&agent, &request(path, body))? {
                ensure!((400..500).contains(&status), "{path}: {status} {said}");
            }
        }
    }
    adds(&node, &server, "after")?;
    node.expect_state(&pod, "enrolled")
}
