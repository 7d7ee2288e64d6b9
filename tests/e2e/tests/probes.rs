//! Whose connections from the node reach enrolled pods past ztunnel: the kubelet's, found by its process and found again,
//! and nobody else's; in the initial PID namespace and in nested ones.
#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "test code: a step that fails is a test that fails, and kubelets are processes that it starts"
)]

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use culvert::kernel::Node;
use culvert_e2e::traffic::Via;
use culvert_e2e::{LONG, Mesh, bpf, eventually};
use culvert_lab::{Child, Connect, Creds, Family, Lab, Ns, PidNs, Server, ZtunnelOptions};
use culvert_lab::{Ztunnel, roundtrip};

/// Connects for every line of its pipe, in its own process, and says what came back.
const SCRIPT: &str = r#"
exec 9<>"$1"
[ "$0" = liar ] && printf kubelet >/proc/$$/comm
echo ready
while read -r host port <&9; do
    { printf probe >&3; word=; IFS= read -r -n 5 -t 10 word <&3; echo "answer $word"; } 3<>"/dev/tcp/$host/$port" ||
        echo "answer none"
done
"#;

/// A program that connects when it is told to.
struct Prober {
    child: Child,
    pipe: File,
    answers: std::cell::Cell<usize>,
}

impl Prober {
    /// A copy of the shell, by this name.
    fn binary(lab: &Lab, name: &str) -> PathBuf {
        let path = lab.scratch().join(name);
        if !path.exists() {
            fs::copy("/bin/bash", &path).unwrap();
        }
        path
    }

    fn start(lab: &Lab, ns: &Ns, name: &str, creds: Creds, pids: Option<&PidNs>) -> Result<Self> {
        static SERIAL: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let serial = SERIAL.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = lab.scratch().join(format!("{name}-{serial}.pipe"));
        let everybody = nix::sys::stat::Mode::from_bits_truncate(0o666);
        nix::unistd::mkfifo(&path, everybody)?;
        // The mask of this process takes bits away.
        nix::sys::stat::fchmodat(
            nix::fcntl::AT_FDCWD,
            &path,
            everybody,
            nix::sys::stat::FchmodatFlags::FollowSymlink,
        )?;
        let mut command = Command::new(Self::binary(lab, name));
        command.args(["-c", SCRIPT, name]).arg(&path);
        let child = match pids {
            Some(_) => ns.spawn_inside(pids, command)?,
            None => ns.spawn_as(creds, command)?,
        };
        child.wait_for_output("ready", LONG)?;
        Ok(Self {
            child,
            pipe: OpenOptions::new().read(true).write(true).open(&path)?,
            answers: std::cell::Cell::new(0),
        })
    }

    /// Connects, sends a word and reads it back.
    fn probe(&self, to: SocketAddr) -> Result<()> {
        (&self.pipe).write_all(format!("{} {}\n", to.ip(), to.port()).as_bytes())?;
        let before = self.answers.get();
        let answers = || -> Vec<String> {
            let text = self.child.stdout();
            let lines = text.lines().filter(|l| l.starts_with("answer "));
            lines.map(str::to_owned).collect()
        };
        eventually("the prober answers", || Ok(answers().len() > before))?;
        self.answers.set(before + 1);
        let answer = answers().pop().context("no answer")?;
        ensure!(
            answer == "answer probe",
            "{answer}: {}",
            self.child.stderr()
        );
        Ok(())
    }
}

/// Which way a conversation with the pod's server went.
fn way(mesh: &Mesh, pod: &Ns, talk: impl FnOnce() -> Result<()>) -> Result<Via> {
    let before = mesh.stat(pod, "inbound_accepts")?;
    talk()?;
    Ok(match mesh.stat(pod, "inbound_accepts")? - before {
        0 => Via::Nothing,
        _ => Via::Inbound,
    })
}

/// Which way a process of the node goes that is no kubelet: this one.
fn others(mesh: &Mesh, pod: &Ns, to: SocketAddr) -> Result<Via> {
    way(mesh, pod, || {
        let stream = Connect::to(to).timeout(LONG).run(mesh.lab.node())?;
        ensure!(roundtrip(&stream, b"word")? == b"word");
        Ok(())
    })
}

fn says(watch: &Child, pid: u32) {
    let line = format!("vouching for the kubelet, process [{pid}]");
    watch.wait_for_output(&line, LONG).unwrap();
}

fn counts(lab: &Lab) -> (u64, u64, u64) {
    let node = Node::open(lab.bpffs()).unwrap().unwrap();
    let counts = node.maps().probe_counts.get().unwrap();
    (counts.kubelet, counts.node, counts.not_vouched)
}

fn vouchers(lab: &Lab) -> usize {
    let map = bpf::Map::pinned(&lab.bpffs().join("maps/VOUCHERS")).unwrap();
    map.keys().unwrap().len()
}

