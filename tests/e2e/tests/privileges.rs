//! Which capabilities the kernel door needs: with exactly those of the table everything works, and without any one of
//! them something fails and says which.
#![expect(
    clippy::unwrap_used,
    reason = "test code: a step that fails is a test that fails"
)]

use std::{net::SocketAddr, process::Command, sync::Mutex};

use anyhow::{Context as _, Result, ensure};
use culvert::kernel::{
    Netns,
    privileges::{self, NEEDED},
    sockdiag,
};
use culvert_lab::{Child, Creds, CulvertOutput, Family, Lab, Ns, Zds, Ztunnel, ZtunnelOptions};
use socket2::{Domain, Protocol, Socket, Type};

const APP: u16 = 8080;

/// A listener is handed to a child by inheritance: no other child may be started meanwhile.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// What makes use of every part of the kernel door: a ztunnel that listens already, and an application of another user
/// that listens with a device and a mark.
struct Stage {
    application: Child,
    ztunnel: Ztunnel,
    _zds: Zds,
    pod: Ns,
    lab: Lab,
}

impl Stage {
    fn new(name: &str) -> Result<Self> {
        let lab = Lab::new(name)?;
        let zds = Zds::start(&lab)?;
        let ztunnel = Ztunnel::start(&lab, &zds, &ZtunnelOptions::new())?;
        let pod = lab.pod("a")?;
        zds.add_pod(&pod)?;
        let application = listener_of_nobody(&pod)?;
        Ok(Self {
            application,
            ztunnel,
            _zds: zds,
            pod,
            lab,
        })
    }

    /// The namespace by a process of another user, as pods' namespaces are found.
    fn path(&self) -> String {
        format!("/proc/{}/ns/net", self.application.pid())
    }

    fn attach(&self, creds: Creds) -> Result<CulvertOutput> {
        let (path, ztunnel) = (self.path(), self.ztunnel.pid().to_string());
        let args = ["-o", "json", "netns", "attach", "--netns", &path];
        self.lab
            .culvert_as(creds, &[&args[..], &["--ztunnel", &ztunnel]].concat())
    }

    /// Mark and device of the application's listener.
    fn listener(&self) -> Result<(u32, u32)> {
        let netns = Netns::open(self.pod.path())?;
        let found = sockdiag::listeners(&netns.enter()?)?;
        let found = found.iter().find(|s| s.port == APP);
        found
            .map(|s| (s.mark, s.device))
            .context("the application does not listen")
    }
}

/// A process of nobody's that holds the only descriptor of a listener.
fn listener_of_nobody(pod: &Ns) -> Result<Child> {
    let at: SocketAddr = pod.at(Family::V4, APP)?;
    let listener = pod.run(|| -> std::io::Result<Socket> {
        let listener = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
        listener.bind_device(Some(pod.ifname().as_bytes()))?;
        listener.set_mark(0x42)?;
        listener.bind(&at.into())?;
        listener.listen(8)?;
        listener.set_cloexec(false)?;
        Ok(listener)
    })?;
    #[expect(
        clippy::disallowed_methods,
        reason = "tests run programs; the agent does not"
    )]
    let mut sleep = Command::new("sleep");
    sleep.arg("600");
    let child = pod.spawn_as(Creds::Nobody, sleep)?;
    drop(listener);
    Ok(child)
}

/// The table's capabilities, without those named.
fn all_but(without: &[&str]) -> Creds {
    let kept = NEEDED.iter().filter(|n| !without.contains(&n.name));
    Creds::RootWith(kept.fold(0, |set, need| set | 1 << need.bit()))
}

/// Fails unless the run succeeded and had nothing to complain of.
fn clean(output: CulvertOutput) -> Result<CulvertOutput> {
    let output = output.ok()?;
    ensure!(output.stderr.is_empty(), "{output:?}");
    Ok(output)
}

