//! Finding the namespaces of pods that already run: with real processes in real namespaces and cgroups, and on recorded
//! trees.
#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "test code: a step that fails is a test that fails, and pods are processes that it starts"
)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::IpAddr,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use culvert::kernel::discover::{self, Discovered};
use culvert_lab::{Child, Lab, Ns};

const WEB: &str = "4aa5e1c6-0a1f-4c9f-9d2c-5b7c8a4c2f3b";
const JOB: &str = "0b1f1c4a-6d25-4b51-8f50-0d6cf2c62b11";
const STATIC: &str = "1a53ea6d2a1ad6d6ad7bc3bd0ae3b3d5";

fn addresses(ns: &Ns) -> BTreeSet<IpAddr> {
    BTreeSet::from([ns.v4().unwrap().into(), ns.v6().unwrap().into()])
}

/// Looks from the lab's node, whose namespace is the node's for these tests.
fn discover(lab: &Lab, proc: &Path, wanted: &[(&str, &BTreeSet<IpAddr>)]) -> Discovered {
    let wanted: BTreeMap<&str, &BTreeSet<IpAddr>> = wanted.iter().copied().collect();
    lab.node()
        .run(|| discover::discover(proc, &wanted))
        .unwrap()
}

fn cookies(found: &Discovered) -> BTreeMap<&str, u64> {
    found
        .found
        .iter()
        .map(|(uid, netns)| (uid.as_str(), netns.cookie().0))
        .collect()
}

/// Cgroups below the lab's, removed again before the lab removes its own.
struct Cgroups(Vec<PathBuf>);

impl Cgroups {
    /// Makes the path below the lab's cgroup and moves the process there.
    fn enter(&mut self, lab: &Lab, path: &str, child: &Child) {
        let mut dir = lab.cgroup().to_path_buf();
        for part in path.split('/') {
            dir.push(part);
            if !dir.exists() {
                fs::create_dir(&dir).unwrap();
                fs::write(dir.join("cgroup.type"), "threaded").unwrap();
                self.0.push(dir.clone());
            }
        }
        fs::write(dir.join("cgroup.procs"), child.pid().to_string()).unwrap();
    }
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        for dir in self.0.iter().rev() {
            // The processes were killed a moment ago; the kernel lets go of the cgroup a little later.
            let started = std::time::Instant::now();
            while fs::remove_dir(dir).is_err() && started.elapsed() < culvert_e2e::LONG {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
        }
    }
}

fn sleeper(ns: &Ns) -> Child {
    let mut command = Command::new("sleep");
    command.arg("600");
    ns.spawn(command).unwrap()
}

#[test]
fn living_pods_are_found_by_their_processes() {
    let lab = Lab::new("discover").unwrap();
    let web = lab.pod("web").unwrap();
    let job = lab.pod("job").unwrap();
    let fixed = lab.pod("static").unwrap();
    let own = lab.pod_builder("own").no_interface().build().unwrap();
    let mut cgroups = Cgroups(Vec::new());
    let systemd = WEB.replace('-', "_");
    let web_slice =
        format!("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{systemd}.slice");
    let job_dir = format!("node1/kubepods/besteffort/pod{JOB}");
    let static_dir = format!("kubepods/burstable/pod{STATIC}");
    let children: Vec<(Child, String)> = vec![
        (
            sleeper(&web),
            format!("{web_slice}/cri-containerd-11.scope"),
        ),
        (
            sleeper(&web),
            format!("{web_slice}/cri-containerd-12.scope"),
        ),
        // A container that made a network namespace of its own, and CRI-O's monitor, which stays in the node's.
        (
            sleeper(&own),
            format!("{web_slice}/cri-containerd-13.scope"),
        ),
        (
            sleeper(lab.node()),
            format!("{web_slice}/crio-conmon-14.scope"),
        ),
        (sleeper(&job), format!("{job_dir}/21")),
        (sleeper(&fixed), format!("{static_dir}/31")),
        // Of nobody who is asked for.
        (
            sleeper(&web),
            "kubepods/besteffort/pod00000000-0000-0000-0000-000000000000/41".to_owned(),
        ),
    ];
    for (child, path) in &children {
        cgroups.enter(&lab, path, child);
    }
    let proc = Path::new("/proc");

    let scan = lab
        .node()
        .run(|| discover::scan(proc, &BTreeSet::from([WEB, JOB, STATIC])))
        .unwrap();
    let candidates = |uid: &str| -> BTreeSet<u64> {
        scan.candidates[uid].iter().map(|n| n.cookie().0).collect()
    };
    assert_eq!(
        candidates(WEB),
        BTreeSet::from([web.cookie(), own.cookie()])
    );
    assert_eq!(
        scan.candidates[WEB].len(),
        2,
        "two processes in one namespace are one candidate"
    );
    assert_eq!(candidates(JOB), BTreeSet::from([job.cookie()]));
    assert_eq!(candidates(STATIC), BTreeSet::from([fixed.cookie()]));
    assert_eq!(scan.candidates.len(), 3);
    drop(scan);

    let nobody = "ffffffff-ffff-ffff-ffff-ffffffffffff";
    let one_of: BTreeSet<IpAddr> =
        BTreeSet::from([job.v6().unwrap().into(), "192.0.2.1".parse().unwrap()]);
    let found = discover(
        &lab,
        proc,
        &[
            (WEB, &addresses(&web)),
            (JOB, &one_of),
            (STATIC, &addresses(&fixed)),
            (nobody, &addresses(&web)),
        ],
    );
    let expected = BTreeMap::from([
        (WEB, web.cookie()),
        (JOB, job.cookie()),
        (STATIC, fixed.cookie()),
    ]);
    assert_eq!(cookies(&found), expected);
    assert!(found.unconfirmed.is_empty(), "{found:?}");
    assert!(found.denied.is_none(), "{found:?}");

    // An address that is another pod's, or none at all, proves nothing.
    let found = discover(
        &lab,
        proc,
        &[(WEB, &addresses(&job)), (JOB, &BTreeSet::new())],
    );
    assert_eq!(cookies(&found), BTreeMap::new());
    assert_eq!(
        found.unconfirmed,
        BTreeMap::from([(WEB.to_owned(), 2), (JOB.to_owned(), 1)])
    );
    drop(children);
}

