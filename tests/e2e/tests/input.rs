//! Wrong input and missing means: each is a clear error that names its cure, and changes nothing.
#![expect(
    clippy::disallowed_methods,
    reason = "one test runs culvert as somebody else, with a command line of its own"
)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context as _, Result, ensure};
use culvert_e2e::picture;
use culvert_lab::{Creds, CulvertOutput, Lab, Ns};

/// What a run of culvert came to, whoever started it.
#[derive(Debug)]
struct Said {
    /// None if a signal ended it.
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl From<Output> for Said {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl From<CulvertOutput> for Said {
    fn from(output: CulvertOutput) -> Self {
        Self {
            code: output.status.code(),
            stdout: output.stdout,
            stderr: output.stderr,
        }
    }
}

/// Everything that a refused command might have touched.
fn state(lab: &Lab, pod: &Ns) -> Result<Vec<String>> {
    picture::all(lab, &[pod])
}

/// The command fails, says all of these, and nothing is other than before.
fn refused(lab: &Lab, pod: &Ns, args: &[&str], words: &[&str]) -> Result<Said> {
    let before = state(lab, pod)?;
    let output = Said::from(lab.culvert(args)?);
    check_refusal(&output, words).with_context(|| format!("culvert {args:?}"))?;
    picture::same(&before, &state(lab, pod)?)
        .with_context(|| format!("culvert {args:?} was refused and changed something"))?;
    Ok(output)
}

fn check_refusal(output: &Said, words: &[&str]) -> Result<()> {
    ensure!(
        output.code.is_some_and(|code| code != 0),
        "no exit code that says failure: {output:?}"
    );
    for word in words {
        ensure!(
            output.stderr.contains(word),
            "the error does not say `{word}`: {output:?}"
        );
    }
    ensure!(
        !output.stderr.contains("panicked"),
        "a panic is no error message: {output:?}"
    );
    Ok(())
}

fn path(ns: &Ns) -> String {
    ns.path().display().to_string()
}

#[test]
fn namespaces_that_are_none_are_refused() {
    let lab = Lab::new("badns").unwrap();
    let pod = lab.pod("a").unwrap();
    picture::settled(&lab, &[&pod]).unwrap();
    let good = path(&pod);
    let file = lab.scratch().join("file");
    std::fs::write(&file, "no namespace").unwrap();
    let file = file.display().to_string();
    // Attaching a good one in the same call must not happen either: arguments are looked at first.
    for (bad, words) in [
        (
            "/run/netns/nobody-has-this-name",
            ["No such file", "/run/netns/nobody-has-this-name", "lsns"],
        ),
        (&file, ["not a network namespace", &file, "/run/netns/NAME"]),
        (
            "/proc/self/ns/mnt",
            [
                "not a network namespace",
                "/proc/self/ns/mnt",
                "/run/netns/NAME",
            ],
        ),
        (
            "/proc/self/ns/pid",
            [
                "not a network namespace",
                "/proc/self/ns/pid",
                "/run/netns/NAME",
            ],
        ),
    ] {
        for args in [
            vec!["netns", "attach", "--netns", bad],
            vec!["netns", "attach", "--netns", &good, "--netns", bad],
            vec!["-o", "json", "netns", "attach", "--netns", bad],
            vec!["netns", "show", "--netns", bad],
        ] {
            refused(&lab, &pod, &args, &words).unwrap();
        }
    }
    // The same once pods are enrolled, for detach as well.
    lab.attach(&pod, &[]).unwrap();
    refused(
        &lab,
        &pod,
        &["netns", "detach", "--netns", &file],
        &["not a network namespace", &file],
    )
    .unwrap();
    refused(
        &lab,
        &pod,
        &[
            "netns",
            "detach",
            "--netns",
            "/run/netns/nobody-has-this-name",
        ],
        &["No such file", "nobody-has-this-name"],
    )
    .unwrap();
}

#[test]
fn the_nodes_own_namespace_is_refused() {
    let lab = Lab::new("hostns").unwrap();
    let outside = lab.outside().unwrap();
    let pod = lab.pod("a").unwrap();
    picture::settled(&lab, &[&pod]).unwrap();
    let node = path(lab.node());
    for host in ["/proc/self/ns/net", node.as_str()] {
        refused(
            &lab,
            &pod,
            &["netns", "attach", "--netns", host],
            &["node's own network namespace", "hostNetwork"],
        )
        .unwrap();
    }
    // Also once loaded, and from another namespace than the one that was the node's when it was loaded.
    lab.attach(&pod, &[]).unwrap();
    refused(
        &lab,
        &pod,
        &["netns", "attach", "--netns", &node],
        &["node's own network namespace"],
    )
    .unwrap();
    let before = state(&lab, &pod).unwrap();
    let command = lab
        .culvert_command(&["netns", "attach", "--netns", &node])
        .unwrap();
    let output = outside.output(command).unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{stderr}");
    assert!(stderr.contains("node's own network namespace"), "{stderr}");
    picture::same(&before, &state(&lab, &pod).unwrap()).unwrap();
}

#[test]
fn wrong_settings_are_refused() {
    let lab = Lab::new("badargs").unwrap();
    let pod = lab.pod("a").unwrap();
    picture::settled(&lab, &[&pod]).unwrap();
    let netns = path(&pod);
    let many: Vec<String> = (0..9).map(|n| format!("tap{n}")).collect();
    let nine: Vec<&str> = many
        .iter()
        .flat_map(|name| ["--virtual-interface", name])
        .collect();
    let thread = thread_id();
    let cases: Vec<(Vec<&str>, Vec<&str>)> = vec![
        (
            vec!["--exclude-outbound-cidr", "10.0.0.0/33"],
            vec!["`10.0.0.0/33` is not a network", "10.0.0.0/8"],
        ),
        (
            vec!["--exclude-outbound-cidr", "fd00::/129"],
            vec!["`fd00::/129` is not a network", "fd00::/8"],
        ),
        (
            vec!["--exclude-outbound-cidr", "here"],
            vec!["`here` is not a network"],
        ),
        (vec!["--exclude-outbound-port", "0"], vec!["0", "1..=65535"]),
        (
            vec!["--exclude-outbound-port", "65536"],
            vec!["65536", "1..=65535"],
        ),
        (vec!["--exclude-inbound-port", "0"], vec!["0", "1..=65535"]),
        (
            vec!["--exclude-inbound-port", "http"],
            vec!["http", "--exclude-inbound-port"],
        ),
        (vec!["--hold=-1"], vec!["--hold"]),
        (
            vec!["--hold", "soon"],
            vec!["`soon` is neither seconds nor \"forever\""],
        ),
        (
            vec!["--ztunnel", "4194305"],
            vec!["4194305", "running process"],
        ),
        (vec!["--ztunnel", "0"], vec!["running process"]),
        (vec!["--ztunnel", &thread], vec!["thread", "leader"]),
        (
            vec!["--virtual-interface", "sixteen-bytes-xx"],
            vec!["`sixteen-bytes-xx`", "1 to 15 bytes"],
        ),
        (nine, vec!["9 virtual interfaces", "at most 8"]),
        (vec!["--probe-source", "everybody"], vec!["node", "none"]),
    ];
    for (args, words) in &cases {
        let all: Vec<&str> = ["netns", "attach", "--netns", &netns]
            .into_iter()
            .chain(args.iter().copied())
            .collect();
        refused(&lab, &pod, &all, words).unwrap();
    }
    // An enrolled pod stays as it is, too.
    lab.attach(&pod, &["--exclude-outbound-port", "8080"])
        .unwrap();
    for (args, words) in &cases {
        let all: Vec<&str> = ["netns", "attach", "--netns", &netns]
            .into_iter()
            .chain(args.iter().copied())
            .collect();
        refused(&lab, &pod, &all, words).unwrap();
    }
}

/// The number of a thread that is not its process's first.
fn thread_id() -> String {
    // Tests run on threads of their own, so the calling one is never the leader.
    nix::unistd::gettid().to_string()
}

/// Runs culvert in the node's namespace with these places instead of the lab's.
fn culvert_at(lab: &Lab, bpffs: &Path, cgroup: &Path, args: &[&str]) -> Result<Said> {
    let (bpffs, cgroup) = (bpffs.display().to_string(), cgroup.display().to_string());
    // The last of two equal options would be refused, so the lab's are replaced in its own command line.
    let template = lab.culvert_command(&[])?;
    let mut command = Command::new(template.get_program());
    command
        .args(["--bpffs", &bpffs, "--cgroup-root", &cgroup])
        .args(args);
    let output = lab.node().output(command)?;
    Ok(Said::from(output))
}

#[test]
fn a_directory_that_is_no_bpffs_is_refused() {
    let lab = Lab::new("nobpffs").unwrap();
    let pod = lab.pod("a").unwrap();
    picture::settled(&lab, &[&pod]).unwrap();
    let netns = path(&pod);
    let nowhere = lab.scratch().join("not/there");
    for bpffs in [lab.scratch(), &nowhere] {
        for args in [
            vec!["load"],
            vec!["netns", "attach", "--netns", &netns],
            vec!["preflight"],
        ] {
            let before = state(&lab, &pod).unwrap();
            let was = files(lab.scratch());
            let output = culvert_at(&lab, bpffs, lab.cgroup(), &args).unwrap();
            assert_ne!(output.code, Some(0), "{output:?}");
            assert!(output.code.is_some(), "{output:?}");
            let said = format!("{}{}", output.stdout, output.stderr);
            for word in ["bpffs", "mount -t bpf bpf /sys/fs/bpf"] {
                assert!(said.contains(word), "{args:?} does not say {word}: {said}");
            }
            picture::same(&before, &state(&lab, &pod).unwrap()).unwrap();
            assert_eq!(files(lab.scratch()), was, "{args:?}");
        }
    }
}

#[test]
fn a_directory_that_is_no_cgroup_is_refused() {
    let lab = Lab::new("nocgroup").unwrap();
    let pod = lab.pod("a").unwrap();
    picture::settled(&lab, &[&pod]).unwrap();
    let netns = path(&pod);
    let nowhere = lab.scratch().join("not/there");
    for cgroup in [Path::new("/tmp"), &nowhere] {
        for args in [
            vec!["load"],
            vec!["netns", "attach", "--netns", &netns],
            vec!["preflight"],
        ] {
            let before = state(&lab, &pod).unwrap();
            let output = culvert_at(&lab, lab.bpffs(), cgroup, &args).unwrap();
            assert_ne!(output.code, Some(0), "{output:?}");
            assert!(output.code.is_some(), "{output:?}");
            let said = format!("{}{}", output.stdout, output.stderr);
            assert!(said.contains("--cgroup-root"), "{args:?}: {said}");
            assert!(
                said.contains(&cgroup.display().to_string()),
                "{args:?}: {said}"
            );
            picture::same(&before, &state(&lab, &pod).unwrap()).unwrap();
        }
    }
}

#[test]
fn without_capabilities_nothing_is_done_and_the_error_says_what_is_missing() {
    let lab = Lab::new("nocaps").unwrap();
    let pod = lab.pod("a").unwrap();
    picture::settled(&lab, &[&pod]).unwrap();
    let netns = path(&pod);
    let try_all = || {
        for creds in [Creds::Nobody, Creds::RootNoCaps, Creds::NetAdminOnly] {
            for args in [
                vec!["load"],
                vec!["netns", "attach", "--netns", &netns],
                vec!["netns", "detach", "--netns", &netns],
                vec!["unload", "--force"],
            ] {
                // Whoever owns the pins may remove them: these are files, and user 0 needs no capability for that.
                if creds == Creds::RootNoCaps && args[0] == "unload" {
                    continue;
                }
                let before = state(&lab, &pod).unwrap();
                let command = lab.culvert_command(&args).unwrap();
                let output = lab.node().output_as(creds, command).unwrap();
                let output = Said::from(output);
                if output.code == Some(0) {
                    // Nothing loaded that it could see: then there was nothing to do, and nothing was done.
                    assert!(
                        output.stdout.contains("nothing") || output.stdout.contains("[]"),
                        "{creds} {args:?}: {output:?}"
                    );
                } else {
                    check_refusal(&output, &["root", "CAP_"]).unwrap();
                }
                picture::same(&before, &state(&lab, &pod).unwrap())
                    .with_context(|| format!("{creds} {args:?}"))
                    .unwrap();
            }
        }
    };
    try_all();
    // What is enrolled stays so, whoever tries.
    lab.attach(&pod, &[]).unwrap();
    try_all();
    let show = lab
        .culvert(&["-o", "json", "netns", "show", "--netns", &netns])
        .unwrap();
    assert_eq!(show.ok().unwrap().json().unwrap()["whole"], true);
    // Preflight names each missing capability, all at once.
    let command = lab.culvert_command(&["preflight"]).unwrap();
    let output = lab.node().output_as(Creds::Nobody, command).unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(!output.status.success(), "{said}");
    for capability in [
        "CAP_SYS_ADMIN",
        "CAP_NET_ADMIN",
        "CAP_SYS_PTRACE",
        "CAP_NET_RAW",
    ] {
        assert!(said.contains(&format!("add {capability}")), "{said}");
    }
}

#[test]
fn preflight_finds_everything_here() {
    let lab = Lab::new("preflight").unwrap();
    let before = lab.pins().unwrap();
    let output = lab.culvert(&["-o", "json", "preflight"]).unwrap();
    let report = output.ok().unwrap().json().unwrap();
    assert_eq!(report["ok"], true, "{report}");
    let checks = report["checks"].as_array().unwrap();
    assert!(checks.len() >= 10, "{report}");
    for check in checks {
        assert_eq!(check["ok"], true, "{check}");
    }
    assert_eq!(lab.pins().unwrap(), before, "looking changes nothing");
}

#[test]
fn unload_is_refused_while_pods_are_enrolled() {
    let lab = Lab::new("busyunload").unwrap();
    let pod = lab.pod("a").unwrap();
    picture::settled(&lab, &[&pod]).unwrap();
    lab.attach(&pod, &[]).unwrap();
    refused(
        &lab,
        &pod,
        &["unload"],
        &["1 pods are enrolled", "culvert netns detach", "--force"],
    )
    .unwrap();
    lab.detach(&pod).unwrap();
    lab.culvert(&["unload"]).unwrap().ok().unwrap();
    assert!(!lab.bpffs().exists() || lab.pins().unwrap().is_empty());
}

/// All paths below a directory, but for the lab's records of programs' output.
fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        found.push(entry.path());
        if entry.path().is_dir() {
            found.extend(files(&entry.path()));
        }
    }
    found.sort();
    found
}
