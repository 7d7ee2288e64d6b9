//! The daemon as an operator meets it: its status, its privileges, its addresses, its log, its end.
use std::{
    collections::BTreeSet,
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown},
    path::PathBuf,
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result};
use culvert::kernel::privileges::NEEDED;
use culvert_e2e::eventually;
use culvert_lab::{Child, Creds, CulvertOutput, Lab};
use nix::sys::signal::Signal;
use serde_json::Value;

/// A machine that does other things as well.
const LONG: Duration = Duration::from_secs(30);

/// A node with a directory of manifests, and the paths of an agent of its own.
struct Host {
    dir: PathBuf,
    lab: Lab,
}

impl Host {
    fn new(name: &str) -> Result<Self> {
        let lab = Lab::new(name)?;
        let dir = std::env::temp_dir().join(format!("{}-op", lab.id()));
        fs::create_dir_all(dir.join("pods"))?;
        Ok(Self { dir, lab })
    }

    fn at(&self, name: &str) -> String {
        self.dir.join(name).display().to_string()
    }

    fn agent(&self, creds: Creds, more: &[&str]) -> Result<Child> {
        let (run, pods, decisions, zds) = (
            self.at("run"),
            self.at("pods"),
            self.at("decisions.json"),
            self.at("z.sock"),
        );
        let args = [
            "agent",
            "--pods",
            &pods,
            "--run-dir",
            &run,
            "--decision-file",
            &decisions,
            "--zds-socket",
            &zds,
            "--probe-source",
            "none",
            "--dns-capture=false",
        ];
        let install = more.iter().any(|a| a.starts_with("--cni-install"));
        let no_install: &[&str] = if install {
            &[]
        } else {
            &["--cni-install=false"]
        };
        self.lab
            .culvert_spawn_as(creds, &[&args[..], no_install, more].concat())
    }

    fn status(&self, more: &[&str]) -> Result<CulvertOutput> {
        let socket = self.at("run/agent.sock");
        self.lab
            .culvert(&[more, &["status", "--agent-socket", &socket]].concat())
    }

    fn wait_ready(&self) -> Result<Value> {
        eventually("the agent answers and is ready", || {
            Ok(self.status(&[])?.status.success())
        })?;
        self.status(&["-o", "json"])?.ok()?.json()
    }

    /// One request to an address of the node.
    fn ask(&self, port: u16, request: &str) -> Result<String> {
        self.lab.node().run(|| {
            let mut stream = TcpStream::connect(("127.0.0.1", port))?;
            stream.set_read_timeout(Some(LONG))?;
            write!(
                stream,
                "{request} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n"
            )?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text)
        })
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.dir).unwrap_or_default();
    }
}

/// Sets of capabilities of every thread of a process, and whether it may gain others.
fn threads(pid: u32) -> Result<BTreeSet<Vec<String>>> {
    let mut found = BTreeSet::new();
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let text = fs::read_to_string(thread?.path().join("status"))?;
        let lines = text
            .lines()
            .filter(|l| l.starts_with("Cap") || l.starts_with("NoNewPrivs"));
        found.insert(
            lines
                .map(|l| l.split_whitespace().collect::<Vec<_>>().join(" "))
                .collect(),
        );
    }
    Ok(found)
}