#[test]
fn with_exactly_the_listed_everything_works() {
    let _alone = ONE_AT_A_TIME.lock();
    let stage = Stage::new("privileges").unwrap();
    let path = stage.path();
    let run = |args: &[&str]| {
        stage
            .lab
            .culvert_as(all_but(&[]), args)
            .and_then(clean)
            .unwrap()
    };

    run(&["preflight"]);
    run(&["load"]);
    run(&["load"]);
    let before = stage.listener().unwrap();
    assert!(before.0 == 0x42 && before.1 != 0, "{before:?}");
    let attached = clean(stage.attach(all_but(&[])).unwrap()).unwrap();
    let attached = attached.json().unwrap();
    assert_eq!(attached["pods"][0]["result"], "enrolled");
    assert!(
        attached["pods"][0]["listeners_fetched"].as_u64().unwrap() >= 3,
        "ztunnel listened already: {attached}"
    );
    assert_eq!(
        stage.listener().unwrap(),
        (0, 0),
        "freed of mark and device"
    );
    let shown = run(&["-o", "json", "netns", "show", "--netns", &path]);
    assert_eq!(shown.json().unwrap()["whole"], true);
    assert_eq!(
        run(&["-o", "json", "netns", "list"]).json().unwrap()["pods"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
    let again = clean(stage.attach(all_but(&[])).unwrap()).unwrap();
    assert_eq!(again.json().unwrap()["pods"][0]["result"], "updated");
    let let_go = run(&["-o", "json", "netns", "detach", "--netns", &path]);
    assert_eq!(let_go.json().unwrap()["pods"][0]["result"], "detached");
    run(&["unload"]);
}

#[test]
fn without_any_one_of_them_something_fails_and_says_which() {
    let _alone = ONE_AT_A_TIME.lock();
    let stage = Stage::new("privileges-less").unwrap();
    for need in NEEDED {
        let creds = all_but(&[need.name]);
        let checks = stage
            .lab
            .culvert_as(creds, &["-o", "json", "preflight"])
            .unwrap();
        assert!(
            !checks.status.success(),
            "preflight passes without {}",
            need.name
        );
        assert!(
            checks.stdout.contains(&format!("or add {}", need.name)),
            "preflight does not name {}: {checks:?}",
            need.name
        );

        let attached = stage.attach(creds).unwrap();
        for other in NEEDED {
            let named = attached.stderr.contains(&format!("add {}", other.name));
            assert_eq!(
                named,
                other.name == need.name,
                "without {}: {attached:?}",
                need.name
            );
        }
        if attached.status.success() {
            let (_, device) = stage.listener().unwrap();
            assert_ne!(device, 0, "all went well without {}", need.name);
        }
        // With all of them, nothing that was left behind is in the way.
        let path = stage.path();
        let args = ["netns", "detach", "--netns", &path];
        stage
            .lab
            .culvert_as(all_but(&[]), &args)
            .unwrap()
            .ok()
            .unwrap();
    }
}

/// Fields of the calling thread's status.
fn status(names: &[&str]) -> Vec<u64> {
    let text = std::fs::read_to_string("/proc/thread-self/status").unwrap();
    let value = |name: &&str| {
        let line = text.lines().find_map(|l| l.strip_prefix(*name));
        u64::from_str_radix(line.unwrap().trim_start_matches(':').trim(), 16).unwrap()
    };
    names.iter().map(value).collect()
}

#[test]
fn all_others_are_let_go_for_good() {
    let lab = Lab::new("privileges-drop").unwrap();
    let sets = [
        "CapEff",
        "CapPrm",
        "CapBnd",
        "CapInh",
        "CapAmb",
        "NoNewPrivs",
    ];
    let before = status(&sets);
    let (first, second, again) = lab.node().run(|| {
        privileges::drop_others_of_thread().unwrap();
        let first = status(&sets);
        // As a container that was given no more does.
        let again = privileges::drop_others_of_thread().map_err(|e| e.to_string());
        // Threads that are started have the same.
        let second = std::thread::scope(|s| s.spawn(|| status(&sets)).join().unwrap());
        (first, second, again)
    });
    let needed = NEEDED.iter().fold(0, |set, need| set | 1 << need.bit());
    assert_eq!(first, [needed, needed, needed, 0, 0, 1]);
    assert_eq!(second, first);
    assert_eq!(again, Ok(()));
    assert_eq!(status(&sets), before, "other threads keep what they have");
}

#[test]
fn what_is_missing_is_listed_at_once_with_reasons() {
    let lab = Lab::new("privileges-missing").unwrap();
    let dropped = lab
        .node()
        .run_as(Creds::RootNoCaps, privileges::drop_others_of_thread);
    let text = dropped.unwrap_err().to_string();
    for need in NEEDED {
        assert!(
            text.contains(need.name) && text.contains(need.why),
            "{text}"
        );
    }
    assert!(text.contains("securityContext.capabilities.add"), "{text}");
}