#[test]
fn the_kubelet_passes_and_nobody_else() {
    let mesh = Mesh::new("kubelet").unwrap();
    let (lab, node) = (&mesh.lab, mesh.lab.node());
    let pod = lab.pod("a").unwrap();
    let neighbour = lab.pod("b").unwrap();
    mesh.enrol(&pod, &["--probe-source", "kubelet"]).unwrap();
    let servers = culvert_e2e::traffic::servers(&pod, 8080).unwrap();

    // Those who have the name, but are another user's, or in another network.
    let impostor = Prober::start(lab, node, "kubelet", Creds::Nobody, None).unwrap();
    let stranger = Prober::start(lab, &neighbour, "kubelet", Creds::Root, None).unwrap();
    // One who gives himself the name without having it.
    let liar = Prober::start(lab, node, "liar", Creds::Root, None).unwrap();
    let comm = fs::read_to_string(format!("/proc/{}/comm", liar.child.pid())).unwrap();
    assert_eq!(comm.trim(), "kubelet");
    let watch = lab.culvert_spawn(&["netns", "watch"]).unwrap();
    watch.wait_for_output("vouching for nobody", LONG).unwrap();
    assert_eq!(vouchers(lab), 0);

    let kubelet = Prober::start(lab, node, "kubelet", Creds::Root, None).unwrap();
    says(&watch, kubelet.child.pid());
    assert_eq!(vouchers(lab), 1);
    let (_, _, before) = counts(lab);
    for (family, server) in &servers {
        let to = server.addr();
        let go = |who: &Prober| way(&mesh, &pod, || who.probe(to)).unwrap();
        assert_eq!(go(&kubelet), Via::Nothing, "{family:?}");
        assert_eq!(go(&impostor), Via::Inbound, "{family:?}");
        assert_eq!(go(&liar), Via::Inbound, "{family:?}");
        assert_eq!(go(&stranger), Via::Inbound, "{family:?}");
        assert_eq!(others(&mesh, &pod, to).unwrap(), Via::Inbound, "{family:?}");
    }
    // Counted by source: two families, three of the node that were not vouched for. The neighbour is not the node.
    assert_eq!(counts(lab), (2, 0, before + 6));
    assert_eq!(mesh.counter(&pod, "vouched").unwrap(), 2);
    assert_eq!(mesh.counter(&pod, "not_vouched").unwrap(), before + 6);

    // It ends, and nobody inherits; a new one is found again, and again.
    let to = servers[0].1.addr();
    kubelet.child.kill().unwrap();
    eventually("the kubelet is forgotten", || Ok(vouchers(lab) == 0)).unwrap();
    assert_eq!(others(&mesh, &pod, to).unwrap(), Via::Inbound);
    for _ in 0..2 {
        let kubelet = Prober::start(lab, node, "kubelet", Creds::Root, None).unwrap();
        says(&watch, kubelet.child.pid());
        assert_eq!(
            way(&mesh, &pod, || kubelet.probe(to)).unwrap(),
            Via::Nothing
        );
        // Replaced on disk while it runs, as in an upgrade, it is the kubelet all the same.
        fs::remove_file(lab.scratch().join("kubelet")).unwrap();
        assert_eq!(
            way(&mesh, &pod, || kubelet.probe(to)).unwrap(),
            Via::Nothing
        );
    }
}

#[test]
fn probes_pass_while_nobody_watches_and_the_source_can_be_changed() {
    let mesh = Mesh::new("kubeletaway").unwrap();
    let (lab, node) = (&mesh.lab, mesh.lab.node());
    let pod = lab.pod("a").unwrap();
    mesh.enrol(&pod, &["--probe-source", "kubelet"]).unwrap();
    let server = Server::echo(&pod, pod.at(Family::V4, 8080).unwrap()).unwrap();
    let to = server.addr();
    let kubelet = Prober::start(lab, node, "kubelet", Creds::Root, None).unwrap();
    let watch = lab.culvert_spawn(&["netns", "watch"]).unwrap();
    says(&watch, kubelet.child.pid());
    watch.kill().unwrap();
    let go = || way(&mesh, &pod, || kubelet.probe(to)).unwrap();
    assert_eq!(go(), Via::Nothing);
    assert_eq!(others(&mesh, &pod, to).unwrap(), Via::Inbound);

    for (source, of_kubelet, of_others) in [
        ("none", Via::Inbound, Via::Inbound),
        ("node", Via::Nothing, Via::Nothing),
        ("kubelet", Via::Nothing, Via::Inbound),
    ] {
        let before = counts(lab);
        let pid = mesh.ztunnel.pid().to_string();
        lab.attach(&pod, &["--ztunnel", &pid, "--probe-source", source])
            .unwrap();
        assert_eq!(go(), of_kubelet, "{source}");
        assert_eq!(others(&mesh, &pod, to).unwrap(), of_others, "{source}");
        let after = counts(lab);
        let grown = (after.0 - before.0, after.1 - before.1, after.2 - before.2);
        let expected = match source {
            "none" => (0, 0, 2),
            "node" => (0, 2, 0),
            _ => (1, 0, 1),
        };
        assert_eq!(grown, expected, "{source}");
    }
}