#[test]
fn an_agent_from_its_start_to_its_end() {
    let host = Host::new("operation").unwrap();
    let before = host.status(&[]).unwrap();
    assert!(!before.status.success());
    assert!(
        before.stdout.contains("agent: away: no agent at"),
        "{before:?}"
    );
    assert!(before.stdout.contains("nothing is loaded"), "{before:?}");

    let agent = host.agent(Creds::Root, &["--log-format", "json"]).unwrap();
    let report = host.wait_ready().unwrap();
    assert_eq!(report["pid"], agent.pid());
    assert_eq!(report["pods"], Value::Array(Vec::new()));
    assert!(!report["readiness"]["tasks"].as_array().unwrap().is_empty());

    // Every thread has what is listed and no more.
    let needed = NEEDED.iter().fold(0_u64, |set, need| set | 1 << need.bit());
    let (all, none) = (format!("{needed:016x}"), format!("{:016x}", 0));
    let expected = [
        ("CapInh", &none),
        ("CapPrm", &all),
        ("CapEff", &all),
        ("CapBnd", &all),
        ("CapAmb", &none),
    ];
    let mut expected: Vec<String> = expected.iter().map(|(k, v)| format!("{k}: {v}")).collect();
    expected.push("NoNewPrivs: 1".to_owned());
    assert_eq!(threads(agent.pid()).unwrap(), [expected].into());

    for (port, path, text) in [
        (8000, "/healthz", "alive"),
        (8000, "/readyz", "ready\n"),
        (15014, "/metrics", "culvert_wanted_pods 0\n"),
    ] {
        let answer = host.ask(port, &format!("GET {path}")).unwrap();
        assert!(
            answer.starts_with("HTTP/1.1 200") && answer.contains(text),
            "{path}: {answer}"
        );
    }

    // Somebody else installs the plugin here: an alert on its absence must not fire.
    let metrics = host.ask(15014, "GET /metrics").unwrap();
    assert!(!metrics.contains("\nistio_cni_install_ready "), "{metrics}");

    // At `error` it does not even say that it is at `error`.
    for level in ["error", "info"] {
        let changed = host
            .ask(15014, &format!("PUT /loglevel?level={level}"))
            .unwrap();
        assert!(changed.starts_with("HTTP/1.1 200"), "{changed}");
    }
    agent.wait_for_output(r#""filter":"info""#, LONG).unwrap();
    assert!(
        !agent.stderr().contains(r#""filter":"error""#),
        "{}",
        agent.stderr()
    );
    for line in agent.stderr().lines() {
        let event: Value = serde_json::from_str(line)
            .with_context(|| line.to_owned())
            .unwrap();
        assert!(
            event["timestamp"].is_string() && event["message"].is_string(),
            "{line}"
        );
    }

    agent.signal(Signal::SIGTERM).unwrap();
    let ended = agent.wait(LONG).unwrap();
    assert!(ended.success(), "{ended:?}: {}", agent.stderr());
    let after = host.status(&[]).unwrap();
    assert!(!after.status.success());
    assert!(
        after.stdout.contains("kernel: programs are loaded"),
        "{after:?}"
    );
    let after = host.status(&["-o", "json"]).unwrap().json().unwrap();
    assert_eq!(after["loaded"], true);
    assert!(
        after["error"].as_str().unwrap().contains("no agent at"),
        "{after}"
    );
}

#[test]
fn an_agent_that_cannot_work_says_why_and_ends() {
    let host = Host::new("operation-not").unwrap();
    for need in NEEDED {
        let kept = NEEDED.iter().filter(|n| n.name != need.name);
        let creds = Creds::RootWith(kept.fold(0, |set, n| set | 1 << n.bit()));
        let agent = host.agent(creds, &[]).unwrap();
        assert!(
            !agent.wait(LONG).unwrap().success(),
            "it runs without {}",
            need.name
        );
        let said = agent.stderr();
        assert!(
            said.contains(&format!("missing: {} (", need.name))
                && said.contains(&format!("add {} ", need.name)),
            "without {}: {said}",
            need.name
        );
    }

    // With exactly the listed ones it runs.
    let creds = Creds::RootWith(NEEDED.iter().fold(0, |set, n| set | 1 << n.bit()));
    let first = host.agent(creds, &[]).unwrap();
    host.wait_ready().unwrap();
    let second = Host::new("operation-second").unwrap();
    let (run, pods) = (second.at("run"), second.at("pods"));
    let args = [
        "agent",
        "--pods",
        &pods,
        "--run-dir",
        &run,
        "--cni-install=false",
    ];
    let again = host.lab.culvert_spawn(&args).unwrap();
    assert!(!again.wait(LONG).unwrap().success());
    let said = again.stderr();
    assert!(
        said.contains("port 15014 is taken") && said.contains("--metrics-address"),
        "{said}"
    );

    // The same run directory, everything else its own.
    let ports = [
        "--metrics-address",
        "127.0.0.1:15099",
        "--health-address",
        "127.0.0.1:8099",
    ];
    let same = host.agent(Creds::Root, &ports).unwrap();
    assert!(!same.wait(LONG).unwrap().success());
    let said = same.stderr();
    assert!(
        said.contains(&format!("process {},", first.pid())) && said.contains("--run-dir"),
        "{said}"
    );
    // One that is killed leaves no lock behind.
    first.kill().unwrap();
    let next = host.agent(Creds::Root, &[]).unwrap();
    host.wait_ready().unwrap();

    let wrong = [
        "agent",
        "--ztunnel-grace",
        "soon",
        "--ipv6=maybe",
        "--pods",
        "relative",
    ];
    let wrong = host.lab.culvert(&wrong).unwrap();
    assert!(!wrong.status.success());
    for text in ["ztunnel-grace (flag)", "ipv6 (flag)", "pods (flag)"] {
        assert!(wrong.stderr.contains(text), "{wrong:?}");
    }
    next.term().unwrap();
    assert!(next.wait(LONG).unwrap().success());
}

#[test]
fn a_configuration_of_another_user_is_edited_and_one_that_cannot_be_is_said() {
    let host = Host::new("operation-owner").unwrap();
    let conf = host.dir.join("net.d");
    let file = conf.join("10-bridge.conflist");
    let list = r#"{"cniVersion": "1.0.0", "name": "n", "plugins": [{"type": "bridge"}]}"#;
    fs::create_dir_all(&conf).unwrap();
    fs::write(&file, list).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    chown(&file, Some(1000), Some(1000)).unwrap();
    let (confs, bins) = (conf.display().to_string(), host.at("bin"));
    let plugin = host.at("plugin");
    fs::write(&plugin, "#!/bin/true").unwrap();
    let install = [
        "--cni-install=true",
        "--cni-conf-dir",
        &confs,
        "--cni-bin-dir",
        &bins,
        "--plugin-binary",
        &plugin,
    ];
    // Exactly the listed ones: neither CAP_CHOWN nor CAP_DAC_OVERRIDE.
    let creds = || Creds::RootWith(NEEDED.iter().fold(0, |set, n| set | 1 << n.bit()));
    let agent = host.agent(creds(), &install).unwrap();
    host.wait_ready().unwrap();
    let edited = fs::read_to_string(&file).unwrap();
    assert!(edited.contains("culvert-cni"), "{edited}");
    assert_eq!(fs::metadata(&file).unwrap().uid(), 0);
    assert!(
        agent.stderr().contains("chown 1000:1000"),
        "{}",
        agent.stderr()
    );
    agent.term().unwrap();
    assert!(agent.wait(LONG).unwrap().success());

    // Nothing can be written there, whatever the agent does.
    fs::write(&file, list).unwrap();
    chown(&conf, Some(1000), Some(1000)).unwrap();
    let agent = host.agent(creds(), &install).unwrap();
    let status = || -> Result<String> {
        let status = host.status(&["-o", "json"])?.json()?;
        let tasks = status["readiness"]["tasks"].as_array().cloned();
        let mut tasks = tasks.unwrap_or_default().into_iter();
        let task = tasks.find(|t| t["name"] == "cni-installed");
        Ok(task.map_or_else(String::new, |t| {
            t["reason"].as_str().unwrap_or_default().to_owned()
        }))
    };
    let cure = format!(
        "belongs to user 1000, and the agent goes without the capability to pass over others' permissions: `chown root {confs}`"
    );
    eventually("the installer says what to do", || {
        status().map(|why| why.contains(&cure)).or(Ok(false))
    })
    .unwrap_or_else(|e| panic!("{e:#}: {:?}", status()));
    chown(&conf, Some(0), Some(0)).unwrap();
    host.wait_ready().unwrap();
    agent.term().unwrap();
    assert!(agent.wait(LONG).unwrap().success());
}

#[test]
fn a_host_that_lacks_something_is_told_what() {
    let host = Host::new("operation-host").unwrap();
    let (pods, run, dir) = (host.at("pods"), host.at("run"), host.at("plain"));
    fs::create_dir_all(&dir).unwrap();
    let taken = host.at("taken.sock");
    let _listener = std::os::unix::net::UnixListener::bind(&taken).unwrap();
    let file = host.at("file");
    fs::write(&file, "").unwrap();
    let kubeconfig = host.at("no-kubeconfig");
    // What is wrong, and what the agent has to say of it.
    let cases: [(&[&str], &[&str]); 7] = [
        (
            &["--bpffs", &dir],
            &["no bpffs is mounted there", "mount -t bpf bpf /sys/fs/bpf"],
        ),
        (
            &["--cgroup-root", &dir],
            &["not on a cgroup v2 hierarchy", "mount -t cgroup2"],
        ),
        (
            &["--cgroup-root", "/nowhere"],
            &["/nowhere", "--cgroup-root"],
        ),
        (
            &["--kubeconfig", &kubeconfig],
            &["kubeconfig", "set one of pods and kubeconfig"],
        ),
        (&["--zds-socket", &taken], &[&taken]),
        (&["--run-dir", &file], &[&file]),
        (
            &["--metrics-address", ":8000"],
            &["health-address", "give it another port"],
        ),
    ];
    for (wrong, said) in cases {
        // Of two settings of one name none would count: only those are given that are not meant here.
        let (bpffs, cgroup) = (host.lab.bpffs(), host.lab.cgroup());
        let defaults: [(&str, String); 7] = [
            ("--bpffs", bpffs.display().to_string()),
            ("--cgroup-root", cgroup.display().to_string()),
            ("--pods", pods.clone()),
            ("--run-dir", run.clone()),
            ("--probe-source", "none".to_owned()),
            ("--decision-file", host.at("d.json")),
            ("--zds-socket", host.at("z.sock")),
        ];
        let given = defaults.iter().filter(|(flag, _)| !wrong.contains(flag));
        let program = host.lab.culvert_command(&[]).unwrap();
        #[expect(
            clippy::disallowed_methods,
            reason = "the lab's own would name a bpffs and a cgroup"
        )]
        let mut command = Command::new(program.get_program());
        command.args(["agent", "--cni-install=false"]);
        command.args(given.flat_map(|(flag, value)| [*flag, value.as_str()]));
        command.args(wrong);
        let agent = host.lab.node().spawn(command).unwrap();
        let ended = agent.wait(LONG);
        let stderr = agent.stderr();
        assert!(
            ended.is_ok_and(|status| !status.success()),
            "{wrong:?}: it runs: {stderr}"
        );
        for text in said {
            assert!(
                stderr.contains(text),
                "{wrong:?}: not `{text}` but: {stderr}"
            );
        }
    }

    // Manifests may come later: it waits for them, and says so where its state is asked for.
    fs::remove_dir_all(&pods).unwrap();
    let agent = host.agent(Creds::Root, &[]).unwrap();
    eventually("the missing directory is named", || {
        let status = host.status(&[])?.stdout;
        Ok(status.contains(&pods) && status.contains("give --pods an existing file or directory"))
    })
    .unwrap();
    fs::create_dir_all(&pods).unwrap();
    eventually("nothing is missing", || {
        Ok(!host.status(&[])?.stdout.contains(&pods))
    })
    .unwrap();
    agent.term().unwrap();
    assert!(agent.wait(LONG).unwrap().success());
}