/// A process of a recorded tree.
fn record(proc: &Path, pid: u32, cgroup: &str, netns: Option<&Path>) {
    let dir = proc.join(pid.to_string());
    fs::create_dir_all(dir.join("ns")).unwrap();
    fs::write(dir.join("cgroup"), cgroup).unwrap();
    if let Some(netns) = netns {
        symlink(netns, dir.join("ns/net")).unwrap();
    }
}

#[test]
fn one_pass_serves_a_whole_node() {
    let lab = Lab::new("discovermany").unwrap();
    let pods: Vec<Ns> = (0..5).map(|n| lab.pod(&format!("p{n}")).unwrap()).collect();
    let proc = lab.scratch().join("proc");
    let uid = |n: usize| format!("{n:08x}-1111-4222-8333-444444444444");
    let mut pid = 1;
    for n in 0..250 {
        let pod = &pods[n % pods.len()];
        // A pause process and two containers each, on a hybrid host, in every form of path.
        for container in 0..3 {
            let uid = uid(n);
            let path = match n % 3 {
                0 => format!("/kubepods/besteffort/pod{uid}/{container}"),
                1 => format!(
                    "/kubepods.slice/kubepods-pod{}.slice/crio-{container}.scope",
                    uid.replace('-', "_")
                ),
                _ => format!(
                    "/system.slice/containerd.service/kubepods-burstable-pod{}.slice:cri-containerd:{container}",
                    uid.replace('-', "_")
                ),
            };
            record(
                &proc,
                pid,
                &format!("4:memory:{path}\n0::/\n"),
                Some(pod.path()),
            );
            pid += 1;
        }
    }
    for pid in pid..pid + 500 {
        record(
            &proc,
            pid,
            "0::/system.slice/x.service\n",
            Some(Path::new("/nowhere")),
        );
    }
    // What may also stand there.
    fs::write(proc.join("uptime"), "1").unwrap();
    fs::create_dir(proc.join("90000")).unwrap();
    record(
        &proc,
        90001,
        &format!("0::/kubepods/pod{}/x\n", uid(0)),
        None,
    );
    record(
        &proc,
        90002,
        &format!("0::/kubepods/pod{}/x\n", uid(0)),
        Some(lab.node().path()),
    );
    symlink("1", proc.join("self")).unwrap();

    let owned: Vec<(String, BTreeSet<IpAddr>)> = (0..250)
        .map(|n| (uid(n), addresses(&pods[n % pods.len()])))
        .collect();
    let wanted: Vec<(&str, &BTreeSet<IpAddr>)> =
        owned.iter().map(|(u, a)| (u.as_str(), a)).collect();
    let started = std::time::Instant::now();
    let found = discover(&lab, &proc, &wanted);
    eprintln!(
        "250 pods among {} processes: {:?}",
        pid + 502,
        started.elapsed()
    );
    assert_eq!(found.found.len(), 250);
    for (n, (uid, _)) in owned.iter().enumerate() {
        assert_eq!(
            found.found[uid].cookie().0,
            pods[n % pods.len()].cookie(),
            "{uid}"
        );
    }
    assert!(found.denied.is_none() && found.unconfirmed.is_empty());
}

#[test]
fn what_cannot_be_read_is_said_with_its_cure() {
    let lab = Lab::new("discoverbad").unwrap();
    let pod = lab.pod("a").unwrap();
    let own = addresses(&pod);
    let missing = lab.scratch().join("not/there");
    let wanted = BTreeMap::from([(WEB, &own)]);
    let error = lab
        .node()
        .run(|| discover::discover(&missing, &wanted))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("hostPID") && error.contains("not/there"),
        "{error}"
    );

    // One process that cannot be looked at does not hide the others.
    let proc = lab.scratch().join("proc");
    let file = lab.scratch().join("file");
    fs::write(&file, "").unwrap();
    record(&proc, 1, &format!("0::/kubepods/pod{WEB}/a\n"), Some(&file));
    record(
        &proc,
        2,
        &format!("0::/kubepods/pod{JOB}/a\n"),
        Some(pod.path()),
    );
    let found = discover(&lab, &proc, &[(WEB, &own), (JOB, &own)]);
    assert_eq!(cookies(&found), BTreeMap::from([(JOB, pod.cookie())]));
    let denied = found.denied.unwrap().to_string();
    assert!(denied.contains("CAP_SYS_PTRACE"), "{denied}");
}