#[test]
fn in_a_nested_pid_namespace_the_kubelet_there_is_found() {
    let mesh = Mesh::new("kubeletnested").unwrap();
    let (lab, node) = (&mesh.lab, mesh.lab.node());
    let pod = lab.pod("a").unwrap();
    let pids = PidNs::new(lab, None).unwrap();
    mesh.enrol(&pod, &["--probe-source", "kubelet"]).unwrap();
    let server = Server::echo(&pod, pod.at(Family::V4, 8080).unwrap()).unwrap();
    let to = server.addr();
    // One outside, which from inside nobody sees.
    let outside = Prober::start(lab, node, "kubelet", Creds::Root, None).unwrap();
    let watch = lab.culvert_inside(&pids, &["netns", "watch"]).unwrap();
    watch.wait_for_output("vouching for nobody", LONG).unwrap();
    for _ in 0..2 {
        let kubelet = Prober::start(lab, node, "kubelet", Creds::Root, Some(&pids)).unwrap();
        says(&watch, PidNs::pid_of(&kubelet.child, 1).unwrap());
        let go = |who: &Prober| way(&mesh, &pod, || who.probe(to)).unwrap();
        assert_eq!(go(&kubelet), Via::Nothing);
        assert_eq!(go(&outside), Via::Inbound);
        assert_eq!(others(&mesh, &pod, to).unwrap(), Via::Inbound);
    }
    eventually("the kubelet is forgotten", || Ok(vouchers(lab) == 0)).unwrap();
}

#[test]
fn a_ztunnel_in_a_nested_pid_namespace_can_be_named() {
    for depth in [1, 2] {
        let mut mesh = Mesh::new(&format!("nested{depth}")).unwrap();
        let node = PidNs::new(&mesh.lab, None).unwrap();
        // As ztunnel's pod has one of its own on a node that is a container itself.
        let own = (depth == 2).then(|| PidNs::new(&mesh.lab, Some(&node)).unwrap());
        let options = ZtunnelOptions::new().inside(own.as_ref().unwrap_or(&node));
        mesh.ztunnel.kill().unwrap();
        mesh.ztunnel = Ztunnel::start(&mesh.lab, &mesh.zds, &options).unwrap();
        let pod = mesh.lab.pod("a").unwrap();
        let seen = PidNs::pid_of(mesh.ztunnel.process(), 1).unwrap();
        let path = pod.path().display().to_string();
        let args = [
            "netns",
            "attach",
            "--netns",
            &path,
            "--ztunnel",
            &seen.to_string(),
        ];
        let attach = mesh.lab.culvert_inside(&node, &args).unwrap();
        let status = attach.wait(LONG).unwrap();
        assert!(status.success(), "{}{}", attach.stdout(), attach.stderr());
        mesh.zds.add_pod(&pod).unwrap();
        mesh.expect_listeners(&pod, 3).unwrap();

        let outside = mesh.lab.outside().unwrap();
        for family in Family::BOTH {
            let far = Server::echo(&outside, outside.at(family, 8080).unwrap()).unwrap();
            let (via, _) = mesh.via(&pod, &pod, &far).unwrap();
            assert_eq!(via, Via::Outbound, "{depth} {family:?}");
            // Nobody else passes for it, whatever their id elsewhere.
            let mark = Connect::to(far.addr()).mark(0x539).run(&pod).unwrap_err();
            assert_eq!(mark.raw_os_error(), Some(libc::EPERM), "{depth} {family:?}");
        }
    }
}

#[test]
fn a_proc_of_another_namespace_is_not_believed() {
    let lab = Lab::new("wrongproc").unwrap();
    let pod = lab.pod("a").unwrap();
    let pids = PidNs::new(&lab, None).unwrap();
    // In the namespace, with the /proc of the test's own.
    let path = pod.path().display().to_string();
    for args in [
        [
            "netns",
            "attach",
            "--netns",
            &path,
            "--probe-source",
            "kubelet",
        ],
        ["netns", "attach", "--netns", &path, "--ztunnel", "1"],
    ] {
        let command = lab.culvert_command(&args).unwrap();
        let culvert = lab.node().spawn_inside(Some(&pids), command).unwrap();
        assert!(!culvert.wait(LONG).unwrap().success());
        let said = culvert.stderr();
        assert!(said.contains("hostPID") && said.contains("/proc"), "{said}");
        assert_eq!(
            said.contains("--probe-source node"),
            args[4] == "--probe-source",
            "{said}"
        );
    }
    assert!(
        !Path::new(&lab.bpffs().join("maps")).exists(),
        "nothing was loaded"
    );
}