#[test]
fn settings_are_printed_with_their_origins() {
    let host = Host::new("operation-print").unwrap();
    let file = host.at("settings.yaml");
    fs::write(&file, "probe-source: node\n").unwrap();
    let args = [
        "agent",
        "--node-name",
        "node-1",
        "--config",
        &file,
        "--print-config",
    ];
    let table = host.lab.culvert(&args).unwrap().ok().unwrap();
    let row = table
        .stdout
        .lines()
        .find(|l| l.starts_with("probe-source"))
        .unwrap();
    assert!(
        row.contains("node") && row.ends_with(&format!("file {file}:1")),
        "{row}"
    );
    for format in ["json", "yaml"] {
        let output = host
            .lab
            .culvert(&[&["-o", format], &args[..]].concat())
            .unwrap()
            .ok()
            .unwrap();
        let value: Result<Value> = match format {
            "json" => output.json(),
            _ => serde_saphyr::from_str(&output.stdout).map_err(Into::into),
        };
        let value = value.unwrap();
        let all = value["settings"].as_array().unwrap();
        let of = |key: &str| all.iter().find(|s| s["key"] == key).unwrap();
        assert_eq!(of("node-name")["from"], "flag", "{format}");
        assert_eq!(of("bpffs")["from"], "flag", "the lab names it");
        assert_eq!(of("ztunnel-grace")["value"], "10s");
    }
    assert!(!host.dir.join("run").exists(), "printing starts nothing");
}
